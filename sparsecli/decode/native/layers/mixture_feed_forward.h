#pragma once
#include "layers/feed_forward.h"
#include "layers/units.h"

namespace sparsecli {

// Mixture of experts: a router chooses slices of consecutive units for every token.
class MixtureFeedForward : public FeedForward {
  public:
    explicit MixtureFeedForward(Workspace& space);
    void activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) override;
    void add_sum(Pass& pass, const Block& block, int64_t layer_idx) override;

  private:
    void activate_expert(Pass& pass, const Block& block, const Activations& x, float probability, int64_t t,
                         int64_t begin, int64_t end);

    ChosenUnits chosen_;
    Buffer<float> own_router_scores_;  // (workers, experts)
    Buffer<float> own_scaled_input_;   // (workers, d_model): a token times its expert's probability
};

}  // namespace sparsecli
