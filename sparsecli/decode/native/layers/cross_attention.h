#pragma once
#include "layers/heads.h"

namespace sparsecli {

// Attention of a block to an encoder's output, whose keys and values are computed once for each sequence. Queries are
// dense, or convolved; convolved ones have no output map.
class CrossAttention {
  public:
    explicit CrossAttention(Workspace& space);

    // Keys and values of an encoder's output, for all layers: a pass of its own.
    void read_encoder(Pass& pass);

    void run(Pass& pass, const AttentionLayer& layer, int64_t layer_idx);

  private:
    void convolve_queries(Pass& pass, const AttentionLayer& layer, int64_t layer_idx, const Activations& x);

    HeadRows heads_;
    Buffer<float> shared_projection_;  // (T, d_model): what a convolution makes queries of
};

}  // namespace sparsecli
