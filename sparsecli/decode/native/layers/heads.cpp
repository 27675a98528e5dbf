#include "layers/heads.h"

namespace sparsecli {

constexpr int64_t PREFETCHED_POSITIONS = 128;  // of each head, before attention begins

HeadRows::HeadRows(Workspace& space, bool exists) {
    const int64_t width = exists ? space.model.attention_width() : 0;
    space.reads(width);
    for (Buffer<float>* buffer : {&queries, &keys, &values, &mixed}) space.for_tokens(*buffer, width, true);
}

void HeadRows::append(const Pass& pass, const KeyValues& cache, int64_t cache_idx, int64_t t, int64_t head) const {
    const int64_t width = pass.shape.head_width, at = head * width;
    pass.ops.append(keys.row(t) + at, values.row(t) + at, cache.type, width, pass.token(t).position,
                    cache.of_head(cache_idx, head), cache.value_stride);
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

void prepare_head(const Pass& pass, const Norm& norm, float* head, int64_t t) {
    const sparsecli_shape& s = pass.shape;
    if (norm.weight.data && s.query_key_norm == NORM_OF_HEADS)
        pass.ops.normalize(head, values(norm.weight), nullptr, s.head_width, true, s.epsilon, head);
    if (s.positions != ROTARY) return;
    const int64_t half = s.rotary_width / 2;
    const float *cosine = pass.space.rotary.row(t), *sine = cosine + half;
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
    int64_t lengths[QUERIES], token_of[QUERIES], head_of[QUERIES];
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
            if (query_norm) prepare_head(pass, *query_norm, query, t);
            queries[held] = query;
            lengths[held] = visible_keys(pass, pass.token(t), cache);
            out[held] = mixed[held];
        }
        const KeyValues& keys = sequence->*cache;
        pass.ops.attend(queries, lengths, held, keys.type, width, keys.of_head(cache_idx, key_head), keys.value_stride,
                        scale, pass.space.own_scores.row(pass.worker), pass.space.score_stride, out);
        for (int64_t i = 0; i < held; ++i) heads.deliver(pass, mixed[i], token_of[i], head_of[i], to_residual);
    }
}

void prefetch_cache(const Pass& pass, KeyValues Sequence::* cache, int64_t cache_idx) {
    const Token& token = pass.token(0);
    const KeyValues& keys = token.sequence->*cache;
    const Range heads = pass.mine(keys.heads, 1);
    const int64_t bytes = type_bytes(keys.type);
    const int64_t length = cache == &Sequence::cross_attention ? token.sequence->encoder_length : token.position;
    const int64_t positions = std::min(length, PREFETCHED_POSITIONS);
    for (int64_t head = heads.begin; head < heads.end; ++head) {
        const HeadCache of_head = keys.of_head(cache_idx, head);
        pass.ops.prefetch(of_head.keys, positions * keys.head_width * bytes);
        pass.ops.prefetch(of_head.values, positions * keys.value_stride * bytes);
    }
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
