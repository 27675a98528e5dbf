#pragma once
#include <memory>

#include "layers/attention.h"
#include "layers/cross_attention.h"
#include "layers/embedding.h"
#include "layers/feed_forward.h"
#include "layers/head.h"
#include "layers/sru.h"
#include "pass.h"

namespace sparsecli {

// The model: takes tokens through its layers. One object of every kind of layer serves all blocks.
class Forward {
  public:
    Forward(const Model& model, const Ops& ops, Pool& pool);

    // Room for sequences of so many positions; before a pass, by one thread. Throws std::bad_alloc.
    void reserve(int64_t positions);

    void run(const std::vector<Token>& tokens, bool profile);

    // Computes what cross-attention reads of an encoder's output: keys and values of all layers.
    void read_encoder(const std::vector<Token>& rows);

    // Units of every layer that were computed in full since the last call; returns the tokens, a prefix's among them.
    int64_t take_active_units(int64_t* units);

    int64_t block_stack_ns = 0;
    double* seconds() { return space_.seconds; }  // of every part, see Workspace

  private:
    void run_blocks(Pass& pass);
    void attention(Pass& pass, const Block& block, int64_t layer_idx, int64_t index);
    void feed_forward(Pass& pass, const Block& block, int64_t layer_idx);

    Workspace space_;
    Embedding embedding_;
    Attention attention_;
    CrossAttention cross_attention_;
    Sru sru_;
    std::unique_ptr<FeedForward> feed_forward_;
    Head head_;
    int64_t tokens_ = 0;  // since they were last counted
};

}  // namespace sparsecli
