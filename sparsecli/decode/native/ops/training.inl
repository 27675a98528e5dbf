// What training Sparse FF computes: products and sums of gathered rows, small matrix products, noise, softmax and slopes
// of activations. Part of all.inl, inside its namespaces.
//
// Rows are SLICE columns of longer ones, side by side. Each sum adds its products one by one in the order in which they
// are given, and goes on from what is in memory: results do not depend on how a sum is cut into calls.

void gather_dots(const Gathered& g, const float* x, bool add, float* out) {
    for (int64_t r = 0; r < g.rows; ++r, x += SLICE)
        for (int64_t i = g.begin[r]; i < g.end[r];) {
            constexpr int R = 4;  // of a list's last ones some are computed twice
            const int64_t count = g.end[r] - i < R ? g.end[r] - i : R;
            const float* from[R];
#pragma GCC unroll 4
            for (int j = 0; j < R; ++j) from[j] = g.sources + (g.index[j < count ? i + j : i] - g.first) * SLICE;
            Vector sums[R];
#pragma GCC unroll 4
            for (int j = 0; j < R; ++j) sums[j] = fill(0);
#pragma GCC unroll 2
            for (int64_t c = 0; c < SLICE; c += LANES) {
                const Vector inputs = load(x + c);
#pragma GCC unroll 4
                for (int j = 0; j < R; ++j) add_product(sums[j], inputs, load(from[j] + c));
            }
            Floats folded[R];
#pragma GCC unroll 4
            for (int j = 0; j < R; ++j) {
                folded[j] = sums[j].part[0];
#pragma GCC unroll 4
                for (int p = 1; p < PARTS; ++p) folded[j] += sums[j].part[p];
            }
            float dots[R];
            sum_each<R>(folded, dots);
            for (int64_t j = 0; j < count; ++j) out[i + j] = add ? out[i + j] + dots[j] : dots[j];
            i += count;
        }
}

// V vectors of a sum at a time, which stay in registers.
template <int V>
inline void sum_rows(const float* sources, const int32_t* index, const float* factor, int64_t first, int64_t begin,
                     int64_t end, float* y) {
    Vector sums[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[v] = load(y + v * LANES);
    for (int64_t i = begin; i < end; ++i) {
        const float* from = sources + (index[i] - first) * SLICE;
        const Vector f = fill(factor[i]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) add_product(sums[v], f, load(from + v * LANES));
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(y + v * LANES, sums[v]);
}

void gather_sums(const Gathered& g, const float* factor, float* y) {
#if defined(SPARSECLI_AVX512)
    constexpr int V = SLICE / LANES;
#else
    constexpr int V = 4;
#endif
    for (int64_t r = 0; r < g.rows; ++r, y += SLICE) {
        if (g.begin[r] == g.end[r]) continue;
        for (int64_t c = 0; c < SLICE; c += V * LANES)
            sum_rows<V>(g.sources + c, g.index, factor, g.first, g.begin[r], g.end[r], y + c);
    }
}

// M rows and V vectors of a product.
template <int M, int V>
inline void product_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t width, int64_t count,
                         float* c) {
    Vector sums[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[m][v] = load(c + m * width + v * LANES);
    for (int64_t i = 0; i < count; ++i, a += a_step, b += width) {
        Vector right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) right[v] = load(b + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Vector left = fill(a[m * a_row]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) add_product(sums[m][v], left, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(c + m * width + v * LANES, sums[m][v]);
}

void add_matrix_product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t count, int64_t rows,
                        int64_t width, float* c) {
    int64_t column = 0;
    // M rows and N vectors whose sums stay in registers: with fewer sums, each would wait for its last product.
    const auto columns = [&]<int M, int N>() {
        int64_t row = 0;
        for (; row + M <= rows; row += M)
            product_tile<M, N>(a + row * a_row, a_row, a_step, b + column, width, count, c + row * width + column);
        for (; row < rows; ++row)
            product_tile<1, N>(a + row * a_row, a_row, a_step, b + column, width, count, c + row * width + column);
        column += N * LANES;
    };
#if defined(SPARSECLI_AVX512)
    while (column + 4 * LANES <= width) columns.template operator()<4, 4>();
    while (column + 2 * LANES <= width) columns.template operator()<8, 2>();
    while (column < width) columns.template operator()<8, 1>();
#else
    while (column < width) columns.template operator()<4, 1>();
#endif
}

// ln x of positive normal numbers to about 2e-7, relative: x = 2^n (1 + f) with 1 + f from sqrt(1/2) to sqrt(2), and a
// polynomial of f that is exact to the last bits near 0 (Cephes' logf). It divides nothing, which would take longest.
inline Floats logarithm(Floats x) {
    constexpr float SERIES[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
    const Ints bits = (Ints)x - 0x3f3504f3;  // sqrt(1/2)
    const Ints n = bits >> 23;
    const Floats f = (Floats)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, square = f * f;
    const Floats whole = __builtin_convertvector(n, Floats);
    Floats series = broadcast(7.0376836292e-2f);
#pragma GCC unroll 8
    for (const float factor : SERIES) series = fused(broadcast(factor), series, f);
    // ln (1 + f) = f - f^2 / 2 + f^3 series; ln 2 in two parts, the first of few bits
    const Floats small = fused(whole * -2.12194440e-4f, square * f, series) - 0.5f * square;
    return fused(small + f, whole, broadcast(0.693359375f));
}

void add_gumbel_noise(float temperature, uint64_t seed, int64_t first, int64_t count, float* scores) {
    typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
    Words number;
    for (int i = 0; i < WIDTH; ++i) number[i] = uint32_t(first) + uint32_t(i);
    number += uint32_t(seed);
    for (int64_t i = 0; i < count; i += WIDTH, number += uint32_t(WIDTH)) {
        Words x = number;
        x = (x ^ x >> 16) * 0x7feb352du;
        x = (x ^ x >> 15 ^ uint32_t(seed >> 32)) * 0x846ca68bu;
        x ^= x >> 16;
        Floats u = __builtin_convertvector((Ints)(x >> 8), Floats) * (1.0f / (1 << 24));
        u = u < 1e-6f ? broadcast(1e-6f) : u;
        u = u > 1 - 1e-6f ? broadcast(1 - 1e-6f) : u;
        *(FloatsAt*)(scores + i) = floats_of(scores + i) - temperature * logarithm(-logarithm(u));
    }
}

void choose_largest(float* scores, int64_t width, int64_t count, int32_t* chosen) {
    for (int64_t j = 0; j < count; ++j) {
        chosen[j] = int32_t(largest(scores, width));
        scores[chosen[j]] = -INFINITY;
    }
}

void softmax(float* z, int64_t width) {
    Vector top = fill(-INFINITY), total = fill(0);
    for (int64_t i = 0; i < width; i += LANES) top = larger(load(z + i), top);
    const Vector most = fill(maximum(top));
    for (int64_t i = 0; i < width; i += LANES) {
        const Vector e = exponential(load(z + i) - most);
        total = total + e;
        store(z + i, e);
    }
    const Vector inverse = fill(1 / sum(total));
    for (int64_t i = 0; i < width; i += LANES) store(z + i, load(z + i) * inverse);
}

void softmax_gradient(float* z, int64_t width, const int32_t* chosen, const float* gradient, int64_t count) {
    softmax(z, width);
    float total = 0;
    for (int64_t j = 0; j < count; ++j) total += gradient[j] * z[chosen[j]];
    // Chosen units are all different; what they get is added to -total times their probability.
    const Vector factor = fill(-total);
    float own[MAX_BLOCK];
    for (int64_t j = 0; j < count; ++j) own[j] = z[chosen[j]] * (gradient[j] - total);
    for (int64_t i = 0; i < width; i += LANES) store(z + i, load(z + i) * factor);
    for (int64_t j = 0; j < count; ++j) z[chosen[j]] = own[j];
}

// An activation of x and its slope there.
inline void activation_and_slope(int64_t activation, const Vector& x, Vector& value, Vector& slope) {
    value = activation_of(activation, x);
    if (activation == RELU) {
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) slope.part[p] = x.part[p] > 0.0f ? broadcast(1) : broadcast(0);
        return;
    }
    if (activation == GELU) {  // x Phi(x): Phi(x) + x phi(x)
        const Vector density = fill(0.39894228f) * exponential(fill(-0.5f) * x * x);
        slope = fill(0.5f) * (fill(1) + error_function(x * fill(0.70710678f))) + x * density;
        return;
    }
    // x sigmoid(u): sigmoid(u) (1 + x (1 - sigmoid(u)) u')
    const Vector square = x * x;
    const bool tanh = activation == GELU_TANH;
    const Vector u = tanh ? x * fill(1.59576912f) * (fill(1) + fill(0.044715f) * square) : x;
    const Vector rise = tanh ? fill(1.59576912f) * (fill(1) + fill(3 * 0.044715f) * square) : fill(1);
    const Vector share = fill(1) / (fill(1) + exponential(fill(0) - u));
    slope = share * (fill(1) + x * (fill(1) - share) * rise);
}

void activation_slopes(int64_t activation, const float* x, int64_t count, float* values, float* slopes) {
    for (int64_t i = 0; i < count; i += LANES) {
        Vector value, slope;
        if (i + LANES <= count) {
            activation_and_slope(activation, load(x + i), value, slope);
            store(values + i, value);
            store(slopes + i, slope);
            continue;
        }
        float last[3][LANES] = {};
        for (int64_t j = i; j < count; ++j) last[0][j - i] = x[j];
        activation_and_slope(activation, load(last[0]), value, slope);
        store(last[1], value);
        store(last[2], slope);
        for (int64_t j = i; j < count; ++j) values[j] = last[1][j - i], slopes[j] = last[2][j - i];
    }
}
