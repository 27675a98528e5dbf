// Products of weight rows with activations. Part of all.inl, inside its namespaces.

// -- quantised activations -----------------------------------------------------------------------------------

inline float largest_magnitude(const float* values, int64_t count) {
    Vector top = fill(0);
    for (int64_t i = 0; i < count; i += LANES) top = larger(top, magnitude(load(values + i)));
    return maximum(top);
}

float quantise(const float* values, int64_t count, int16_t* integers, int32_t* sums) {
    const float limit = largest_magnitude(values, count);
    const Floats inverse = broadcast(limit > NOTHING ? float(LARGEST) / limit : 0);
    typedef int16_t Narrow __attribute__((vector_size(WIDTH * 2)));
    typedef int16_t NarrowAt __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
    for (int64_t group = 0; group < count; group += QUANT_GROUP) {
        Ints total = Ints{};
#pragma GCC unroll 4
        for (int64_t i = group; i < group + QUANT_GROUP; i += WIDTH) {
            const Ints whole = rounded(floats_of(values + i), inverse);
            total += whole;
            *(NarrowAt*)(integers + i) = __builtin_convertvector(whole, Narrow);
        }
        arrange(integers + group, QUANT_GROUP);
        if (sums) sums[group / QUANT_GROUP] = sum(total);
    }
    return limit / float(LARGEST);
}

// -- dot products --------------------------------------------------------------------------------------------

// How weights W are multiplied, STEP at a time, and summed: floats with floats; 8-bit integers with 16-bit ones,
// exactly, in 32-bit lanes that cannot overflow within LONGEST products.
template <class W>
struct Dot {
    using Input = float;
    using Sum = Floats;
    static constexpr int64_t STEP = WIDTH;
#if defined(SPARSECLI_AVX512) || defined(SPARSECLI_NEON)
    static constexpr int ROWS = 4, TOKENS = 6;  // of a tile, whose sums stay in registers
#elif defined(SPARSECLI_AVX2)
    static constexpr int ROWS = 3, TOKENS = 4;
#else
    static constexpr int ROWS = 2, TOKENS = 4;
#endif
    static Floats weights(const W* from) { return floats_of(from); }
    static Floats input(const float* from) { return floats_of(from); }
    static Floats add(Floats total, Floats w, Floats x) { return fused(total, w, x); }
    static Floats floats(Floats total) { return total; }
    static const float* inputs(const Activations& x, int64_t token) { return x.values + token * x.stride; }
};

template <>
struct Dot<int8_t> {
    using Input = int16_t;
    using Sum = Sums;
    static constexpr int64_t STEP = INTEGERS;
#if defined(SPARSECLI_DOTPROD)
    static constexpr int ROWS = 4, TOKENS = 3;
#elif defined(SPARSECLI_NEON) || (defined(SPARSECLI_AVX512) && defined(SPARSECLI_VNNI))
    static constexpr int ROWS = 4, TOKENS = 6;
#elif defined(SPARSECLI_AVX512)
    static constexpr int ROWS = 4, TOKENS = 4;
#else
    static constexpr int ROWS = 2, TOKENS = 4;
#endif
    static auto weights(const int8_t* from) { return weights_of(from); }
    static Integers input(const int16_t* from) { return integers_of(from); }
    static Sum add(const Sum& total, decltype(weights_of(nullptr)) w, const Integers& x) {
        return add_products(total, w, x);
    }
    static Floats floats(const Sum& total) { return __builtin_convertvector(total_of(total), Floats); }
    static const int16_t* inputs(const Activations& x, int64_t token) { return x.integers + token * x.stride; }
};

// As many products of 8-bit weights as fit into the lanes, whatever their sum.
constexpr int64_t LONGEST = 512 * WIDTH;
static_assert(LONGEST / WIDTH * LARGEST * 127 < int64_t(1) << 31);
static_assert(SPAN <= LONGEST);

constexpr int DOT_ROWS = 4;  // of a product with few tokens: what is loaded of the vectors serves them all

// What is asked for while R rows are read: nothing, R rows that lie elsewhere, or what follows in memory. Several rows
// that are read side by side look to the processor like as many streams, which memory serves at half its speed: so
// memory is prefetched in the order of its addresses.
enum Prefetch { NOTHING_AHEAD, ROWS_AHEAD, STREAM_AHEAD };

// Of STREAM_AHEAD: bytes to what is asked for. Where rows are read several times, each reading asks for a share of it:
// it then arrives as evenly as products are computed.
struct Stream {
    int64_t distance = STREAM_DISTANCE, reading = 0, readings = 1;
};

// out[t][r] = w[r] . x[t]. Every product has its own running sum, so that a result does not depend on the rows and
// tokens that it is computed together with. `next` are the R rows of ROWS_AHEAD.
template <int R, int T, Prefetch AHEAD, class W>
inline void dot(const W* const* w, const typename Dot<W>::Input* x, int64_t x_stride, int64_t count,
                const W* const* next, float (*out)[R], const Stream& stream = {}) {
    using D = Dot<W>;
    typename D::Sum sums[T][R];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[t][r] = typename D::Sum{};
    int64_t skipped = stream.reading;
    for (int64_t at = 0; at < count; at += PAD) {
        constexpr int64_t LINE = 64 / int64_t(sizeof(W));
        for (int r = 0; AHEAD == ROWS_AHEAD && r < R; ++r)
            for (int64_t line = 0; line < PAD; line += LINE) prefetch_line(next[r] + at + line);
        if (AHEAD == STREAM_AHEAD && skipped-- == 0) {
            for (int64_t line = 0; line < R * PAD; line += LINE)
                __builtin_prefetch((const char*)(w[0] + R * at + line) + stream.distance, 0, 2);
            skipped = stream.readings - 1;
        }
#pragma GCC unroll 2
        for (int64_t i = at; i < at + PAD; i += D::STEP) {
            decltype(D::weights(w[0])) weights[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) weights[r] = D::weights(w[r] + i);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const auto input = D::input(x + t * x_stride + i);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sums[t][r] = D::add(sums[t][r], weights[r], input);
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        Floats floats[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) floats[r] = D::floats(sums[t][r]);
        sum_each<R>(floats, out[t]);
    }
}

// A span of `width` columns of all rows from `column` on, rows [begin, end), with T tokens from `token` on.
template <int T, class W>
inline void span_matmul(const Matrix& w, const W* span, int64_t width, int64_t column, int64_t begin, int64_t end,
                        const Activations& x, int64_t token, const Stream& stream, float* out, int64_t out_stride) {
    using D = Dot<W>;
    constexpr int R = T == D::TOKENS ? D::ROWS : DOT_ROWS;
    const auto* inputs = D::inputs(x, token) + column;
    const auto rows = [&]<int N>(int64_t row) {
        const W* from[N];
#pragma GCC unroll 8
        for (int r = 0; r < N; ++r) from[r] = span + (row + r) * width;
        float part[T][N];
        dot<N, T, STREAM_AHEAD>(from, inputs, x.stride, width, from, part, stream);
        for (int t = 0; t < T; ++t) {
            float* to = out + (token + t) * out_stride + row;
            for (int r = 0; r < N; ++r) {
                const float scale = sizeof(W) == 1 ? w.scale[row + r] * x.scales[token + t] : 1.0f;
                to[r] = column ? fused(to[r], part[t][r], scale) : part[t][r] * scale;
            }
        }
    };
    int64_t row = begin;
    for (; row + R <= end; row += R) rows.template operator()<R>(row);
    for (; row < end; ++row) rows.template operator()<1>(row);
}

// The at most T tokens that are left over by tiles.
template <int T, class W>
inline void rest_matmul(const Matrix& w, const W* span, int64_t width, int64_t column, int64_t begin, int64_t end,
                        const Activations& x, int64_t token, int64_t tokens, const Stream& stream, float* out,
                        int64_t out_stride) {
    if (tokens - token == T)
        return span_matmul<T, W>(w, span, width, column, begin, end, x, token, stream, out, out_stride);
    if constexpr (T > 1)
        rest_matmul<T - 1, W>(w, span, width, column, begin, end, x, token, tokens, stream, out, out_stride);
}

template <class W>
void typed_matmul(const Matrix& w, int64_t begin, int64_t end, const Activations& x, int64_t tokens, float* out,
                  int64_t out_stride) {
    constexpr int TOKENS = Dot<W>::TOKENS;
    const int64_t stride = round_up(w.cols, PAD);
    const int64_t step = tokens == 1 ? end - begin : 64;  // rows that stay cached for all tokens
    for (int64_t column = 0; column < stride; column += SPAN) {
        const int64_t width = column + SPAN < stride ? SPAN : stride - column;
        const W* span = (const W*)w.data + column * w.rows;
        Stream stream;
        stream.readings = (tokens + TOKENS - 1) / TOKENS;
        if (stream.readings > 1) stream.distance = step * width * int64_t(sizeof(W));  // the next rows
        for (int64_t first = begin; first < end; first += step) {
            const int64_t last = first + step < end ? first + step : end;
            int64_t t = 0;
            for (; t + TOKENS <= tokens; t += TOKENS) {
                stream.reading = t / TOKENS;
                span_matmul<TOKENS, W>(w, span, width, column, first, last, x, t, stream, out, out_stride);
            }
            stream.reading = t / TOKENS;
            rest_matmul<TOKENS - 1, W>(w, span, width, column, first, last, x, t, tokens, stream, out, out_stride);
        }
    }
}

void matmul(const Matrix& w, int64_t begin, int64_t end, const Activations& x, int64_t tokens, float* out,
            int64_t out_stride) {
    if (begin >= end) return;
    switch (w.type) {
        case FLOAT32:
            return typed_matmul<float>(w, begin, end, x, tokens, out, out_stride);
        case BFLOAT16:
            return typed_matmul<uint16_t>(w, begin, end, x, tokens, out, out_stride);
        case FLOAT16:
            return typed_matmul<Half>(w, begin, end, x, tokens, out, out_stride);
        case INT8:
            return typed_matmul<int8_t>(w, begin, end, x, tokens, out, out_stride);
        case INT4:
            return quantized_matmul<4>(w, begin, end, x, tokens, out, out_stride);
        case INT3:
            return quantized_matmul<3>(w, begin, end, x, tokens, out, out_stride);
    }
    with_gguf_type(w.type, [&]<int64_t TYPE>() { gguf_matmul<TYPE>(w, begin, end, x, tokens, out, out_stride); });
}
