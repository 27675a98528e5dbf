// Feed-forward layers that read all units with 3 or 4 bits a weight.
#pragma once
#include "layers/feed_forward.h"
#include "layers/units.h"

namespace sparsecli {

// The quantised rows of all units that meet their input: the sketch of a selector, the base of a precision layer.
class Sketch {
  public:
    explicit Sketch(Workspace& space);

    // (T, padded units * rows): before the activation function; LANES gates, then LANES ups, where there are gates.
    Buffer<float> products;

    // This worker's units: whole blocks and whole panels.
    static Range my_units(const Pass& pass, int64_t worker);

    // Calls body(first, last) for pieces of `units`, whole blocks and panels each.
    template <class F>
    static void each_piece(const Pass& pass, Range units, const F& body);

    // Products of units [first, last), and their activations in `hidden` (T, d_ff).
    void read(const Pass& pass, const Block& block, int64_t first, int64_t last, const Activations& x,
              const Buffer<float>& hidden) const;

    // The k units of each block of [first, last) with the largest |hidden| * importance, best first.
    static void choose(const Pass& pass, const Block& block, int64_t k, int64_t first, int64_t last,
                       const float* hidden, int32_t* chosen);
};

// A sketch of all units chooses those that are computed with exact rows: the best of each block, or (`positive`) those
// whose sketch lies above a threshold. A low-rank bypass stands in for the others.
class SelectorFeedForward : public FeedForward {
  public:
    explicit SelectorFeedForward(Workspace& space);
    void activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) override;
    void add_sum(Pass& pass, const Block& block, int64_t layer_idx) override;

  private:
    void activate_best(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x);
    void activate_positive(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x);
    void activate_units(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end,
                        const Activations& x) const;
    void prefetch(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end) const;
    void add_bypass(Pass& pass, const Block& block);

    Sketch sketch_;
    ChosenUnits chosen_;
    Buffer<float> estimates_;         // (T, d_ff): activations by the sketch
    Buffer<float> bypass_hidden_;     // (T, rank)
    Buffer<int64_t> positive_units_;  // (T, workers): how many each worker found
};

// All units are computed from the quantised base; the best of each block are refined by a residual that holds what the
// base's rounding left out.
class PrecisionFeedForward : public FeedForward {
  public:
    explicit PrecisionFeedForward(Workspace& space);
    void activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) override;
    void add_sum(Pass& pass, const Block& block, int64_t layer_idx) override;

  private:
    void refine(const Pass& pass, const Block& block, int64_t begin, int64_t end, const Activations& x,
                int64_t t) const;

    Sketch base_;
    Buffer<float> hidden_;          // (T, d_ff)
    Buffer<int32_t> chosen_units_;  // (T, K)
};

}  // namespace sparsecli
