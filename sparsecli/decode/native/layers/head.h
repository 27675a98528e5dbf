#pragma once
#include "pass.h"

namespace sparsecli {

constexpr int64_t HEAD_LANES = 16;  // parts of the vocabulary: every sixteenth panel; each has its own candidates

// Logits of the tokens that ask for them: the merged streams, normalised, times a dense or a multiplicative matrix.
class Head {
  public:
    explicit Head(Workspace& space);
    void begin(const std::vector<Token>& tokens);  // before the pass, by one thread
    void run(Pass& pass);

  private:
    const float* merged(const Pass& pass, int64_t t, float* out) const;
    void multiplicative(Pass& pass, const Activations& x, float* out);
    void dense(Pass& pass, const Activations& x, float* out);
    void scale_and_cap(Pass& pass, float* out) const;
    void rescore(Pass& pass, const Activations& x, int64_t lane, float* logits);

    int64_t count() const { return int64_t(asking_.size()); }

    std::vector<int64_t> asking_;        // tokens whose logits are asked for, M of them
    Buffer<float> normed_, own_normed_;  // (M, merged width), (workers, merged width)
    Buffer<int32_t> own_candidates_;     // (workers, candidates of a lane)
};

}  // namespace sparsecli
