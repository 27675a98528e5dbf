#pragma once
#include "layers/feed_forward.h"
#include "layers/units.h"

namespace sparsecli {

// The Spark FFN: the first `rank` inputs score all units. Units above a threshold, the mean of the scores plus some
// standard deviations, meet the other inputs; only their rows are read.
class SparkFeedForward : public FeedForward {
  public:
    explicit SparkFeedForward(Workspace& space);
    void plan_ahead(Pass& pass, const Block& block, int64_t layer_idx) const override;
    void activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) override;
    void add_sum(Pass& pass, const Block& block, int64_t layer_idx) override;

  private:
    static Range my_units(const Pass& pass, int64_t worker) {
        return share(pass.shape.d_ff, LANES, worker, pass.workers());
    }
    float threshold_of(const Pass& pass, const float* scores) const;
    Activations other_inputs(Pass& pass, const Activations& x) const;
    int64_t choose(int64_t t, float threshold, Range piece, int64_t end) const;

    ChosenUnits chosen_;           // a worker's list of what it finds begins at the index of its first unit
    Buffer<float> scores_;         // (T, d_ff)
    Buffer<float> above_;          // (T, d_ff): of the chosen units, how far their scores are above the threshold
    Buffer<float> thresholds_;     // (T, 1)
    Buffer<float> other_inputs_;   // (T, d - rank)
    Buffer<float> own_inputs_;     // (workers, d - rank): of a single token
    Buffer<int64_t> found_units_;  // (T, workers): how many each worker found
};

}  // namespace sparsecli
