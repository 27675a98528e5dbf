#include "layers/heads.h"

namespace sparsecli {

constexpr int64_t PREFETCHED_POSITIONS = 128;  // of each head, before attention begins

HeadRows::HeadRows(Workspace& space, bool exists) {
    const int64_t width = exists ? space.model.attention_width() : 0;
    space.reads(width);
    for (Buffer<float>* buffer : {&queries, &keys, &values, &mixed}) space.for_tokens(*buffer, width, true);
}

void HeadRows::append(const Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx, int64_t t, int64_t head) const {
    const Token& token = pass.token(t);
    if (t + 1 < pass.count() && pass.token(t + 1).sequence != token.sequence) {
        const Token& next = pass.token(t + 1);
        const KeyValues& its = next.sequence->*cache;
        const HeadCache place = its.of_head(cache_idx, head);
        const int64_t slot = next.position % place.slots, bytes = type_bytes(its.type);
        const int64_t first = slot / LANES * LANES, row = its.head_width * bytes;
        pass.ops.prefetch((const char*)place.keys + first * row, LANES * row);
        pass.ops.prefetch((const char*)place.values + slot * its.value_stride * bytes, its.value_stride * bytes);
    }
    const KeyValues& own = token.sequence->*cache;
    const int64_t width = pass.shape.head_width, at = head * width;
    pass.ops.append(keys.row(t) + at, values.row(t) + at, own.type, width, token.position, own.of_head(cache_idx, head),
                    own.value_stride);
}

void HeadRows::deliver(const Pass& pass, const float* y, int64_t t, int64_t head, bool to_residual) const {
    const int64_t width = pass.shape.head_width;
    float* out = (to_residual ? pass.residual(t) : mixed.row(t)) + head * width;
    for (int64_t c = 0; c < width; ++c) out[c] = to_residual ? out[c] + y[c] : y[c];
}

void HeadRows::project_output(Pass& pass, const Linear& output) const {
    const Activations y = pass.readable(mixed);
    pass.add_to_residual(pass.space.layer_output, pass.linear(output, y, pass.space.layer_output));
    pass.barrier(PROJECTION);
}

void prepare_head(const Pass& pass, const Norm& norm, float* head, int64_t t, int64_t cache_idx) {
    const sparsecli_shape& s = pass.shape;
    if (norm.weight.data && s.query_key_norm != PROJECTION_NORM)
        pass.ops.normalize(head, values(norm.weight), nullptr, s.head_width, true, s.epsilon, head);
    const int64_t table = pass.model.rotary_tables[size_t(cache_idx / s.attention_layers)];
    if (table == NO_ROTARY) return;
    const int64_t half = s.rotary_width / 2;
    const Buffer<float>& angles = table == SLIDING_ROTARY ? pass.space.sliding_rotary : pass.space.rotary;
    const float *cosine = angles.row(t), *sine = cosine + half;
    for (int64_t i = 0; i < half; ++i) {
        const float first = head[i], second = head[half + i];
        head[i] = first * cosine[i] - second * sine[i];
        head[half + i] = second * cosine[i] + first * sine[i];
    }
}

int64_t visible_keys(const Pass& pass, const Token& token, KeyValues Sequence::* cache) {
    if (cache == &Sequence::cross_attention) return token.sequence->encoder_length;
    return pass.shape.shared_query_key ? std::max<int64_t>(token.position, 1) : token.position + 1;
}

int64_t first_key(const Pass& pass, const Token& token, KeyValues Sequence::* cache, int64_t cache_idx) {
    if (cache == &Sequence::cross_attention) return 0;
    const int64_t window = pass.model.windows[size_t(cache_idx / pass.shape.attention_layers)];
    return window ? std::max<int64_t>(token.position + 1 - window, 0) : 0;
}

// The first keys and values that a token's head reads.
struct FirstKeys {
    const char *keys, *values;
    int64_t key_bytes, value_bytes;
};

FirstKeys first_keys(const Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx, int64_t t, int64_t head) {
    const Token& token = pass.token(t);
    const KeyValues& held = token.sequence->*cache;
    const int64_t length = cache == &Sequence::cross_attention ? token.sequence->encoder_length : token.position;
    const int64_t begin = first_key(pass, token, cache, cache_idx) / LANES * LANES;
    const HeadCache of_head = held.of_head(cache_idx, head);
    const int64_t slot = begin % of_head.slots;
    const int64_t positions = std::min({length - begin, of_head.slots - slot, PREFETCHED_POSITIONS});
    const int64_t key = held.head_width * type_bytes(held.type), value = held.value_stride * type_bytes(held.type);
    return {(const char*)of_head.keys + slot * key, (const char*)of_head.values + slot * value, positions * key,
            positions * value};
}

void prefetch_head(const Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx, int64_t t, int64_t head) {
    const FirstKeys first = first_keys(pass, cache, cache_idx, t, head);
    pass.ops.prefetch(first.keys, first.key_bytes);
    pass.ops.prefetch(first.values, first.value_bytes);
}

void plan_cache_ahead(Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx) {
    const int64_t tokens = pass.count(), group = pass.shape.heads / (pass.token(0).sequence->*cache).heads;
    const Range items = pass.mine(pass.shape.heads * tokens, 1);
    const Sequence* before = nullptr;
    for (int64_t item = items.begin; item < items.end && pass.ahead.count < ReadAhead::MOST; item += group) {
        const int64_t t = item / group % tokens;
        if (pass.token(t).sequence == before) continue;
        before = pass.token(t).sequence;
        const FirstKeys first = first_keys(pass, cache, cache_idx, t, item / (group * tokens));
        pass.ahead.add(first.keys, first.key_bytes);
        pass.ahead.add(first.values, first.value_bytes);
    }
}

// Queries that read the same keys go together: heads of a group, and neighbouring tokens of a sequence.
void attend(Pass& pass, const HeadRows& heads, KeyValues Sequence::* cache, int64_t cache_idx, const Norm* query_norm,
            float scale, bool to_residual) {
    const int64_t key_heads = (pass.token(0).sequence->*cache).heads, tokens = pass.count();
    const int64_t width = pass.shape.head_width, group = pass.shape.heads / key_heads;
    // Ordered by key head, then token, then head of the group. A single token is shared out by key heads where they are
    // as many as the projections' parts.
    const bool aligned = tokens == 1 && key_heads % pass.workers() == 0;
    const Range items = pass.mine(pass.shape.heads * tokens, aligned ? group : 1);
    const float* queries[QUERIES];
    float* out[QUERIES];
    float mixed[QUERIES][MAX_HEAD_WIDTH];
    const float softcap = cache == &Sequence::self_attention ? float(pass.shape.attention_softcap) : 0;
    int64_t starts[QUERIES], lengths[QUERIES], token_of[QUERIES], head_of[QUERIES];
    for (int64_t item = items.begin; item < items.end;) {
        const int64_t key_head = item / (group * tokens);
        const Sequence* sequence = pass.token(item / group % tokens).sequence;
        int64_t held = 0;
        for (; held < QUERIES && item < items.end && item / (group * tokens) == key_head; ++item, ++held) {
            const int64_t t = item / group % tokens;
            if (pass.token(t).sequence != sequence) break;
            head_of[held] = key_head * group + item % group;
            token_of[held] = t;
            float* query = heads.queries.row(t) + head_of[held] * width;
            if (query_norm) prepare_head(pass, *query_norm, query, t, cache_idx);
            queries[held] = query;
            starts[held] = first_key(pass, pass.token(t), cache, cache_idx);
            lengths[held] = visible_keys(pass, pass.token(t), cache);
            out[held] = mixed[held];
        }
        if (item < items.end) {  // what comes from another place arrives meanwhile
            const int64_t next = item / group % tokens, next_head = item / (group * tokens);
            if (pass.token(next).sequence != sequence || next_head != key_head)
                prefetch_head(pass, cache, cache_idx, next, next_head);
        }
        const KeyValues& keys = sequence->*cache;
        pass.ops.attend(queries, starts, lengths, held, keys.type, width, keys.of_head(cache_idx, key_head),
                        keys.value_stride, scale, softcap, pass.space.own_scores.row(pass.worker),
                        pass.space.score_stride, out);
        for (int64_t i = 0; i < held; ++i) heads.deliver(pass, mixed[i], token_of[i], head_of[i], to_residual);
    }
}

void prefetch_cache(const Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx) {
    const Range heads = pass.mine((pass.token(0).sequence->*cache).heads, 1);
    for (int64_t head = heads.begin; head < heads.end; ++head) prefetch_head(pass, cache, cache_idx, 0, head);
}

void convolve(Pass& pass, const Convolution& convolution, const ConvState& inputs, int64_t idx, int64_t position,
              int64_t stride, int64_t lead, int64_t begin, int64_t end, float* out) {
    const int64_t kernel = pass.shape.kernel;
    const void** taps = pass.space.own_taps.row(pass.worker);
    for (int64_t tap = 0; tap < kernel; ++tap) taps[tap] = inputs.row(idx, position - kernel + 1 + tap);
    pass.ops.convolve(convolution.kernel, values(convolution.bias), kernel, taps, stride, lead, begin, end, out,
                      &pass.ahead);
}

}  // namespace sparsecli
