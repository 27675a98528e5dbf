// Sixteen floats, weights as floats, and exponentials: what the ops are written in.
// Part of all.inl, inside its namespaces.

// -- sixteen floats ------------------------------------------------------------------------------------------

#if defined(SPARSECLI_AVX512)
constexpr int WIDTH = 16, TILE_ROWS = 4, TILE_VECTORS = 4, TOKENS = 4, DOT_ROWS = 4, LOW_BIT_TOKENS = 8;
#elif defined(SPARSECLI_AVX2)
constexpr int WIDTH = 8, TILE_ROWS = 3, TILE_VECTORS = 2, TOKENS = 2, DOT_ROWS = 2, LOW_BIT_TOKENS = 4;
#else
constexpr int WIDTH = 4, TILE_ROWS = 2, TILE_VECTORS = 1, TOKENS = 1, DOT_ROWS = 1, LOW_BIT_TOKENS = 4;
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
#if defined(SPARSECLI_AVX512)
    return _mm512_reduce_add_ps((__m512)v.part[0]);
#else
    float lane[LANES];
    store(lane, v);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
#endif
}

inline float maximum(const Vector& v) {
#if defined(SPARSECLI_AVX512)
    return _mm512_reduce_max_ps((__m512)v.part[0]);
#else
    float lane[LANES];
    store(lane, v);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
#endif
}

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// A piece of memory into the second-level cache: what comes from here and there arrives much faster when it is asked
// for all at once.
inline void fetch(const void* from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char*)from + line, 0, 2);
}

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
        v.part[p] =
            (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + p * WIDTH))), 16);
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
        v.part[p] =
            (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + p * WIDTH))));
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
    if (activation == GELU_TANH) {  // (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
        const Vector twice = x * fill(1.59576912f) * (fill(1) + fill(0.044715f) * x * x);
        return x / (fill(1) + exponential(fill(0) - twice));
    }
    return fill(0.5f) * x * (fill(1) + error_function(x * fill(0.70710678f)));
}

inline float activation_of(int64_t activation, float x) {
    if (activation == RELU) return x > 0 ? x : 0;
    if (activation == SILU) return x / (1 + std::exp(-x));
    if (activation == GELU_TANH) return x / (1 + std::exp(-1.59576912f * x * (1 + 0.044715f * x * x)));
    return 0.5f * x * (1 + std::erf(x * 0.70710678f));
}

void activate(int64_t activation, const float* gate, float* h, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(h + i,
              gate ? activation_of(activation, load(gate + i)) * load(h + i) : activation_of(activation, load(h + i)));
    for (; i < count; ++i) h[i] = gate ? activation_of(activation, gate[i]) * h[i] : activation_of(activation, h[i]);
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

#if defined(SPARSECLI_AVX512)
// total + pairs or quads of products. As assembly: compilers copy the intrinsics' sums from register to register.
inline __m512 add_pairs(__m512 total, __m512i a, __m512i b) {  // bfloat16 with bfloat16
    asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
    return total;
}

inline __m512i add_pairs(__m512i total, __m512i a, __m512i b) {  // 16-bit with 16-bit integers
    asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
    return total;
}

inline __m512i add_quads(__m512i total, __m512i bytes, __m512i signed_bytes) {  // unsigned with signed bytes
    asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(bytes), "v"(signed_bytes));
    return total;
}

inline __m512i broadcast_four(const void* bytes) {  // straight from memory, not by way of an integer register
    __m512i four;
    asm("vpbroadcastd %1, %0" : "=v"(four) : "m"(*(const char (*)[4])bytes));
    return four;
}
#endif
