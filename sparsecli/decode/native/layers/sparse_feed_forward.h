#pragma once
#include "layers/feed_forward.h"
#include "layers/units.h"

namespace sparsecli {

// The Sparse FF layer: a low-rank controller chooses k units of every block; only those are computed.
class SparseFeedForward : public FeedForward {
  public:
    explicit SparseFeedForward(Workspace& space);
    void plan_ahead(Pass& pass, const Block& block, int64_t layer_idx) const override;
    void activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) override;
    void add_sum(Pass& pass, const Block& block, int64_t layer_idx) override;

  private:
    static bool scattered(const Pass& pass, int64_t k);
    Activations hidden(Pass& pass, const Block& block, const Activations& x);
    void choose_units(const Pass& pass, const Block& block, Range blocks, int64_t k, const Activations& z);
    void compute_units(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end,
                       const Activations& x);

    ChosenUnits chosen_;
    Buffer<float> probabilities_;              // (T, K): of the chosen units
    Buffer<float> controller_hidden_;          // (T, rank)
    Buffer<int16_t> own_controller_integers_;  // (workers, T * rank): the same as integers
    Buffer<float> own_controller_scales_;      // (workers, T)
};

}  // namespace sparsecli
