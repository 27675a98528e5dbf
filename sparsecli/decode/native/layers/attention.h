#pragma once
#include "layers/lsh_attention.h"
#include "pass.h"

namespace sparsecli {

// Self-attention of a block: projections (dense, low-rank, multiplicative or convolved), keys and values appended to
// the cache, attention over it, and the output's projection, which is added to the residual stream.
class Attention {
  public:
    explicit Attention(Workspace& space);
    void reserve(Workspace& space, int64_t positions) { lsh_.reserve(space, positions); }  // before a pass
    void plan_ahead(Pass& pass, const AttentionLayer& layer) const;
    void run(Pass& pass, const AttentionLayer& layer, int64_t cache_idx);

  private:
    void project(Pass& pass, const AttentionLayer& layer, int64_t cache_idx, const Activations& x);
    void project_dense(Pass& pass, const AttentionLayer& layer, const Activations& x);
    void project_low_rank(Pass& pass, const AttentionLayer& layer, const Activations& x);
    void project_multiplicative(Pass& pass, const AttentionLayer& layer, const Activations& x);
    void project_shared(Pass& pass, const AttentionLayer& layer, int64_t cache_idx, const Activations& x);
    void norm_width(Pass& pass, const AttentionLayer& layer);
    void convolve(Pass& pass, const AttentionLayer& layer, int64_t cache_idx, int64_t t, int64_t begin, int64_t end);
    void prepare_key(Pass& pass, const AttentionLayer& layer, int64_t t, int64_t head);
    void multiply_output(Pass& pass, const AttentionLayer& layer, int64_t cache_idx);

    HeadRows heads_;
    Buffer<float> shared_projection_;              // (T, d_model): what convolutions make queries, keys and values of
    Buffer<float> low_rank_query_, low_rank_key_;  // (T, query_rank), (T, key_rank)
    Buffer<float> unit_length_;                    // (1, head_width): a norm's weights that make a key a unit vector
    LshAttention lsh_;
};

}  // namespace sparsecli
