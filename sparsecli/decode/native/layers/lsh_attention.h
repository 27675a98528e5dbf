#pragma once
#include "layers/heads.h"

namespace sparsecli {

constexpr int64_t MAX_ROTATIONS = 1 << 17;  // columns of an attention layer's, for all rounds
constexpr int64_t MAX_BUCKETS = 1 << 30;    // kept as 32-bit numbers

// Attention among keys that share a bucket (locality-sensitive hashing): a token reads at most `most_keys` keys and
// values, however long the text is.
class LshAttention {
  public:
    explicit LshAttention(Workspace& space);
    void reserve(Workspace& space, int64_t positions);

    // Puts the key of a token's head into its buckets.
    void hash_key(Pass& pass, int64_t cache_idx, int64_t t, int64_t head);

    void attend(Pass& pass, const HeadRows& heads, int64_t cache_idx, bool to_residual);

  private:
    int64_t choose_keys(const Pass& pass, const Token& token, int64_t cache_idx, int64_t head, int32_t* chosen) const;

    Buffer<int32_t> own_chosen_;  // (workers, positions): keys that one head of a token reads
    Buffer<float> own_rotated_;   // (workers, rotations): products of one key with the rotations
    int64_t positions_ = 0;
};

}  // namespace sparsecli
