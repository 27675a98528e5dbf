#pragma once
#include <memory>

#include "pass.h"

namespace sparsecli {

// The feed-forward layer of a block, in two halves: first the units' activations of x, then their sum, which is added
// to the residual stream. Each half ends with a barrier; a recurrent branch adds its output between them.
//
// A new kind is a class like these in files of its own, a line in `make_feed_forward` (forward.cpp), a
// `FeedForwardKind` and its tensors (model.h).
class FeedForward {
  public:
    virtual ~FeedForward() = default;

    // What this worker reads first for a single token, to be prefetched while multiplicative layers compute.
    virtual void plan_ahead(Pass&, const Block&, int64_t /*layer_idx*/) const {}

    virtual void activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) = 0;
    virtual void add_sum(Pass& pass, const Block& block, int64_t layer_idx) = 0;
};

class DenseFeedForward : public FeedForward {
  public:
    explicit DenseFeedForward(Workspace& space);
    void activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) override;
    void add_sum(Pass& pass, const Block& block, int64_t layer_idx) override;

  private:
    Buffer<float> hidden_, gate_;  // (T, d_ff)
};

}  // namespace sparsecli
