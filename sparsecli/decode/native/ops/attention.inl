// Attention over cached keys and values. Part of all.inl, inside its namespaces.

inline void append_bytes(const float* values, int64_t width, int64_t step, int8_t* to, float* scale) {
    float limit = 0;
    for (int64_t i = 0; i < width; ++i) limit = std::fabs(values[i]) > limit ? std::fabs(values[i]) : limit;
    const float inverse = limit > NOTHING ? 127 / limit : 0;
    for (int64_t i = 0; i < width; ++i) to[i * step] = int8_t(std::nearbyint(values[i] * inverse));
    *scale = limit / 127;
}

void append(const float* key, const float* value, int64_t type, int64_t width, int64_t position, const HeadCache& cache,
            int64_t value_stride) {
    position %= cache.slots;
    const int64_t row = position * value_stride, step = cache.by_rows ? 1 : LANES;
    const int64_t at = cache.by_rows ? row : position / LANES * width * LANES + position % LANES;
    if (cache.by_rows) {
        const int64_t bytes = type_bytes(type);
        std::memset((char*)cache.keys + (at + width) * bytes, 0, size_t((value_stride - width) * bytes));
    }
    if (type == INT8) {
        append_bytes(key, width, step, (int8_t*)cache.keys + at, (float*)cache.key_scales + position);
        append_bytes(value, width, 1, (int8_t*)cache.values + row, (float*)cache.value_scales + position);
    } else if (type == BFLOAT16) {
        for (int64_t i = 0; i < width; ++i) ((uint16_t*)cache.keys)[at + i * step] = to_bfloat16(key[i]);
        convert(value, BFLOAT16, width, (uint16_t*)cache.values + row);
    } else {
        for (int64_t i = 0; i < width; ++i) ((float*)cache.keys)[at + i * step] = key[i];
        std::memcpy((float*)cache.values + row, value, size_t(width) * 4);
    }
}

// Scores of LANES positions for Q queries.
template <int Q, class W>
inline void score_block(const float* const* queries, int64_t width, const W* keys, const Vector& scales, float* scores,
                        int64_t score_stride) {
    Vector even[Q], odd[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) even[q] = odd[q] = fill(0);
    int64_t i = 0;
    for (; i + 2 <= width; i += 2) {
        prefetch_line(keys + i * LANES + width * LANES);
        const Vector first = load(keys + i * LANES), second = load(keys + (i + 1) * LANES);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
            add_product(even[q], fill(queries[q][i]), first);
            add_product(odd[q], fill(queries[q][i + 1]), second);
        }
    }
    if (i < width) {
        const Vector last = load(keys + i * LANES);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) add_product(even[q], fill(queries[q][i]), last);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) store(scores + q * score_stride, (even[q] + odd[q]) * scales);
}

// Of `positions` from `begin` on, both multiples of LANES.
template <int Q, class W>
inline void score(const float* const* queries, int64_t width, int64_t begin, int64_t positions, const HeadCache& cache,
                  float scale, float* scores, int64_t score_stride) {
    constexpr int AT_ONCE = PARTS > 1 && Q > 2 ? 2 : Q;  // sums that stay in registers
    int64_t slot = begin % cache.slots;
    for (int64_t position = 0; position < positions; position += LANES, slot += LANES) {
        if (slot == cache.slots) slot = 0;
        const W* keys = (const W*)cache.keys + slot * width;
        Vector scales = fill(scale);
        if (sizeof(W) == 1) scales = scales * load(cache.key_scales + slot);
        int q = 0;
        for (; q + AT_ONCE <= Q; q += AT_ONCE)
            score_block<AT_ONCE>(queries + q, width, keys, scales, scores + q * score_stride + position, score_stride);
        if constexpr (Q % AT_ONCE)
            score_block<1>(queries + q, width, keys, scales, scores + q * score_stride + position, score_stride);
    }
}

inline Vector soft_capped(const Vector& x, float limit) {
    return fill(limit) - fill(2 * limit) / (fill(1) + exponential(x * fill(2 / limit)));
}

void soft_cap(float* x, int64_t count, float limit) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, soft_capped(load(x + i), limit));
    if (i == count) return;
    float rest[LANES] = {};
    std::memcpy(rest, x + i, size_t(count - i) * sizeof(float));
    store(rest, soft_capped(load(rest), limit));
    std::memcpy(x + i, rest, size_t(count - i) * sizeof(float));
}

// Scores of start <= position < length become unnormalised probabilities, zeros elsewhere up to `positions`; returns
// 1 / their sum.
inline float soften(float* scores, int64_t start, int64_t length, int64_t positions, float softcap) {
    for (int64_t i = 0; softcap && i < positions; i += LANES) store(scores + i, soft_capped(load(scores + i), softcap));
    for (int64_t i = 0; i < start; ++i) scores[i] = -INFINITY;
    for (int64_t i = length; i < positions; ++i) scores[i] = -INFINITY;
    Vector top = load(scores);
    for (int64_t i = LANES; i < positions; i += LANES) top = larger(load(scores + i), top);
    const Vector middle = fill(maximum(top));
    Vector total = fill(0);
    for (int64_t i = 0; i < positions; i += LANES) {
        const Vector p = exponential(load(scores + i) - middle);
        store(scores + i, p);
        total = total + p;
    }
    float lanes[LANES];
    store(lanes, total);
    for (int64_t i = 0; i < start; ++i) lanes[i % LANES] -= scores[i], scores[i] = 0;
    for (int64_t i = length; i < positions; ++i) lanes[i % LANES] -= scores[i], scores[i] = 0;
    return 1 / sum(load(lanes));
}

template <int Q, int V, class W>
inline void mix(const float* scores, int64_t score_stride, int64_t begin, int64_t positions, int64_t column,
                const HeadCache& cache, int64_t value_stride, Vector (*out)[V]) {
    Vector sums[Q][V];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[q][v] = fill(0);
    int64_t slot = begin % cache.slots;
    const W* values = (const W*)cache.values + slot * value_stride + column;
    for (int64_t position = 0; position < positions; ++position, ++slot, values += value_stride) {
        if (slot == cache.slots) slot = 0, values = (const W*)cache.values + column;
        prefetch_line(values + 16 * value_stride);
        const float scale = sizeof(W) == 1 ? cache.value_scales[slot] : 1;
        Vector row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) row[v] = load(values + v * LANES);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
            const Vector weight = fill(scores[q * score_stride + position] * scale);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) add_product(sums[q][v], weight, row[v]);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) out[q][v] = sums[q][v];
}

template <int Q, class W>
void attend_queries(const float* const* queries, const int64_t* starts, const int64_t* lengths, int64_t width,
                    const HeadCache& cache, int64_t value_stride, float scale, float softcap, float* scores,
                    int64_t score_stride, float* const* out) {
    int64_t longest = 0, begin = starts[0];
    for (int q = 0; q < Q; ++q) {
        longest = lengths[q] > longest ? lengths[q] : longest;
        begin = starts[q] < begin ? starts[q] : begin;
    }
    begin = begin / LANES * LANES;
    longest -= begin;  // counted from there
    const int64_t positions = round_up(longest, LANES);
    score<Q, W>(queries, width, begin, positions, cache, scale, scores, score_stride);
    float inverse[Q];
    for (int q = 0; q < Q; ++q)
        inverse[q] = soften(scores + q * score_stride, starts[q] - begin, lengths[q] - begin, positions, softcap);
    constexpr int V = PARTS == 1 || Q == 1 ? 4 : Q == 2 ? 2 : 1;  // sums that stay in registers
    for (int64_t column = 0; column < width; column += V * LANES) {
        float line[V * LANES];
        const auto write = [&](int q, const Vector* mixed, int vectors) {
            for (int v = 0; v < vectors; ++v) store(line + v * LANES, mixed[v] * fill(inverse[q]));
            for (int64_t i = column; i < width && i < column + vectors * LANES; ++i) out[q][i] = line[i - column];
        };
        if (column + V * LANES <= value_stride) {
            Vector mixed[Q][V];
            mix<Q, V, W>(scores, score_stride, begin, longest, column, cache, value_stride, mixed);
            for (int q = 0; q < Q; ++q) write(q, mixed[q], V);
            continue;
        }
        for (int64_t rest = column; rest < width; rest += LANES) {
            Vector mixed[Q][1];
            mix<Q, 1, W>(scores, score_stride, begin, longest, rest, cache, value_stride, mixed);
            for (int q = 0; q < Q; ++q) {
                store(line, mixed[q][0] * fill(inverse[q]));
                for (int64_t i = rest; i < width && i < rest + LANES; ++i) out[q][i] = line[i - rest];
            }
        }
    }
}

template <class W>
void attend_typed(const float* const* queries, const int64_t* starts, const int64_t* lengths, int64_t count,
                  int64_t width, const HeadCache& cache, int64_t value_stride, float scale, float softcap,
                  float* scores, int64_t score_stride, float* const* out) {
    static_assert(QUERIES == 4);
    const auto run = [&](auto attend_some) {
        attend_some(queries, starts, lengths, width, cache, value_stride, scale, softcap, scores, score_stride, out);
    };
    if (count == 4)
        run(attend_queries<4, W>);
    else if (count == 3)
        run(attend_queries<3, W>);
    else if (count == 2)
        run(attend_queries<2, W>);
    else
        run(attend_queries<1, W>);
}

void attend(const float* const* queries, const int64_t* starts, const int64_t* lengths, int64_t count, int64_t type,
            int64_t width, const HeadCache& cache, int64_t value_stride, float scale, float softcap, float* scores,
            int64_t score_stride, float* const* out) {
    const auto run = [&](auto attend_cached) {
        attend_cached(queries, starts, lengths, count, width, cache, value_stride, scale, softcap, scores, score_stride,
                      out);
    };
    if (type == FLOAT32)
        run(attend_typed<float>);
    else if (type == BFLOAT16)
        run(attend_typed<uint16_t>);
    else
        run(attend_typed<int8_t>);
}
