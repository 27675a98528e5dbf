// Rows of weights with vectors.
// Part of all.inl, inside its namespaces.

// -- dot products --------------------------------------------------------------------------------------------

inline float largest_magnitude(const float* values, int64_t count) {
    Vector top = fill(0);
    for (int64_t i = 0; i < count; i += LANES) top = larger(top, magnitude(load(values + i)));
    return maximum(top);
}

float quantise(const float* values, int64_t count, int16_t* integers, int32_t* sums) {
    const float limit = largest_magnitude(values, count), inverse = limit > NOTHING ? 32767 / limit : 0;
    for (int64_t i = 0; i < count; i += LANES) {
#if defined(SPARSECLI_AVX512)
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(inverse)));
        _mm256_storeu_si256((__m256i*)(integers + i), _mm512_cvtepi32_epi16(whole));
#else
        for (int64_t j = i; j < i + LANES; ++j) integers[j] = int16_t(std::nearbyint(values[j] * inverse));
#endif
    }
    for (int64_t group = 0; sums && group < count / LOW_BIT_GROUP; ++group) {
        int32_t sum = 0;
        for (int64_t i = 0; i < LOW_BIT_GROUP; ++i) sum += integers[group * LOW_BIT_GROUP + i];
        sums[group] = sum;
    }
    return limit / 32767;
}

void split(const float* values, int64_t count, uint16_t* halves) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Vector v = load(values + i);
        store(halves + i, v);
        store(halves + count + i, v - load(halves + i));
    }
}

// R rows with one vector: what is loaded of the vector serves them all. Where `next` rows are given they are fetched
// meanwhile; a stream of rows needs no such help.

#if defined(SPARSECLI_AVX512)
inline float sum(__m512i lanes) {  // each may be nearly full
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(lanes, 1));
    return float(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
}
#endif

// Integer sums of products of 16-bit activations with 8-bit weights: exact, and so in any order. Lanes have 32 bits,
// which LONGEST products fill at most.
template <int R, bool FETCH>
inline void dot(const int8_t* const* w, const int16_t* x, int64_t count, const int8_t* const* next, float* out) {
#if defined(SPARSECLI_AVX512)
    __m512i sums[R][2];
    for (auto& pair : sums) pair[0] = pair[1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += PAD) {
        const __m512i low = _mm512_loadu_si512(x + i), high = _mm512_loadu_si512(x + i + 32);
        for (int r = 0; r < R; ++r) {
            if (FETCH) prefetch(next[r] + i);
            const __m512i a = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w[r] + i)));
            const __m512i b = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w[r] + i + 32)));
            sums[r][0] = add_pairs(sums[r][0], a, low);
            sums[r][1] = add_pairs(sums[r][1], b, high);
        }
    }
    for (int r = 0; r < R; ++r) out[r] = sum(_mm512_add_epi32(sums[r][0], sums[r][1]));
#elif defined(SPARSECLI_AVX2)
    for (int r = 0; r < R; ++r) {
        __m256i sums = _mm256_setzero_si256();
        for (int64_t i = 0; i < count; i += PAD) {
            if (FETCH) prefetch(next[r] + i);
            for (int64_t j = i; j < i + PAD; j += 16) {
                const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w[r] + j)));
                const __m256i pairs = _mm256_madd_epi16(wide, _mm256_loadu_si256((const __m256i*)(x + j)));
                sums = _mm256_add_epi32(sums, pairs);
            }
        }
        int32_t lane[8];
        int64_t all = 0;
        std::memcpy(lane, &sums, sizeof lane);
        for (int32_t value : lane) all += value;
        out[r] = float(all);
    }
#else
    for (int r = 0; r < R; ++r) {
        int64_t all = 0;
        for (int64_t i = 0; i < count; ++i) all += int32_t(w[r][i]) * int32_t(x[i]);
        out[r] = float(all);
    }
    (void)next;
#endif
}

template <int R, bool FETCH, class W>
inline void dot(const W* const* w, const float* x, int64_t count, const W* const* next, float* out) {
    Vector sums[R][4];
    for (auto& row : sums)
        for (Vector& s : row) s = fill(0);
    for (int64_t i = 0; i < count; i += PAD) {
        for (int r = 0; FETCH && r < R; ++r)
            for (int64_t line = 0; line < PAD; line += 64 / int64_t(sizeof(W))) prefetch(next[r] + i + line);
        for (int64_t j = 0; j < 4; ++j) {
            const Vector v = load(x + i + j * LANES);
            for (int r = 0; r < R; ++r) add_product(sums[r][j], load(w[r] + i + j * LANES), v);
        }
    }
    for (int r = 0; r < R; ++r) out[r] = sum((sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]));
}

#if defined(SPARSECLI_AVX512)
constexpr bool SPLITS = true;

// The processor multiplies pairs of bfloat16: exactly what the roundings give, plus what they left over.
template <int R, bool FETCH>
inline void split_dot(const uint16_t* const* w, const uint16_t* halves, int64_t rest, int64_t count,
                      const uint16_t* const* next, float* out) {
    __m512 sums[R][4];
    for (auto& row : sums)
        for (__m512& s : row) s = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += PAD) {
        const __m512i low = _mm512_loadu_si512(halves + i), high = _mm512_loadu_si512(halves + i + 32);
        const __m512i low_rest = _mm512_loadu_si512(halves + rest + i);
        const __m512i high_rest = _mm512_loadu_si512(halves + rest + i + 32);
        for (int r = 0; r < R; ++r) {
            if (FETCH) prefetch(next[r] + i), prefetch(next[r] + i + 32);
            const __m512i a = _mm512_loadu_si512(w[r] + i), b = _mm512_loadu_si512(w[r] + i + 32);
            sums[r][0] = add_pairs(sums[r][0], a, low);
            sums[r][1] = add_pairs(sums[r][1], b, high);
            sums[r][2] = add_pairs(sums[r][2], a, low_rest);
            sums[r][3] = add_pairs(sums[r][3], b, high_rest);
        }
    }
    for (int r = 0; r < R; ++r)
        out[r] = _mm512_reduce_add_ps(
            _mm512_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]), _mm512_add_ps(sums[r][2], sums[r][3])));
}
#else
constexpr bool SPLITS = false;
#endif

// `count` columns of R rows, `stride` apart from `first` on, with columns from `begin` on of one token's activations in
// whichever form the weights need.
template <int R, bool FETCH>
inline void products_of(int64_t type, const void* first, int64_t stride, const int64_t* row, const int64_t* next,
                        int64_t begin, int64_t count, const Activations& x, int64_t token, float* out) {
    const auto pointers = [&](auto kind, auto& rows, auto& nexts) {
        for (int r = 0; r < R; ++r) {
            rows[r] = (const decltype(kind)*)first + row[r] * stride;
            nexts[r] = FETCH ? (const decltype(kind)*)first + next[r] * stride : nullptr;
        }
    };
    const int64_t at = token * x.stride + begin;
    if (type == FLOAT32) {
        const float *rows[R], *nexts[R];
        pointers(float(), rows, nexts);
        dot<R, FETCH>(rows, x.values + at, count, nexts, out);
    } else if (type == BFLOAT16) {
        const uint16_t *rows[R], *nexts[R];
        pointers(uint16_t(), rows, nexts);
#if defined(SPARSECLI_AVX512)
        split_dot<R, FETCH>(rows, x.halves + token * x.stride + at, x.stride, count, nexts, out);
#else
        dot<R, FETCH>(rows, x.values + at, count, nexts, out);
#endif
    } else {
        const int8_t *rows[R], *nexts[R];
        pointers(int8_t(), rows, nexts);
        dot<R, FETCH>(rows, x.integers + at, count, nexts, out);
    }
}

// Sums over the lanes of R vectors. Four are added up as the columns of one matrix, which takes a third of the steps.
#if defined(SPARSECLI_AVX512)
template <int R>
inline void sum_each(const __m512* v, float* out) {
    if constexpr (R == 4) {
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        const __m512 low = _mm512_shuffle_ps(a, b, 0x44), high = _mm512_shuffle_ps(a, b, 0xee);
        const __m512 all = _mm512_add_ps(low, high);  // four times the four vectors
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    } else {
        for (int r = 0; r < R; ++r) out[r] = _mm512_reduce_add_ps(v[r]);
    }
}

// The sum of four lanes fits into 32 bits, that of more may not.
static_assert(4 * SPAN / LANES * 32767 * 127 < int64_t(1) << 31);
template <int R>
inline void sum_each(const __m512i* v, float* out) {
    if constexpr (R == 4) {
        const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
        const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
        const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        const __m512i wide = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(all)),
                                              _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(all, 1)));
        const __m256i half = _mm256_add_epi64(_mm512_castsi512_si256(wide), _mm512_extracti64x4_epi64(wide, 1));
        _mm_storeu_ps(out, _mm256_cvtepi64_ps(half));
    } else {
        for (int r = 0; r < R; ++r) out[r] = sum(v[r]);
    }
}
#endif

template <int R>
inline void sum_each(const Vector* v, float* out) {
#if defined(SPARSECLI_AVX512)
    sum_each<R>((const __m512*)v, out);
#else
    for (int r = 0; r < R; ++r) out[r] = sum(v[r]);
#endif
}

// R rows with TOKENS tokens, one running sum for each pair: what is loaded of a row serves all tokens.
template <int R, class W>
inline void dot_tile(const W* const* w, const float* x, int64_t x_stride, int64_t count, float (*out)[R]) {
    Vector sums[TOKENS][R];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[t][r] = fill(0);
    for (int64_t i = 0; i < count; i += LANES) {
        Vector weights[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) weights[r] = load(w[r] + i);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const Vector v = load(x + t * x_stride + i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) add_product(sums[t][r], weights[r], v);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sum_each<R>(sums[t], out[t]);
}

#if defined(SPARSECLI_AVX512)
// The same from pairs of bfloat16, see `split_dot`.
template <int R>
inline void split_tile(const uint16_t* const* w, const uint16_t* halves, int64_t x_stride, int64_t count,
                       float (*out)[R]) {
    __m512 sums[TOKENS][R];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[t][r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 2 * LANES) {
        __m512i weights[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) weights[r] = _mm512_loadu_si512(w[r] + i);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const __m512i whole = _mm512_loadu_si512(halves + 2 * t * x_stride + i);
            const __m512i rest = _mm512_loadu_si512(halves + (2 * t + 1) * x_stride + i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                sums[t][r] = add_pairs(add_pairs(sums[t][r], weights[r], whole), weights[r], rest);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sum_each<R>(sums[t], out[t]);
}

// The same from 8-bit weights and 16-bit activations.
template <int R>
inline void integer_tile(const int8_t* const* w, const int16_t* x, int64_t x_stride, int64_t count, float (*out)[R]) {
    __m512i sums[TOKENS][R];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[t][r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 2 * LANES) {
        __m512i weights[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) weights[r] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w[r] + i)));
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const __m512i v = _mm512_loadu_si512(x + t * x_stride + i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[t][r] = add_pairs(sums[t][r], weights[r], v);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sum_each<R>(sums[t], out[t]);
}
#endif

// Products of rows [row, row + R) of a span with TOKENS tokens, without scales.
template <int R>
inline void tile_of(int64_t type, const void* span, int64_t width, int64_t row, const Activations& x, int64_t token,
                    int64_t column, float (*out)[R]) {
    const int64_t at = token * x.stride + column;
    const auto rows_of = [&](auto kind, auto& rows) {
        for (int r = 0; r < R; ++r) rows[r] = (const decltype(kind)*)span + (row + r) * width;
    };
    if (type == FLOAT32) {
        const float* rows[R];
        rows_of(float(), rows);
        dot_tile<R>(rows, x.values + at, x.stride, width, out);
    } else if (type == BFLOAT16) {
        const uint16_t* rows[R];
        rows_of(uint16_t(), rows);
#if defined(SPARSECLI_AVX512)
        split_tile<R>(rows, x.halves + token * x.stride + at, x.stride, width, out);
#else
        dot_tile<R>(rows, x.values + at, x.stride, width, out);
#endif
    } else {
        const int8_t* rows[R];
        rows_of(int8_t(), rows);
#if defined(SPARSECLI_AVX512)
        integer_tile<R>(rows, x.integers + at, x.stride, width, out);
#else
        for (int r = 0; r < R; ++r)
            for (int64_t t = 0; t < TOKENS; ++t)
                dot<1, false>(rows + r, x.integers + t * x.stride + at, width, rows + r, &out[t][r]);
#endif
    }
}

void matmul(const Matrix& w, int64_t begin, int64_t end, const Activations& x, int64_t tokens, float* out,
            int64_t out_stride) {
    if (w.type == INT4) return low_bit_matmul<4>(w, begin, end, x, tokens, out, out_stride);
    if (w.type == INT3) return low_bit_matmul<3>(w, begin, end, x, tokens, out, out_stride);
    constexpr int R = DOT_ROWS;
    constexpr int64_t ROWS_AT_ONCE = 64;  // that stay cached while all tokens meet them
    const int64_t stride = round_up(w.cols, PAD), tiled = TOKENS > 1 ? tokens / TOKENS * TOKENS : 0;
    for (int64_t column = 0; column < stride; column += SPAN) {
        const int64_t width = column + SPAN < stride ? SPAN : stride - column;
        const void* span = (const char*)w.data + column * w.rows * type_bytes(w.type);
        // One token's products with N rows from `row` on.
        const auto add = [&]<int N>(int64_t row, int64_t t, float (&part)[N]) {
            float* to = out + t * out_stride + row;
            if (w.type == INT8)
                for (int r = 0; r < N; ++r) part[r] *= w.scale[row + r] * x.scales[t];
            for (int r = 0; r < N; ++r) to[r] = column ? to[r] + part[r] : part[r];
        };
        for (int64_t first = begin; first < end; first += ROWS_AT_ONCE) {
            const int64_t last = first + ROWS_AT_ONCE < end ? first + ROWS_AT_ONCE : end;
            for (int64_t t = 0; t < tiled; t += TOKENS) {
                float part[TOKENS][R], rest[TOKENS][1];
                int64_t row = first;
                for (; row + R <= last; row += R) {
                    tile_of<R>(w.type, span, width, row, x, t, column, part);
                    for (int u = 0; u < TOKENS; ++u) add(row, t + u, part[u]);
                }
                for (; row < last; ++row) {
                    tile_of<1>(w.type, span, width, row, x, t, column, rest);
                    for (int u = 0; u < TOKENS; ++u) add(row, t + u, rest[u]);
                }
            }
            for (int64_t row = first; row < last; ++row)
                for (int64_t t = tiled; t < tokens; ++t) {
                    float part[1];
                    products_of<1, false>(w.type, span, width, &row, nullptr, column, width, x, t, part);
                    add(row, t, part);
                }
        }
    }
}
