// What self-attention, LSH attention and cross-attention share.
#pragma once
#include "pass.h"

namespace sparsecli {

constexpr int64_t MAX_HEAD_WIDTH = 1024;

// Rows of all heads, side by side: (T, heads * head_width), of keys and values those of key_value_heads.
struct HeadRows {
    Buffer<float> queries, keys, values;
    Buffer<float> mixed;  // values, weighted with the scores of attention

    explicit HeadRows(Workspace& space, bool exists = true);

    // Writes the key and value of a token's head to a cache. Where the next token is another text's, what that one
    // writes to arrives meanwhile.
    void append(const Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx, int64_t t, int64_t head) const;

    // Hands over what a head of a token attended to: to the residual stream where there is no output map, else to
    // `mixed`.
    void deliver(const Pass& pass, const float* y, int64_t t, int64_t head, bool to_residual) const;

    // Adds the output's projection of `mixed` to the residual stream.
    void project_output(Pass& pass, const Linear& output) const;
};

// Normalises a head of queries or keys, where there is a norm over heads, and turns pairs (i, i + rotary_width / 2) of
// its rotary part by the angles of the token's position, where the layer has rotary positions.
void prepare_head(const Pass& pass, const Norm& norm, float* head, int64_t t, int64_t cache_idx);

// How many keys of a cache a token's queries see. With keys that are their own queries, a token sees itself only when
// it is alone.
int64_t visible_keys(const Pass& pass, const Token& token, KeyValues Sequence::* cache);

// The first of them; a later one than position 0 in a layer with a window.
int64_t first_key(const Pass& pass, const Token& token, KeyValues Sequence::* cache, int64_t cache_idx);

// Softmax attention of all queries over a cache: y = softmax(scale q K^T) V, delivered head by head. Queries are
// prepared first where `query_norm` is given.
void attend(Pass& pass, const HeadRows& heads, KeyValues Sequence::* cache, int64_t cache_idx, const Norm* query_norm,
            float scale, bool to_residual);

// Prefetches the first keys and values that this worker's heads read; the rest follows in streams.
void prefetch_cache(const Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx);

// Adds what this worker's heads read first to what is prefetched while projections compute, for tokens of several texts.
void plan_cache_ahead(Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx);

// Modules [begin, end) of a convolution at a position; a window begins `lead` elements before its module, of `stride`.
void convolve(Pass& pass, const Convolution& convolution, const ConvState& inputs, int64_t idx, int64_t position,
              int64_t stride, int64_t lead, int64_t begin, int64_t end, float* out);

}  // namespace sparsecli
