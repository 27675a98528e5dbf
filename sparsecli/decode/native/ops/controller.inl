// The controller's second factor and the choice of units. Part of all.inl, inside its namespaces.

// Logits of one block for T tokens, V vectors of units from `unit` on.
template <int T, int V>
inline void block_logits(const Matrix& w, int64_t block, int64_t width, int64_t rank, int64_t unit,
                         const Activations& z, int64_t token, float* logits) {
    const int64_t start = block * width * rank;
    if (w.type == INT8) {  // pairs of ranks: 16-bit products, summed exactly
        const int8_t* from = (const int8_t*)w.data + start + unit * 2;
        const int16_t* integers = z.integers + token * z.stride;
#if defined(SPARSECLI_AVX512)
        __m512i totals[T][V];
        for (auto& row : totals)
            for (__m512i& total : row) total = _mm512_setzero_si512();
        for (int64_t i = 0; i < rank; i += 2)
            for (int v = 0; v < V; ++v) {
                const __m256i narrow_pairs = _mm256_loadu_si256((const __m256i*)(from + i * width + v * 2 * LANES));
                const __m512i pairs = _mm512_cvtepi8_epi16(narrow_pairs);
                for (int t = 0; t < T; ++t)
                    totals[t][v] = add_pairs(totals[t][v], pairs, broadcast_four(integers + t * z.stride + i));
            }
#else
        int32_t totals[T][V][LANES] = {};
        for (int64_t i = 0; i < rank; i += 2)
            for (int v = 0; v < V; ++v)
                for (int t = 0; t < T; ++t)
                    for (int64_t u = 0; u < LANES; ++u) {
                        const int8_t* pair = from + i * width + 2 * (v * LANES + u);
                        totals[t][v][u] += int32_t(pair[0]) * integers[t * z.stride + i] +
                                           int32_t(pair[1]) * integers[t * z.stride + i + 1];
                    }
#endif
        for (int t = 0; t < T; ++t)
            for (int v = 0; v < V; ++v) {
                int32_t lanes[LANES];
                std::memcpy(lanes, &totals[t][v], sizeof lanes);
                Vector value;
                for (int p = 0; p < PARTS; ++p) {
                    Ints whole;
                    std::memcpy(&whole, lanes + p * WIDTH, sizeof whole);
                    value.part[p] = __builtin_convertvector(whole, Floats);
                }
                const Vector scale = load(w.scale + block * width + unit + v * LANES);
                store(logits + t * width + unit + v * LANES, value * (fill(z.scales[token + t]) * scale));
            }
        return;
    }
    Vector sums[T][V];
    for (auto& row : sums)
        for (Vector& s : row) s = fill(0);
    if (w.type == FLOAT32) {
        const float* from = (const float*)w.data + start + unit;
        for (int64_t i = 0; i < rank; ++i)
            for (int v = 0; v < V; ++v) {
                const Vector weights = load(from + i * width + v * LANES);
                for (int t = 0; t < T; ++t)
                    add_product(sums[t][v], fill(z.values[(token + t) * z.stride + i]), weights);
            }
    } else {
        const uint16_t* from = (const uint16_t*)w.data + start + unit * 2;
        for (int64_t i = 0; i < rank; i += 2)
            for (int v = 0; v < V; ++v) {
                Vector low, high;  // the even and the odd rank of every unit
                for (int p = 0; p < PARTS; ++p) {
                    Ints pairs;
                    std::memcpy(&pairs, from + i * width + (v * LANES + p * WIDTH) * 2, sizeof pairs);
                    low.part[p] = (Floats)(pairs << 16);
                    high.part[p] = (Floats)(pairs & int32_t(0xffff0000));
                }
                for (int t = 0; t < T; ++t) {
                    const float* values = z.values + (token + t) * z.stride + i;
                    add_product(sums[t][v], fill(values[0]), low);
                    add_product(sums[t][v], fill(values[1]), high);
                }
            }
    }
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < V; ++v) store(logits + t * width + unit + v * LANES, sums[t][v]);
}

template <int T>
inline void all_logits(const Matrix& w, int64_t block, int64_t width, int64_t rank, const Activations& z, int64_t token,
                       float* logits) {
    int64_t unit = 0;
    for (; unit + TILE_VECTORS * LANES <= width; unit += TILE_VECTORS * LANES)
        block_logits<T, TILE_VECTORS>(w, block, width, rank, unit, z, token, logits);
    for (; unit < width; unit += LANES) block_logits<T, 1>(w, block, width, rank, unit, z, token, logits);
}

// The first unit with the largest logit. A NaN never is; all NaN gives unit 0, which is at least a unit.
inline int64_t largest(const float* logits, int64_t width) {
    Vector top = fill(-INFINITY);
    for (int64_t u = 0; u < width; u += LANES) top = larger(load(logits + u), top);
    const float best = maximum(top);
    for (int64_t u = 0; u < width; u += LANES) {
#if defined(SPARSECLI_AVX512)
        const unsigned equal = _mm512_cmpeq_ps_mask(_mm512_loadu_ps(logits + u), _mm512_set1_ps(best));
        if (equal) return u + __builtin_ctz(equal);
#else
        for (int64_t i = u; i < u + LANES; ++i)
            if (logits[i] == best) return i;
#endif
    }
    return 0;
}

void choose(const Matrix& second, const float* bias, const Choice& choice, int64_t begin, int64_t end,
            const Activations& z, int64_t tokens, int32_t* units, float* probabilities, int64_t unit_stride,
            const Matrix& rows, int64_t parts) {
    const int64_t row_bytes = round_up(rows.cols, PAD) * type_bytes(rows.type);
    const int64_t width = choice.padded_block, size = choice.block_size, count = choice.units_per_block;
    float logits[TOKENS * MAX_BLOCK];
    for (int64_t block = begin; block < end; ++block) {
        for (int64_t t = 0; t < tokens;) {
            int64_t done = 1;
            if (t + TOKENS <= tokens) {
                all_logits<TOKENS>(second, block, width, choice.rank, z, t, logits);
                done = TOKENS;
            } else {
                all_logits<1>(second, block, width, choice.rank, z, t, logits);
            }
            for (int64_t row = 0; row < done; ++row, ++t) {
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
                    if (tokens == 1) fetch((const char*)rows.data + to[j] * parts * row_bytes, (parts - 1) * row_bytes);
                    if (weight) weight[j] = std::exp(of_token[best] - top) / total;
                    of_token[best] = -INFINITY;
                }
            }
        }
    }
}
