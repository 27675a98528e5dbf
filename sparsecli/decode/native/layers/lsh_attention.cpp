#include "layers/lsh_attention.h"

namespace sparsecli {

LshAttention::LshAttention(Workspace& space) {
    space.for_workers(own_rotated_, space.model.hashes() ? MAX_ROTATIONS : 0, false);
}

void LshAttention::reserve(Workspace& space, int64_t positions) {
    if (!space.model.hashes() || positions <= positions_) return;
    positions_ = 0;  // until it is there: memory may not suffice
    space.for_workers(own_chosen_, 2 * positions, false);
    positions_ = 2 * positions;
}

// Reads the key from the cache, as it was rounded. While a token reads all keys none is hashed; the first token of a
// sequence in a pass makes up for earlier keys, for all of them when the number of buckets has changed.
void LshAttention::hash_key(Pass& pass, int64_t cache_idx, int64_t t, int64_t head) {
    const Token& token = pass.token(t);
    const sparsecli_shape& s = pass.shape;
    Sequence& sequence = *token.sequence;
    Hashed& hashed = sequence.hashed[size_t(cache_idx * s.heads + head)];
    const bool first = !t || pass.token(t - 1).sequence != token.sequence;
    if (first) hashed.positions = std::min(hashed.positions, token.position);  // the text may have been truncated
    if (sequence.newest < s.most_keys) return;
    const LshRotations& rotations = pass.model.rotations_of(cache_idx, sequence.newest);
    int64_t position = token.position;
    if (first) {
        position = hashed.buckets == rotations.buckets ? hashed.positions : 0;
        hashed = {sequence.newest + 1, rotations.buckets};
    }
    const KeyValues& keys = sequence.self_attention;
    const HeadCache cache = keys.of_head(cache_idx, head);
    const int64_t width = s.head_width, bytes = keys.value_stride * type_bytes(keys.type);
    const int64_t stride = keys.positions, rounds = s.hash_rounds;
    int32_t* buckets = sequence.buckets.data + (cache_idx * s.heads + head) * rounds * stride;
    float key[MAX_HEAD_WIDTH];
    for (; position <= token.position; ++position) {
        const float* scale = cache.key_scales ? cache.key_scales + position : nullptr;
        pass.ops.widen((const char*)cache.keys + position * bytes, scale, keys.type, width, key);
        pass.ops.hash(key, width, rotations.data + head * width * rotations.columns, rotations.columns,
                      rotations.factors.data(), int64_t(rotations.factors.size()), rounds,
                      own_rotated_.row(pass.worker), buckets + position, stride);
    }
}

// The keys that a token's head reads, in order; returns how many. Those that share a bucket with its own key come
// first, then the most recent ones. The token's own key counts among them, but is read only when it is alone.
int64_t LshAttention::choose_keys(const Pass& pass, const Token& token, int64_t cache_idx, int64_t head,
                                  int32_t* chosen) const {
    const int64_t position = token.position, most = pass.shape.most_keys - 1;
    if (position == 0 || most == 0) {
        chosen[0] = int32_t(position);
        return 1;
    }
    int64_t found = 0, recent = 0;  // the first position of those that are all read
    if (position > most) {
        const int64_t stride = token.sequence->self_attention.positions, rounds = pass.shape.hash_rounds;
        const int32_t* buckets = token.sequence->buckets.data + (cache_idx * pass.shape.heads + head) * rounds * stride;
        found = pass.ops.find_same_bucket(buckets, stride, rounds, position, chosen);
        if (found >= most) {
            std::memmove(chosen, chosen + found - most, size_t(most) * sizeof(int32_t));
            return most;
        }
        recent = position;
        for (int64_t others = most - found; others;) {
            --recent;
            if (found && chosen[found - 1] == recent)
                --found;
            else
                --others;
        }
    }
    for (int64_t other = recent; other < position; ++other) chosen[found++] = int32_t(other);
    return found;
}

void LshAttention::attend(Pass& pass, const HeadRows& heads, int64_t cache_idx, bool to_residual) {
    const int64_t width = pass.shape.head_width;
    int32_t* chosen = own_chosen_.row(pass.worker);
    pass.each(pass.shape.heads, [&](int64_t t, int64_t begin, int64_t end) {
        const Token& token = pass.token(t);
        const KeyValues& keys = token.sequence->self_attention;
        for (int64_t head = begin; head < end; ++head) {
            float query[MAX_HEAD_WIDTH], mixed[MAX_HEAD_WIDTH];
            std::memcpy(query, heads.queries.row(t) + head * width, size_t(width) * sizeof(float));
            std::fill(query + width, query + keys.value_stride, 0.0f);
            const int64_t count = choose_keys(pass, token, cache_idx, head, chosen);
            pass.ops.attend_chosen(query, chosen, count, keys.type, width, keys.of_head(cache_idx, head),
                                   keys.value_stride, pass.space.own_scores.row(pass.worker), mixed);
            heads.deliver(pass, mixed, t, head, to_residual);
        }
    });
}

}  // namespace sparsecli
