#pragma once
#include "layers/feed_forward.h"
#include "layers/units.h"

namespace sparsecli {

// Mixture of experts: a router chooses slices of consecutive units for every token. Only chosen experts are read; many
// tokens that chose the same one share its reading, piece by piece.
class MixtureFeedForward : public FeedForward {
  public:
    explicit MixtureFeedForward(Workspace& space);
    void activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) override;
    void add_sum(Pass& pass, const Block& block, int64_t layer_idx) override;

  private:
    void route(Pass& pass, const Block& block, const Activations& x, int64_t k);
    void choose_experts(Pass& pass, const Block& block, const Activations& x, int64_t k, int32_t* experts,
                        float* probabilities);
    void group(const Pass& pass, int64_t k);
    void activate_expert(Pass& pass, const Block& block, const Activations& x, int64_t entry, int64_t k, Range units);

    // Calls body(first, last, expert) for the entries, token * k + choice, of each chosen expert.
    template <class F>
    void each_expert(const Pass& pass, const F& body) const;

    // Of one token every worker has its own: each computes the router for itself.
    int32_t* experts_of(const Pass& pass, int64_t t) const {
        return pass.single() ? own_experts_.row(pass.worker) : experts_.row(t);
    }
    float* probabilities_of(const Pass& pass, int64_t t) const {
        return pass.single() ? own_probabilities_.row(pass.worker) : probabilities_.row(t);
    }

    ChosenUnits chosen_;
    Buffer<int32_t> experts_, own_experts_;            // (T, k), (workers, k): in the order of their numbers
    Buffer<float> probabilities_, own_probabilities_;  // the same: of the chosen experts
    Buffer<int32_t> own_entries_;                      // (workers, T * k): token * k + choice, by expert
    Buffer<int32_t> own_ends_;                         // (workers, experts): where the entries of an expert end
    Buffer<float> own_router_scores_;                  // (workers, experts)
    Buffer<float> own_scaled_input_;                   // (workers, d_model): a token times its expert's probability
};

}  // namespace sparsecli
