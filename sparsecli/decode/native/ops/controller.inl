// The controller's second factor and the choice of units. Part of all.inl, inside its namespaces.

// RANKS ranks of WIDTH units (with four ranks of twice as many), and their sums.
#if defined(SPARSECLI_DOTPROD)  // two pairs side by side are a quad; the last pair may be alone
constexpr int64_t RANKS = 4;
using RankSums = Sums;
struct Ranks {
    Ints units[2];
};

inline Ranks ranks_of(const int8_t* from, int64_t next, bool half) {
    const int16x8_t a = (int16x8_t)(*(const IntsAt*)from),
                    b = half ? int16x8_t{} : (int16x8_t)(*(const IntsAt*)(from + next));
    return {(Ints)vzip1q_s16(a, b), (Ints)vzip2q_s16(a, b)};
}

inline void add_ranks(Sums* totals, const Ranks& ranks, const int16_t* integers, int64_t rank) {
    const int8_t* x = (const int8_t*)(integers + rank / INTEGERS * INTEGERS) + rank % INTEGERS;
    const Ints low = pair_everywhere(x), high = pair_everywhere(x + INTEGERS);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        totals[i].low = add_signed_quads(totals[i].low, ranks.units[i], low);
        totals[i].high = add_signed_quads(totals[i].high, ranks.units[i], high);
    }
}

inline Ints units_of(const Sums& sums) { return total_of(sums); }
#else
constexpr int64_t RANKS = 2;
inline Shorts ranks_of(const int8_t* from, int64_t, bool) { return shorts_of(from); }
#if defined(SPARSECLI_NEON)
struct RankSums {  // products of the first and of the last four numbers, before neighbours are added
    Ints first, last;
};

inline void add_ranks(RankSums* total, Shorts ranks, const int16_t* integers, int64_t rank) {
    const int16x8_t w = (int16x8_t)ranks, x = (int16x8_t)pair_everywhere(integers + rank);
    total->first = (Ints)vmlal_s16((int32x4_t)total->first, vget_low_s16(w), vget_low_s16(x));
    total->last = (Ints)vmlal_high_s16((int32x4_t)total->last, w, x);
}

inline Ints units_of(const RankSums& sums) { return (Ints)vpaddq_s32((int32x4_t)sums.first, (int32x4_t)sums.last); }
#else
using RankSums = Ints;
inline void add_ranks(Ints* total, Shorts ranks, const int16_t* integers, int64_t rank) {
    *total = add_pairs(*total, ranks, (Shorts)pair_everywhere(integers + rank));
}
inline Ints units_of(Ints sums) { return sums; }
#endif
#endif

// Logits of one block for T tokens, V vectors of units from `unit` on.
template <int T, int V>
inline void block_logits(const Matrix& w, int64_t block, int64_t width, int64_t rank, int64_t unit,
                         const Activations& z, int64_t token, float* logits) {
    const int64_t start = block * width * rank;
    if (w.type == INT8) {  // 16-bit products, summed exactly
        const int8_t* from = (const int8_t*)w.data + start + unit * 2;
        constexpr int N = V * PARTS;
        RankSums totals[T][N];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) totals[t][n] = RankSums{};
        for (int64_t i = 0; i < rank; i += RANKS) {
            const bool half = i + 2 >= rank;
#pragma GCC unroll 16
            for (int n = 0; n < N; n += RANKS / 2) {
                const auto ranks = ranks_of(from + i * width + 2 * WIDTH * n, 2 * width, half);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) add_ranks(totals[t] + n, ranks, z.integers + (token + t) * z.stride, i);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) {
                const Floats scale = floats_of(w.scale + block * width + unit + n * WIDTH) * z.scales[token + t];
                *(FloatsAt*)(logits + t * width + unit + n * WIDTH) =
                    __builtin_convertvector(units_of(totals[t][n]), Floats) * scale;
            }
        return;
    }
    Vector sums[T][V];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[t][v] = fill(0);
    if (w.type == FLOAT32) {
        const float* from = (const float*)w.data + start + unit;
        for (int64_t i = 0; i < rank; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                const Vector weights = load(from + i * width + v * LANES);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t)
                    add_product(sums[t][v], fill(z.values[(token + t) * z.stride + i]), weights);
            }
    } else {
        const uint16_t* from = (const uint16_t*)w.data + start + unit * 2;
        for (int64_t i = 0; i < rank; i += 2)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                Vector even, odd;  // ranks of every unit
                load_pairs(from + i * width + v * LANES * 2, even, odd);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    const float* values = z.values + (token + t) * z.stride + i;
                    add_product(sums[t][v], fill(values[0]), even);
                    add_product(sums[t][v], fill(values[1]), odd);
                }
            }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(logits + t * width + unit + v * LANES, sums[t][v]);
}

// Tokens that share one reading of a block.
#if defined(SPARSECLI_AVX512)
constexpr int CHOOSING_TOKENS = 4;
#else
constexpr int CHOOSING_TOKENS = 2;
#endif

// Logits of one block for T tokens, or for the `tokens` that are left.
template <int T>
inline void all_logits(const Matrix& w, int64_t block, int64_t width, int64_t rank, const Activations& z, int64_t token,
                       int64_t tokens, float* logits) {
    if constexpr (T > 1)
        if (tokens < T) return all_logits<T - 1>(w, block, width, rank, z, token, tokens, logits);
#if defined(SPARSECLI_AVX512)
    constexpr int V = 4;  // sums that stay in registers
#elif defined(SPARSECLI_NEON)
    constexpr int V = T == 1 ? 2 : 1;
#else
    constexpr int V = T == 1 ? 4 : 2;
#endif
    int64_t unit = 0;
    for (; unit + V * LANES <= width; unit += V * LANES)
        block_logits<T, V>(w, block, width, rank, unit, z, token, logits);
    for (; unit < width; unit += LANES) block_logits<T, 1>(w, block, width, rank, unit, z, token, logits);
}

// The first unit with the largest logit. NaN is never the largest; if all are NaN, unit 0.
inline int64_t largest(const float* logits, int64_t width) {
    Vector top = fill(-INFINITY);
    for (int64_t u = 0; u < width; u += LANES) top = larger(load(logits + u), top);
    const float best = maximum(top);
    for (int64_t u = 0; u < width; u += LANES) {
#if defined(SPARSECLI_AVX512)
        const unsigned equal = _mm512_cmpeq_ps_mask(_mm512_loadu_ps(logits + u), _mm512_set1_ps(best));
        if (equal) return u + __builtin_ctz(equal);
#elif defined(SPARSECLI_AVX2)
        const auto equal_in = [&](int64_t at) {
            return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(logits + at), _mm256_set1_ps(best), 0)));
        };
        const unsigned equal = equal_in(u) | equal_in(u + WIDTH) << WIDTH;
        if (equal) return u + __builtin_ctz(equal);
#elif defined(SPARSECLI_NEON)
        const Floats target = broadcast(best);
        const auto equal_in = [&](int part) { return (int32x4_t)(floats_of(logits + u + part * WIDTH) == target); };
        const int16x8_t low = vcombine_s16(vmovn_s32(equal_in(0)), vmovn_s32(equal_in(1)));
        const int16x8_t high = vcombine_s16(vmovn_s32(equal_in(2)), vmovn_s32(equal_in(3)));
        // four bits a lane
        const uint8x8_t bits = vshrn_n_u16((uint16x8_t)vcombine_s8(vmovn_s16(low), vmovn_s16(high)), 4);
        const uint64_t equal = vget_lane_u64(vreinterpret_u64_u8(bits), 0);
        if (equal) return u + __builtin_ctzll(equal) / 4;
#else
        for (int64_t i = u; i < u + LANES; ++i)
            if (logits[i] == best) return i;
#endif
    }
    return 0;
}

void choose(const Matrix& second, const float* bias, const Choice& choice, int64_t begin, int64_t end,
            const Activations& z, int64_t tokens, int32_t* units, float* probabilities, int64_t unit_stride,
            const Matrix& rows, int64_t parts, bool far) {
    const int64_t row_bytes = round_up(rows.cols, PAD) * type_bytes(rows.type);
    const int64_t width = choice.padded_block, size = choice.block_size, count = choice.units_per_block;
    // Beside each reading of a block a share of the next one arrives, as whole cache lines.
    const int64_t block_bytes = width * choice.rank * type_bytes(second.type);
    const int64_t share = tokens > 1 ? round_up(block_bytes * CHOOSING_TOKENS / tokens, 64) : 0;
    float logits[CHOOSING_TOKENS * MAX_BLOCK];
    for (int64_t block = begin; block < end; ++block) {
        int64_t asked = block + 1 < end ? 0 : block_bytes;
        for (int64_t t = 0; t < tokens;) {
            const int64_t together = tokens - t < CHOOSING_TOKENS ? tokens - t : CHOOSING_TOKENS;
            const int64_t more = asked + share < block_bytes ? share : block_bytes - asked;
            prefetch((const char*)second.data + (block + 1) * block_bytes + asked, share ? more : 0);
            asked += more;
            all_logits<CHOOSING_TOKENS>(second, block, width, choice.rank, z, t, together, logits);
            for (int64_t row = 0; row < together; ++row, ++t) {
                float* of_token = logits + row * width;
                for (int64_t u = 0; u < width; u += LANES)  // the bias of padding is minus infinity
                    store(of_token + u, load(of_token + u) + load(bias + block * width + u));
                float total = 0;
                int32_t* to = units + t * unit_stride + block * count;
                float* weight = probabilities ? probabilities + t * unit_stride + block * count : nullptr;
                const float top = probabilities ? of_token[largest(of_token, width)] : 0;
                if (probabilities)
                    for (int64_t u = 0; u < size; ++u) total += std::exp(of_token[u] - top);
                for (int64_t j = 0; j < count; ++j) {
                    int64_t best = largest(of_token, width);
                    if (best >= size) best = 0;
                    to[j] = int32_t(block * size + best);
                    if (far) prefetch((const char*)rows.data + to[j] * parts * row_bytes, (parts - 1) * row_bytes);
                    if (weight) weight[j] = std::exp(of_token[best] - top) / total;
                    of_token[best] = -INFINITY;
                }
            }
        }
    }
}
