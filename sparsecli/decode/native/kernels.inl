// The kernels, written once and compiled once for each instruction set, which `SPARSECLI_AVX512` or
// `SPARSECLI_AVX2` names; with neither, plain C++ that any compiler vectorises for its target.
//
// Everything lives in an unnamed namespace, so that the linker never takes one set's code for another's.
#include "kernels.h"

namespace sparsecli {
namespace {

// -- sixteen floats ------------------------------------------------------------------------------------------

#if defined(SPARSECLI_AVX512)
constexpr int WIDTH = 16, TILE_ROWS = 4, TILE_VECTORS = 4, TOKENS = 4;
#elif defined(SPARSECLI_AVX2)
constexpr int WIDTH = 8, TILE_ROWS = 3, TILE_VECTORS = 2, TOKENS = 2;
#else
constexpr int WIDTH = 4, TILE_ROWS = 2, TILE_VECTORS = 1, TOKENS = 1;
#endif
constexpr int PARTS = LANES / WIDTH;

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));

struct Vector {
    Floats part[PARTS];
};

inline Floats broadcast(float value) { return value - Floats{}; }

inline Vector fill(float value) {
    Vector v;
    for (int p = 0; p < PARTS; ++p) v.part[p] = broadcast(value);
    return v;
}

inline Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, const Vector& v) { std::memcpy(to, &v, sizeof v); }

// sum + a * b, fused wherever the processor can.
inline void add_product(Vector& sum, const Vector& a, const Vector& b) {
    for (int p = 0; p < PARTS; ++p) {
#if defined(SPARSECLI_AVX512)
        sum.part[p] = (Floats)_mm512_fmadd_ps((__m512)a.part[p], (__m512)b.part[p], (__m512)sum.part[p]);
#elif defined(SPARSECLI_AVX2)
        sum.part[p] = (Floats)_mm256_fmadd_ps((__m256)a.part[p], (__m256)b.part[p], (__m256)sum.part[p]);
#else
        sum.part[p] += a.part[p] * b.part[p];
#endif
    }
}

inline Vector operator+(Vector a, const Vector& b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] += b.part[p];
    return a;
}

inline Vector operator-(Vector a, const Vector& b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] -= b.part[p];
    return a;
}

inline Vector operator*(Vector a, const Vector& b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] *= b.part[p];
    return a;
}

inline Vector operator/(Vector a, const Vector& b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] /= b.part[p];
    return a;
}

inline Vector larger(Vector a, const Vector& b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
    return a;
}

inline Vector magnitude(Vector a) {
    for (int p = 0; p < PARTS; ++p) a.part[p] = (Floats)((Ints)a.part[p] & 0x7fffffff);
    return a;
}

// The order is the same whatever the width: halves are folded onto each other.
inline float sum(const Vector& v) {
    float lane[LANES];
    store(lane, v);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

inline float maximum(const Vector& v) {
    float lane[LANES];
    store(lane, v);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// -- weights as floats ---------------------------------------------------------------------------------------

inline float to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);  // NaN stays NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);               // to nearest, ties to even
}

inline Vector load(const uint16_t* from) {
    Vector v;
#if defined(SPARSECLI_AVX512)
    v.part[0] = (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(SPARSECLI_AVX2)
    for (int p = 0; p < PARTS; ++p)
        v.part[p] = (Floats)_mm256_slli_epi32(
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + p * WIDTH))), 16);
#else
    float lane[LANES];
    for (int64_t i = 0; i < LANES; ++i) lane[i] = to_float(from[i]);
    v = load(lane);
#endif
    return v;
}

inline Vector load(const int8_t* from) {
    Vector v;
#if defined(SPARSECLI_AVX512)
    v.part[0] = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(SPARSECLI_AVX2)
    for (int p = 0; p < PARTS; ++p)
        v.part[p] = (Floats)_mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + p * WIDTH))));
#else
    float lane[LANES];
    for (int64_t i = 0; i < LANES; ++i) lane[i] = float(from[i]);
    v = load(lane);
#endif
    return v;
}

inline void store(uint16_t* to, const Vector& v) {
#if defined(SPARSECLI_AVX512)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v.part[0]);
    std::memcpy(to, &narrow, sizeof narrow);
#else
    float lane[LANES];
    store(lane, v);
    for (int64_t i = 0; i < LANES; ++i) to[i] = to_bfloat16(lane[i]);
#endif
}

void convert(const float* values, int64_t type, int64_t count, void* out) {
    if (type == FLOAT32) {
        std::memcpy(out, values, count * 4);
        return;
    }
    uint16_t* to = (uint16_t*)out;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(values + i));
    for (; i < count; ++i) to[i] = to_bfloat16(values[i]);
}

void widen(const void* values, const float* scale, int64_t type, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i)
        out[i] = type == FLOAT32    ? ((const float*)values)[i]
                 : type == BFLOAT16 ? to_float(((const uint16_t*)values)[i])
                                    : float(((const int8_t*)values)[i]) * *scale;
}

// -- exponentials --------------------------------------------------------------------------------------------

// e^x to about 2e-7, relative: 2^n p(r) with n = round(x / ln 2) and a polynomial for |r| <= ln 2 / 2.
inline Vector exponential(const Vector& x) {
    Vector result;
    for (int p = 0; p < PARTS; ++p) {
        Floats v = x.part[p];
        v = v < -87.3f ? broadcast(-87.3f) : v;
        v = v > 88.3f ? broadcast(88.3f) : v;
        const Floats scaled = v * 1.44269504f;
        const Ints n = __builtin_convertvector(scaled + (scaled < 0.0f ? broadcast(-0.5f) : broadcast(0.5f)), Ints);
        const Floats whole = __builtin_convertvector(n, Floats);
        const Floats r = (v - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two pieces
        Floats y = r * (1.0f / 5040) + 1.0f / 720;
        y = y * r + 1.0f / 120;
        y = y * r + 1.0f / 24;
        y = y * r + 1.0f / 6;
        y = y * r + 0.5f;
        y = y * r + 1.0f;
        y = y * r + 1.0f;
        result.part[p] = (Floats)((Ints)y + (n << 23));
    }
    return result;
}

// erf to about 2e-7 (Abramowitz and Stegun 7.1.26 has 1.5e-7), by its own exponential.
inline Vector error_function(const Vector& x) {
    const Vector size = magnitude(x);
    const Vector t = fill(1) / (fill(1) + fill(0.3275911f) * size);
    Vector y = fill(1.061405429f) * t + fill(-1.453152027f);
    y = y * t + fill(1.421413741f);
    y = y * t + fill(-0.284496736f);
    y = y * t + fill(0.254829592f);
    y = fill(1) - y * t * exponential(fill(0) - size * size);
    for (int p = 0; p < PARTS; ++p) y.part[p] = (Floats)((Ints)y.part[p] | ((Ints)x.part[p] & int32_t(0x80000000)));
    return y;
}

inline Vector activation_of(int64_t activation, const Vector& x) {
    if (activation == RELU) return larger(x, fill(0));
    if (activation == SILU) return x / (fill(1) + exponential(fill(0) - x));
    return fill(0.5f) * x * (fill(1) + error_function(x * fill(0.70710678f)));
}

inline float activation_of(int64_t activation, float x) {
    if (activation == RELU) return x > 0 ? x : 0;
    if (activation == SILU) return x / (1 + std::exp(-x));
    return 0.5f * x * (1 + std::erf(x * 0.70710678f));
}

void activate(int64_t activation, const float* gate, float* h, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(h + i, gate ? activation_of(activation, load(gate + i)) * load(h + i)
                          : activation_of(activation, load(h + i)));
    for (; i < count; ++i)
        h[i] = gate ? activation_of(activation, gate[i]) * h[i] : activation_of(activation, h[i]);
}

void normalize(const float* x, const float* weight, const float* bias, int64_t count, bool rms, double epsilon,
               float* out) {
    float mean = 0;
    const int64_t whole = count / LANES * LANES;
    if (!rms) {
        Vector total = fill(0);
        for (int64_t i = 0; i < whole; i += LANES) total = total + load(x + i);
        mean = sum(total);
        for (int64_t i = whole; i < count; ++i) mean += x[i];
        mean /= float(count);
    }
    Vector squares = fill(0);
    const Vector middle = fill(mean);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vector centred = load(x + i) - middle;
        add_product(squares, centred, centred);
    }
    float variance = sum(squares);
    for (int64_t i = whole; i < count; ++i) variance += (x[i] - mean) * (x[i] - mean);
    const float rate = 1 / std::sqrt(variance / float(count) + float(epsilon));
    const Vector rates = fill(rate);
    for (int64_t i = 0; i < whole; i += LANES) {
        Vector y = (load(x + i) - middle) * rates * load(weight + i);
        store(out + i, bias ? y + load(bias + i) : y);
    }
    for (int64_t i = whole; i < count; ++i) out[i] = (x[i] - mean) * rate * weight[i] + (bias ? bias[i] : 0);
}

constexpr float NOTHING = 1e-30f;  // a vector of such small numbers counts as zero: 1 / its scale would not be finite

// -- dot products --------------------------------------------------------------------------------------------


inline float largest_magnitude(const float* values, int64_t count) {
    Vector top = fill(0);
    for (int64_t i = 0; i < count; i += LANES) top = larger(top, magnitude(load(values + i)));
    return maximum(top);
}

float quantise(const float* values, int64_t count, int16_t* integers) {
    const float limit = largest_magnitude(values, count), inverse = limit > NOTHING ? 32767 / limit : 0;
    for (int64_t i = 0; i < count; i += LANES) {
#if defined(SPARSECLI_AVX512)
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(inverse)));
        _mm256_storeu_si256((__m256i*)(integers + i), _mm512_cvtepi32_epi16(whole));
#else
        for (int64_t j = i; j < i + LANES; ++j) integers[j] = int16_t(std::nearbyint(values[j] * inverse));
#endif
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

// 32-bit sums of products of 16-bit activations with 8-bit weights: exact, and so in any order.
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
            sums[r][0] = _mm512_dpwssd_epi32(sums[r][0], a, low);
            sums[r][1] = _mm512_dpwssd_epi32(sums[r][1], b, high);
        }
    }
    for (int r = 0; r < R; ++r) out[r] = float(_mm512_reduce_add_epi32(_mm512_add_epi32(sums[r][0], sums[r][1])));
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
        int32_t lane[8], all = 0;
        std::memcpy(lane, &sums, sizeof lane);
        for (int32_t value : lane) all += value;
        out[r] = float(all);
    }
#else
    for (int r = 0; r < R; ++r) {
        int32_t all = 0;
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
        const __m512bh low = (__m512bh)_mm512_loadu_si512(halves + i);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(halves + i + 32);
        const __m512bh low_rest = (__m512bh)_mm512_loadu_si512(halves + rest + i);
        const __m512bh high_rest = (__m512bh)_mm512_loadu_si512(halves + rest + i + 32);
        for (int r = 0; r < R; ++r) {
            if (FETCH) prefetch(next[r] + i), prefetch(next[r] + i + 32);
            const __m512bh a = (__m512bh)_mm512_loadu_si512(w[r] + i), b = (__m512bh)_mm512_loadu_si512(w[r] + i + 32);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, low);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], b, high);
            sums[r][2] = _mm512_dpbf16_ps(sums[r][2], a, low_rest);
            sums[r][3] = _mm512_dpbf16_ps(sums[r][3], b, high_rest);
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

// TOKENS tokens against two rows: every weight is widened once.
template <class W>
inline void dot_tile(const W* first, const W* second, const float* x, int64_t stride, int64_t count,
                     float (*out)[TOKENS]) {
    // The same four running sums as `dot` would need 32 registers; two rows of TOKENS tokens take one sum each.
    Vector sums[2][TOKENS];
    for (auto& row : sums)
        for (Vector& s : row) s = fill(0);
    for (int64_t i = 0; i < count; i += LANES) {
        const Vector a = load(first + i), b = load(second + i);
        for (int t = 0; t < TOKENS; ++t) {
            const Vector v = load(x + t * stride + i);
            add_product(sums[0][t], a, v);
            add_product(sums[1][t], b, v);
        }
    }
    for (int r = 0; r < 2; ++r)
        for (int t = 0; t < TOKENS; ++t) out[r][t] = sum(sums[r][t]);
}

// The columns of one span for TOKENS tokens at a time.
template <class W>
void dot_block(const W* data, int64_t width, int64_t begin, int64_t end, int64_t column, const Activations& x,
               int64_t tokens, float* out, int64_t out_stride) {
    for (int64_t row = begin; row < end; row += 2) {
        const int64_t second = row + 1 < end ? row + 1 : row;
        for (int64_t t = 0; t < tokens; t += TOKENS) {
            float result[2][TOKENS];
            dot_tile(data + row * width, data + second * width, x.values + t * x.stride + column, x.stride, width,
                     result);
            for (int64_t r = 0; r <= second - row; ++r)
                for (int u = 0; u < TOKENS; ++u) {
                    float& to = out[(t + u) * out_stride + row + r];
                    to = column ? to + result[r][u] : result[r][u];
                }
        }
    }
}

void dots(const Matrix& w, int64_t begin, int64_t end, const Activations& x, int64_t tokens, float* out,
          int64_t out_stride) {
    const int64_t stride = round_up(w.cols, PAD);
    const int64_t tiled = w.type == INT8 || TOKENS == 1 ? 0 : tokens / TOKENS * TOKENS;
    for (int64_t column = 0; column < stride; column += SPAN) {
        const int64_t width = column + SPAN < stride ? SPAN : stride - column;
        const void* span = (const char*)w.data + column * w.rows * type_bytes(w.type);
        if (tiled && w.type == FLOAT32)
            dot_block((const float*)span, width, begin, end, column, x, tiled, out, out_stride);
        if (tiled && w.type == BFLOAT16)
            dot_block((const uint16_t*)span, width, begin, end, column, x, tiled, out, out_stride);
        for (int64_t t = tiled; t < tokens; ++t)
            for (int64_t row = begin; row < end; ++row) {
                float part, &to = out[t * out_stride + row];
                products_of<1, false>(w.type, span, width, &row, nullptr, column, width, x, t, &part);
                if (w.type == INT8) part *= w.scale[row] * x.scales[t];
                to = column ? to + part : part;
            }
    }
}

// -- outer products: the multiplicative layer and the convolution ---------------------------------------------

// c[r][columns] += a[r] . panel, R rows by V vectors of columns; a row of `a` holds `inputs` values.
template <int R, int V>
inline void tile(const float* a, int64_t a_stride, const float* panel, int64_t width, int64_t inputs, float* c,
                 int64_t c_stride) {
    Vector sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = load(c + r * c_stride + v * LANES);
    for (int64_t i = 0; i < inputs; ++i) {
        Vector b[V];
        for (int v = 0; v < V; ++v) b[v] = load(panel + i * width + v * LANES);
        for (int r = 0; r < R; ++r) {
            const Vector scalar = fill(a[r * a_stride + i]);
            for (int v = 0; v < V; ++v) add_product(sums[r][v], scalar, b[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * c_stride + v * LANES, sums[r][v]);
}

// The same from pairs of bfloat16.
template <int R, int V>
inline void tile(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t width, int64_t inputs, float* c,
                 int64_t c_stride) {
#if defined(SPARSECLI_AVX512)
    __m512 sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_loadu_ps(c + r * c_stride + v * LANES);
    for (int64_t i = 0; i < inputs; i += 2) {
        __m512i b[V];
        for (int v = 0; v < V; ++v) b[v] = _mm512_loadu_si512(panel + i * width + v * 2 * LANES);
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            std::memcpy(&pair, a + r * a_stride + i, 4);
            const __m512bh scalar = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], scalar, (__m512bh)b[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * c_stride + v * LANES, sums[r][v]);
#else
    Vector sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = load(c + r * c_stride + v * LANES);
    for (int64_t i = 0; i < inputs; i += 2)
        for (int v = 0; v < V; ++v) {
            Vector low, high;
            for (int p = 0; p < PARTS; ++p) {
                Ints pairs;
                std::memcpy(&pairs, panel + i * width + (v * LANES + p * WIDTH) * 2, sizeof pairs);
                low.part[p] = (Floats)(pairs << 16);
                high.part[p] = (Floats)(pairs & int32_t(0xffff0000));
            }
            for (int r = 0; r < R; ++r) {
                add_product(sums[r][v], fill(to_float(a[r * a_stride + i])), low);
                add_product(sums[r][v], fill(to_float(a[r * a_stride + i + 1])), high);
            }
        }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * c_stride + v * LANES, sums[r][v]);
#endif
}

// Eight-bit products of one group of inputs; `a` is quantised with scale[r] and has row sums total[r]. Panels hold
// weights + 128, since the processor multiplies unsigned with signed bytes.
template <int R, int V>
inline void tile(const int8_t* a, int64_t a_stride, const float* a_scale, const int32_t* total, const uint8_t* panel,
                 int64_t width, int64_t inputs, const float* scale, float* c, int64_t c_stride) {
#if defined(SPARSECLI_AVX512)
    __m512i sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_set1_epi32(-128 * total[r]);
    for (int64_t i = 0; i < inputs; i += 4) {
        __m512i b[V];
        for (int v = 0; v < V; ++v) b[v] = _mm512_loadu_si512(panel + i * width + v * 4 * LANES);
        for (int r = 0; r < R; ++r) {
            int32_t quad;
            std::memcpy(&quad, a + r * a_stride + i, 4);
            const __m512i scalar = _mm512_set1_epi32(quad);
            for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], b[v], scalar);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            float* to = c + r * c_stride + v * LANES;
            const __m512 rate = _mm512_mul_ps(_mm512_set1_ps(a_scale[r]), _mm512_loadu_ps(scale + v * LANES));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), rate, _mm512_loadu_ps(to)));
        }
#else
    for (int v = 0; v < V; ++v)
        for (int p = 0; p < PARTS; ++p) {
            const int64_t column = v * LANES + p * WIDTH;
            Ints sums[R];
            for (int r = 0; r < R; ++r) sums[r] = Ints{} - 128 * total[r];
            for (int64_t i = 0; i < inputs; i += 4) {
                Ints quads;
                std::memcpy(&quads, panel + i * width + column * 4, sizeof quads);
                for (int k = 0; k < 4; ++k) {
                    const Ints weights = (quads >> (8 * k)) & 255;
                    for (int r = 0; r < R; ++r) sums[r] += weights * int32_t(a[r * a_stride + i + k]);
                }
            }
            for (int r = 0; r < R; ++r) {
                Floats rate, before;
                float* to = c + r * c_stride + column;
                std::memcpy(&rate, scale + column, sizeof rate);
                std::memcpy(&before, to, sizeof before);
                before += __builtin_convertvector(sums[r], Floats) * (rate * a_scale[r]);
                std::memcpy(to, &before, sizeof before);
            }
        }
#endif
}

// Cuts rows and columns into tiles and calls tile<R, V>(row, column) for each.
template <int R, int V, class F>
inline void cut(int64_t rows, int64_t vectors, int64_t row, int64_t vector, const F& call) {
    if constexpr (V > 1) {
        if (vector + V > vectors) return cut<R, V - 1>(rows, vectors, row, vector, call);
    }
    if constexpr (R > 1) {
        if (row + R > rows) return cut<R - 1, V>(rows, vectors, row, vector, call);
    }
    call.template operator()<R, V>(row, vector * LANES);
}

template <class F>
inline void tiles(int64_t rows, int64_t columns, const F& call) {
    const int64_t vectors = columns / LANES;
    for (int64_t v = 0; v < vectors; v += TILE_VECTORS)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            if (r < rows) cut<TILE_ROWS, TILE_VECTORS>(rows, vectors, r, v, call);
}

template <class W>
struct TileCall {
    const W* a;
    int64_t a_stride;
    const W* panel;
    int64_t width, inputs;
    float* c;
    int64_t c_stride;
    template <int R, int V>
    void operator()(int64_t row, int64_t column) const {
        constexpr int64_t pack = sizeof(W) == 4 ? 1 : 2;
        tile<R, V>(a + row * a_stride, a_stride, panel + column * pack, width, inputs, c + row * c_stride + column,
                   c_stride);
    }
};

struct IntegerTileCall {
    const int8_t* a;
    int64_t a_stride;
    const float* a_scale;
    const int32_t* total;
    const uint8_t* panel;
    int64_t width, inputs;
    const float* scale;
    float* c;
    int64_t c_stride;
    template <int R, int V>
    void operator()(int64_t row, int64_t column) const {
        tile<R, V>(a + row * a_stride, a_stride, a_scale + row, total + row, panel + column * 4, width, inputs,
                   scale + column, c + row * c_stride + column, c_stride);
    }
};

constexpr int64_t SCRATCH = 96 * 1024;  // bytes of products at a time: they stay in the second-level cache
constexpr int64_t MODULE_TILE = 64;     // modules at a time

// x[i] D[s, i] for inputs [begin, end) as the weights' type.
inline void products(const Matrix& D, int64_t module, const float* x, int64_t begin, int64_t count, float* out) {
    const int64_t at = module * round_up(D.cols, PAD) + begin;
    const float* v = x + begin;
    if (D.type == FLOAT32)
        for (int64_t i = 0; i < count; i += LANES) store(out + i, load(v + i) * load((const float*)D.data + at + i));
    else if (D.type == BFLOAT16)
        for (int64_t i = 0; i < count; i += LANES)
            store(out + i, load(v + i) * load((const uint16_t*)D.data + at + i));
    else
        for (int64_t i = 0; i < count; i += LANES) store(out + i, load(v + i) * load((const int8_t*)D.data + at + i));
}

// values * inverse as bytes; returns their sum.
inline int32_t narrow(const float* values, int64_t count, float inverse, int8_t* out) {
#if defined(SPARSECLI_AVX512)
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(inverse)));
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(whole));
        total = _mm512_add_epi32(total, whole);
    }
    return _mm512_reduce_add_epi32(total);
#else
    int32_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        out[i] = int8_t(std::nearbyint(values[i] * inverse));
        total += out[i];
    }
    return total;
#endif
}

void multiplicative(const Matrix& D, const Matrix& E, const float* bias, const float* x, int64_t module_begin,
                    int64_t module_end, int64_t panel_begin, int64_t panel_end, float* out, void* scratch) {
    const int64_t inputs = round_up(E.cols, PAD), width = E.rows, padded = round_up(width, LANES);
    const int64_t column_begin = panel_begin * PANEL;
    const int64_t column_end = panel_end * PANEL < padded ? panel_end * PANEL : padded;
    for (int64_t first = module_begin; first < module_end; first += MODULE_TILE) {
        const int64_t modules = first + MODULE_TILE < module_end ? MODULE_TILE : module_end - first;
        const int64_t bytes = type_bytes(E.type);
        int64_t chunk = SCRATCH / (modules * bytes) / GROUP * GROUP;
        chunk = chunk < GROUP ? GROUP : chunk > inputs ? inputs : chunk;
        const int64_t groups = round_up(chunk, GROUP) / GROUP;
        // scratch: products (modules, chunk); then their scales and totals [group][module]; then sums
        char* at = (char*)scratch;
        float* scales = (float*)(at + round_up(modules * chunk * bytes, 64));
        int32_t* totals = (int32_t*)(scales + groups * modules);
        float* sums = (float*)(totals + groups * modules);  // (modules, PANEL)
        for (int64_t column = column_begin; column < column_end; column += PANEL) {
            const int64_t columns = column + PANEL < padded ? PANEL : padded - column;
            const int64_t real = column + columns < width ? columns : width - column;
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t m = 0; m < real; ++m) {
                    const int64_t place = (first + s) * width + column + m;
                    out[place] = bias ? bias[place] : 0;
                }
        }
        for (int64_t start = 0; start < inputs; start += chunk) {
            const int64_t count = start + chunk < inputs ? chunk : inputs - start;
            float line[GROUP];
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t g = 0; g * GROUP < count; ++g) {
                    const int64_t size = count - g * GROUP < GROUP ? count - g * GROUP : GROUP;
                    const int64_t place = s * chunk + g * GROUP;
                    if (E.type == FLOAT32) {
                        products(D, first + s, x, start + g * GROUP, size, (float*)at + place);
                        continue;
                    }
                    products(D, first + s, x, start + g * GROUP, size, line);
                    if (E.type == BFLOAT16) {
                        convert(line, BFLOAT16, size, (uint16_t*)at + place);
                        continue;
                    }
                    const float limit = largest_magnitude(line, size);
                    totals[g * modules + s] = narrow(line, size, limit > NOTHING ? 127 / limit : 0, (int8_t*)at + place);
                    scales[g * modules + s] = limit / 127;
                }
            for (int64_t column = column_begin; column < column_end; column += PANEL) {
                const int64_t columns = column + PANEL < padded ? PANEL : padded - column;
                const int64_t real = column + columns < width ? columns : width - column;
                std::memset(sums, 0, size_t(modules * PANEL * 4));
                const int64_t panel = column * inputs;  // elements before this panel
                if (E.type == FLOAT32)
                    tiles(modules, columns,
                          TileCall<float>{(const float*)at, chunk, (const float*)E.data + panel + start * columns,
                                          columns, count, sums, PANEL});
                else if (E.type == BFLOAT16)
                    tiles(modules, columns,
                          TileCall<uint16_t>{(const uint16_t*)at, chunk,
                                             (const uint16_t*)E.data + panel + start * columns, columns, count, sums,
                                             PANEL});
                else
                    for (int64_t g = 0; g * GROUP < count; ++g) {
                        const int64_t size = count - g * GROUP < GROUP ? count - g * GROUP : GROUP;
                        tiles(modules, columns,
                              IntegerTileCall{(const int8_t*)at + g * GROUP, chunk, scales + g * modules,
                                              totals + g * modules,
                                              (const uint8_t*)E.data + panel + (start + g * GROUP) * columns, columns,
                                              size, E.scale + column, sums, PANEL});
                    }
                for (int64_t s = 0; s < modules; ++s) {
                    const float rate = D.type == INT8 ? D.scale[first + s] : 1;
                    float* to = out + (first + s) * width + column;
                    for (int64_t m = 0; m < real; ++m) to[m] += sums[s * PANEL + m] * rate;
                }
            }
        }
    }
}

void convolve(const Matrix& kernel, const float* bias, int64_t taps, const void* const* rows, int64_t stride,
              int64_t lead, int64_t begin, int64_t end, float* out) {
    // `kernel` has taps * inputs columns; each tap is a `panels` matrix of its own.
    const int64_t width = kernel.rows, padded = round_up(width, LANES);
    const int64_t inputs = round_up(kernel.cols / taps, 4);
    constexpr int64_t AT_ONCE = 16;
    float sums[AT_ONCE * PANEL];
    for (int64_t first = begin; first < end; first += AT_ONCE) {
        const int64_t modules = first + AT_ONCE < end ? AT_ONCE : end - first;
        for (int64_t column = 0; column < padded; column += PANEL) {
            const int64_t columns = column + PANEL < padded ? PANEL : padded - column;
            const int64_t real = column + columns < width ? columns : width - column;
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t c = 0; c < columns; ++c) sums[s * PANEL + c] = bias && c < real ? bias[column + c] : 0;
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t panel = tap * inputs * padded + column * inputs;
                const int64_t window = first * stride - lead;
                if (kernel.type == FLOAT32)
                    tiles(modules, columns,
                          TileCall<float>{(const float*)rows[tap] + window, stride, (const float*)kernel.data + panel,
                                          columns, inputs, sums, PANEL});
                else
                    tiles(modules, columns,
                          TileCall<uint16_t>{(const uint16_t*)rows[tap] + window, stride,
                                             (const uint16_t*)kernel.data + panel, columns, inputs, sums, PANEL});
            }
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t c = 0; c < real; ++c) out[(first + s) * width + column + c] = sums[s * PANEL + c];
        }
    }
}

// -- the controller ------------------------------------------------------------------------------------------

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
                for (int t = 0; t < T; ++t) {
                    int32_t pair;
                    std::memcpy(&pair, integers + t * z.stride + i, 4);
                    totals[t][v] = _mm512_dpwssd_epi32(totals[t][v], pairs, _mm512_set1_epi32(pair));
                }
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
inline void all_logits(const Matrix& w, int64_t block, int64_t width, int64_t rank, const Activations& z,
                       int64_t token, float* logits) {
    int64_t unit = 0;
    for (; unit + TILE_VECTORS * LANES <= width; unit += TILE_VECTORS * LANES)
        block_logits<T, TILE_VECTORS>(w, block, width, rank, unit, z, token, logits);
    for (; unit < width; unit += LANES) block_logits<T, 1>(w, block, width, rank, unit, z, token, logits);
}

// The first unit with the largest logit. A NaN never is; all NaN gives unit 0, which is at least a unit.
inline int64_t largest(const float* logits, int64_t width) {
    Vector top = load(logits);
    for (int64_t u = LANES; u < width; u += LANES) top = larger(load(logits + u), top);
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

// Into the second-level cache, which holds all rows that a thread's blocks choose.
inline void fetch_early(const char* row, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(row + line, 0, 2);
}

constexpr int64_t MAX_BLOCK = 4096;  // units; the engine refuses more

void choose(const Matrix& second, const float* bias, const Choice& choice, int64_t begin, int64_t end,
            const Activations& z, int64_t tokens, int32_t* units, float* probabilities, int64_t unit_stride,
            const Matrix& rows, int64_t parts) {
    const int64_t row_bytes = round_up(rows.cols, PAD) * type_bytes(rows.type);
    const int64_t width = choice.padded_block, size = choice.block_size, count = choice.units_per_block;
    const int64_t block_bytes = width * choice.rank * type_bytes(second.type);
    float logits[TOKENS * MAX_BLOCK];
    for (int64_t block = begin; block < end; ++block) {
        if (block + 1 < end) {
            const char* next = (const char*)second.data + (block + 1) * block_bytes;
            for (int64_t line = 0; line < block_bytes; line += 64) prefetch(next + line);
        }
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
                    if (tokens == 1)
                        fetch_early((const char*)rows.data + to[j] * parts * row_bytes, (parts - 1) * row_bytes);
                    if (weight) weight[j] = std::exp(of_token[best] - top) / total;
                    of_token[best] = -INFINITY;
                }
            }
        }
    }
}

// -- chosen units --------------------------------------------------------------------------------------------

inline void prefetch_row(const char* row, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) prefetch(row + line);
}

// As many 16-bit products of 8-bit weights as fit into 32 bits, whatever the sum.
constexpr int64_t LONGEST = 4096;

template <int R>
inline void whole_rows(const Matrix& w, const int64_t* row, const int64_t* next, const Activations& x, float* out) {
    const int64_t stride = round_up(w.cols, PAD);
    for (int64_t column = 0; column < stride; column += LONGEST) {
        float part[R];
        products_of<R, true>(w.type, (const char*)w.data + column * type_bytes(w.type), stride, row, next, column,
                             column + LONGEST < stride ? LONGEST : stride - column, x, 0, part);
        for (int r = 0; r < R; ++r) out[r] = column ? out[r] + part[r] : part[r];
    }
    for (int r = 0; w.type == INT8 && r < R; ++r) out[r] *= w.scale[row[r]] * x.scales[0];
}

void unit_dots(const Matrix& units, int64_t parts, int64_t activation, const float* unit_bias, const int32_t* chosen,
               int64_t begin, int64_t end, const Activations& x, float* h) {
    const int64_t stride = round_up(units.cols, PAD);
    const int64_t inward = parts - 1;  // rows that meet x: gate and up, or up alone
    constexpr int64_t AT_ONCE = 4, DISTANCE = 4;  // units that are computed together, and that are in flight
    const int64_t bytes = stride * type_bytes(units.type);
    for (int64_t i = begin; i < end && i < begin + DISTANCE; ++i)
        prefetch_row((const char*)units.data + chosen[i] * parts * bytes, inward * bytes);
    const auto finish = [&](int64_t i, float gate, float up) {
        if (unit_bias) gate += unit_bias[chosen[i]];
        h[i] = activation_of(activation, gate) * (inward == 2 ? up : 1);
    };
    for (int64_t i = begin; i < end;) {
        int64_t row[AT_ONCE], next[AT_ONCE];
        const int64_t together = i + AT_ONCE <= end ? AT_ONCE : 1;
        for (int64_t j = 0; j < together; ++j) {
            row[j] = int64_t(chosen[i + j]) * parts;
            next[j] = i + j + DISTANCE < end ? int64_t(chosen[i + j + DISTANCE]) * parts : row[j];
        }
        float first[AT_ONCE], second[AT_ONCE] = {};
        for (int64_t k = 0; k < inward; ++k) {
            if (together == AT_ONCE)
                whole_rows<AT_ONCE>(units, row, next, x, k ? second : first);
            else
                whole_rows<1>(units, row, next, x, k ? second : first);
            for (int64_t j = 0; j < together; ++j) ++row[j], ++next[j];
        }
        for (int64_t j = 0; j < together; ++j) finish(i + j, first[j], second[j]);
        i += together;
    }
}

// y += sum of R rows, each times its factor.
template <int R, class W>
inline void add_rows(const W* const* rows, const float* factor, const W* const* next, int64_t begin, int64_t end,
                     float* y) {
    int64_t c = begin;
    Vector factors[R];
    for (int r = 0; r < R; ++r) factors[r] = fill(factor[r]);
    for (; c + LANES <= end; c += LANES) {
        if (c * sizeof(W) % 64 == 0)
            for (int r = 0; r < R; ++r) prefetch(next[r] + c);
        Vector total = load(y + c);
        for (int r = 0; r < R; ++r) add_product(total, factors[r], load(rows[r] + c));
        store(y + c, total);
    }
    if (c == end) return;
    float lane[LANES];  // the last columns of a width that is no multiple of LANES; rows are padded, y is not
    Vector total = fill(0);
    for (int64_t i = c; i < end; ++i) lane[i - c] = y[i];
    std::memcpy(&total, lane, size_t(end - c) * 4);
    for (int r = 0; r < R; ++r) add_product(total, factors[r], load(rows[r] + c));
    store(lane, total);
    for (int64_t i = c; i < end; ++i) y[i] = lane[i - c];
}

template <class W>
void sum_units(const Matrix& units, int64_t parts, const int32_t* chosen, const float* h, int64_t count,
               int64_t begin, int64_t end, float* y) {
    constexpr int64_t AT_ONCE = 4;
    const int64_t stride = round_up(units.cols, PAD);
    const W* data = (const W*)units.data;
    const W* rows[AT_ONCE];
    float factor[AT_ONCE];
    int64_t place = 0;
    const auto gather = [&](const W** to, float* weight) {
        int64_t found = 0;
        for (; place < count && found < AT_ONCE; ++place) {
            if (h[place] == 0) continue;
            const int64_t row = int64_t(chosen[place]) * parts + parts - 1;
            to[found] = data + row * stride;
            weight[found] = h[place] * (units.scale ? units.scale[row] : 1);
            ++found;
        }
        return found;
    };
    int64_t found = gather(rows, factor);
    for (int64_t r = 0; r < found; ++r)
        prefetch_row((const char*)(rows[r] + begin), (end - begin) * int64_t(sizeof(W)));
    while (found) {
        const W* next[AT_ONCE];
        float next_factor[AT_ONCE];
        const int64_t following = gather(next, next_factor);
        for (int64_t r = following; r < AT_ONCE; ++r) next[r] = rows[0];
        if (found == 4)
            add_rows<4>(rows, factor, next, begin, end, y);
        else if (found == 3)
            add_rows<3>(rows, factor, next, begin, end, y);
        else if (found == 2)
            add_rows<2>(rows, factor, next, begin, end, y);
        else
            add_rows<1>(rows, factor, next, begin, end, y);
        found = following;
        std::memcpy(rows, next, sizeof rows);
        std::memcpy(factor, next_factor, sizeof factor);
    }
}

void unit_sums(const Matrix& units, int64_t parts, const int32_t* chosen, const float* h, int64_t count,
               int64_t begin, int64_t end, float* y) {
    if (units.type == FLOAT32)
        sum_units<float>(units, parts, chosen, h, count, begin, end, y);
    else if (units.type == BFLOAT16)
        sum_units<uint16_t>(units, parts, chosen, h, count, begin, end, y);
    else
        sum_units<int8_t>(units, parts, chosen, h, count, begin, end, y);
}

// -- attention -----------------------------------------------------------------------------------------------

inline void append_bytes(const float* values, int64_t width, int64_t step, int8_t* to, float* scale) {
    float limit = 0;
    for (int64_t i = 0; i < width; ++i) limit = std::fabs(values[i]) > limit ? std::fabs(values[i]) : limit;
    const float inverse = limit > NOTHING ? 127 / limit : 0;
    for (int64_t i = 0; i < width; ++i) to[i * step] = int8_t(std::nearbyint(values[i] * inverse));
    *scale = limit / 127;
}

void append(const float* key, const float* value, int64_t type, int64_t width, int64_t position,
            const HeadCache& cache, int64_t value_stride) {
    const int64_t at = position / LANES * width * LANES + position % LANES;
    const int64_t row = position * value_stride;
    if (type == INT8) {
        append_bytes(key, width, LANES, (int8_t*)cache.keys + at, (float*)cache.key_scales + position);
        append_bytes(value, width, 1, (int8_t*)cache.values + row, (float*)cache.value_scales + position);
    } else if (type == BFLOAT16) {
        for (int64_t i = 0; i < width; ++i) ((uint16_t*)cache.keys)[at + i * LANES] = to_bfloat16(key[i]);
        convert(value, BFLOAT16, width, (uint16_t*)cache.values + row);
    } else {
        for (int64_t i = 0; i < width; ++i) ((float*)cache.keys)[at + i * LANES] = key[i];
        std::memcpy((float*)cache.values + row, value, size_t(width) * 4);
    }
}

template <int Q, class W>
inline void score(const float* const* queries, int64_t width, int64_t positions, const HeadCache& cache, float rate,
                  float* scores, int64_t score_stride) {
    for (int64_t position = 0; position < positions; position += LANES) {
        const W* keys = (const W*)cache.keys + position * width;
        Vector sums[Q][2];
        for (auto& row : sums) row[0] = row[1] = fill(0);
        int64_t i = 0;
        for (; i + 2 <= width; i += 2) {
            prefetch(keys + i * LANES + width * LANES);
            const Vector even = load(keys + i * LANES), odd = load(keys + (i + 1) * LANES);
            for (int q = 0; q < Q; ++q) {
                add_product(sums[q][0], fill(queries[q][i]), even);
                add_product(sums[q][1], fill(queries[q][i + 1]), odd);
            }
        }
        for (; i < width; ++i)
            for (int q = 0; q < Q; ++q) add_product(sums[q][0], fill(queries[q][i]), load(keys + i * LANES));
        Vector rates = fill(rate);
        if (sizeof(W) == 1) rates = rates * load(cache.key_scales + position);
        for (int q = 0; q < Q; ++q) store(scores + q * score_stride + position, (sums[q][0] + sums[q][1]) * rates);
    }
}

// Scores of positions < length become unnormalised probabilities, zeros up to `positions`; returns 1 / their sum.
inline float soften(float* scores, int64_t length, int64_t positions) {
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
    for (int64_t i = length; i < positions; ++i) total.part[(i % LANES) / WIDTH][i % WIDTH] -= scores[i], scores[i] = 0;
    return 1 / sum(total);
}

template <int Q, int V, class W>
inline void mix(const float* scores, int64_t score_stride, int64_t positions, int64_t column,
                const HeadCache& cache, int64_t value_stride, Vector (*out)[V]) {
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) out[q][v] = fill(0);
    const W* values = (const W*)cache.values + column;
    for (int64_t position = 0; position < positions; ++position, values += value_stride) {
        prefetch(values + 16 * value_stride);
        const float scale = sizeof(W) == 1 ? cache.value_scales[position] : 1;
        Vector row[V];
        for (int v = 0; v < V; ++v) row[v] = load(values + v * LANES);
        for (int q = 0; q < Q; ++q) {
            const Vector weight = fill(scores[q * score_stride + position] * scale);
            for (int v = 0; v < V; ++v) add_product(out[q][v], weight, row[v]);
        }
    }
}

template <int Q, class W>
void attend_queries(const float* const* queries, const int64_t* lengths, int64_t width, const HeadCache& cache,
                    int64_t value_stride, float rate, float* scores, int64_t score_stride, float* const* out) {
    int64_t longest = 0;
    for (int q = 0; q < Q; ++q) longest = lengths[q] > longest ? lengths[q] : longest;
    const int64_t positions = round_up(longest, LANES);
    score<Q, W>(queries, width, positions, cache, rate, scores, score_stride);
    float inverse[Q];
    for (int q = 0; q < Q; ++q) inverse[q] = soften(scores + q * score_stride, lengths[q], positions);
    constexpr int V = TILE_VECTORS;
    for (int64_t column = 0; column < width; column += V * LANES) {
        float line[V * LANES];
        const auto write = [&](int q, const Vector* mixed, int vectors) {
            for (int v = 0; v < vectors; ++v) store(line + v * LANES, mixed[v] * fill(inverse[q]));
            for (int64_t i = column; i < width && i < column + vectors * LANES; ++i) out[q][i] = line[i - column];
        };
        if (column + V * LANES <= value_stride) {
            Vector mixed[Q][V];
            mix<Q, V, W>(scores, score_stride, longest, column, cache, value_stride, mixed);
            for (int q = 0; q < Q; ++q) write(q, mixed[q], V);
            continue;
        }
        for (int64_t rest = column; rest < width; rest += LANES) {
            Vector mixed[Q][1];
            mix<Q, 1, W>(scores, score_stride, longest, rest, cache, value_stride, mixed);
            for (int q = 0; q < Q; ++q) {
                store(line, mixed[q][0] * fill(inverse[q]));
                for (int64_t i = rest; i < width && i < rest + LANES; ++i) out[q][i] = line[i - rest];
            }
        }
    }
}

template <class W>
void attend_typed(const float* const* queries, const int64_t* lengths, int64_t count, int64_t width,
                  const HeadCache& cache, int64_t value_stride, float rate, float* scores, int64_t score_stride,
                  float* const* out) {
    static_assert(QUERIES == 4);
    if (count == 4)
        attend_queries<4, W>(queries, lengths, width, cache, value_stride, rate, scores, score_stride, out);
    else if (count == 3)
        attend_queries<3, W>(queries, lengths, width, cache, value_stride, rate, scores, score_stride, out);
    else if (count == 2)
        attend_queries<2, W>(queries, lengths, width, cache, value_stride, rate, scores, score_stride, out);
    else
        attend_queries<1, W>(queries, lengths, width, cache, value_stride, rate, scores, score_stride, out);
}

void attend(const float* const* queries, const int64_t* lengths, int64_t count, int64_t type, int64_t width,
            const HeadCache& cache, int64_t value_stride, float rate, float* scores, int64_t score_stride,
            float* const* out) {
    if (type == FLOAT32)
        attend_typed<float>(queries, lengths, count, width, cache, value_stride, rate, scores, score_stride, out);
    else if (type == BFLOAT16)
        attend_typed<uint16_t>(queries, lengths, count, width, cache, value_stride, rate, scores, score_stride, out);
    else
        attend_typed<int8_t>(queries, lengths, count, width, cache, value_stride, rate, scores, score_stride, out);
}

constexpr Kernels make_table(const char* name) {
    return {name,     SPLITS,    quantise, split,          dots,     multiplicative, convolve, choose, unit_dots, unit_sums,
            activate, normalize, convert,  widen,          append,   attend};
}

}  // namespace
}  // namespace sparsecli
