// The vectors that ops are written with: sixteen floats, weights as floats, exponentials, integers.
// Part of all.inl, inside its namespaces.

// -- sixteen floats ------------------------------------------------------------------------------------------

#if defined(SPARSECLI_AVX512)
constexpr int WIDTH = 16;
#elif defined(SPARSECLI_AVX2)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;

// There are instructions for sums of four products of bytes: unsigned with signed, on Arm without I8MM signed with
// signed.
#if defined(SPARSECLI_VNNI) || defined(SPARSECLI_NEON)
#define SPARSECLI_QUADS 1
#endif

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef int16_t Shorts __attribute__((vector_size(WIDTH * 4)));  // twice as many
// The same at any address. Vectors are always read and written through these: compilers keep in memory what is filled
// by memcpy or copied as bytes, and then every product is a load and a store.
typedef float FloatsAt __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t IntsAt __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));

struct Vector {
    Floats part[PARTS];
};

inline Floats broadcast(float value) { return value - Floats{}; }

inline Vector fill(float value) {
    Vector v;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) v.part[p] = broadcast(value);
    return v;
}

inline void store(float* to, const Vector& v) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) *(FloatsAt*)(to + p * WIDTH) = v.part[p];
}

// sum + a * b, fused where the processor can.
inline Floats fused(Floats sum, Floats a, Floats b) {
#if defined(SPARSECLI_AVX512)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(SPARSECLI_AVX2)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(SPARSECLI_NEON)
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

// The same of one number. Of a plain expression the compiler rounds the product in some places and not in others.
inline float fused(float sum, float a, float b) {
#if defined(SPARSECLI_AVX512) || defined(SPARSECLI_AVX2) || defined(SPARSECLI_NEON)
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}

inline void add_product(Vector& sum, const Vector& a, const Vector& b) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) sum.part[p] = fused(sum.part[p], a.part[p], b.part[p]);
}

inline Vector operator+(Vector a, const Vector& b) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] += b.part[p];
    return a;
}

inline Vector operator-(Vector a, const Vector& b) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] -= b.part[p];
    return a;
}

inline Vector operator*(Vector a, const Vector& b) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] *= b.part[p];
    return a;
}

inline Vector operator/(Vector a, const Vector& b) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] /= b.part[p];
    return a;
}

inline Vector larger(Vector a, const Vector& b) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
    return a;
}

inline Vector magnitude(Vector a) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] = (Floats)((Ints)a.part[p] & 0x7fffffff);
    return a;
}

// All lanes, halves folded onto each other.
inline float sum(Floats v) {
#if defined(SPARSECLI_AVX512)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(SPARSECLI_AVX2)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#elif defined(SPARSECLI_NEON)
    return vaddvq_f32((float32x4_t)v);
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

inline int32_t sum(Ints v) {
#if defined(SPARSECLI_AVX512)
    return _mm512_reduce_add_epi32((__m512i)v);
#elif defined(SPARSECLI_AVX2)
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
#elif defined(SPARSECLI_NEON)
    return vaddvq_s32((int32x4_t)v);
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

inline float sum(const Vector& v) {
#if defined(SPARSECLI_AVX512)
    return sum(v.part[0]);
#elif defined(SPARSECLI_AVX2)
    return sum(v.part[0] + v.part[1]);
#else
    return sum((v.part[0] + v.part[2]) + (v.part[1] + v.part[3]));
#endif
}

inline float maximum(const Vector& v) {
#if defined(SPARSECLI_AVX512)
    return _mm512_reduce_max_ps((__m512)v.part[0]);
#else
    Floats top = v.part[0];
#pragma GCC unroll 4
    for (int p = 1; p < PARTS; ++p) top = top > v.part[p] ? top : v.part[p];
#if defined(SPARSECLI_NEON)
    return vmaxnmvq_f32((float32x4_t)top);
#endif
    float best = top[0];
    for (int i = 1; i < WIDTH; ++i) best = best > top[i] ? best : top[i];
    return best;
#endif
}

constexpr int64_t STREAM_DISTANCE = 16 * 1024;  // bytes between what is read and what is prefetched

inline void prefetch_line(const void* address) { __builtin_prefetch(address, 0, 3); }

// Prefetches memory into the second-level cache. Scattered rows arrive much faster when all are requested at once.
inline void prefetch(const void* from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char*)from + line, 0, 2);
}

// -- weights as floats ---------------------------------------------------------------------------------------

inline float to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// A float16.
struct Half {
    uint16_t bits;
};

inline float to_float(Half half) {
    const uint32_t sign = uint32_t(half.bits & 0x8000) << 16, exponent = half.bits >> 10 & 31;
    const uint32_t fraction = half.bits & 1023;
    uint32_t wide = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 31) wide = sign | 0x7f800000 | fraction << 13;
    float value;
    std::memcpy(&value, &wide, 4);
    if (exponent) return value;
    value = float(fraction) / 16777216.0f;
    return sign ? -value : value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);  // NaN stays NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);               // to nearest, ties to even
}

// WIDTH weights as floats.
inline Floats floats_of(const float* from) { return *(const FloatsAt*)from; }

inline Floats floats_of(const uint16_t* from) {
#if defined(SPARSECLI_AVX512)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(SPARSECLI_AVX2)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#elif defined(SPARSECLI_NEON)
    return (Floats)vshll_n_u16(vld1_u16(from), 16);
#else
    typedef uint16_t Four __attribute__((vector_size(8), aligned(2), may_alias));
    return (Floats)(__builtin_convertvector(*(const Four*)from, Ints) << 16);
#endif
}

inline Floats floats_of(const Half* from) {
#if defined(SPARSECLI_AVX512)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(SPARSECLI_AVX2)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(SPARSECLI_NEON)
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)from)));
#else
    return Floats{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
#endif
}

inline Floats floats_of(const int8_t* from) {
#if defined(SPARSECLI_AVX512)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(SPARSECLI_AVX2)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    typedef int8_t Four __attribute__((vector_size(4), aligned(1), may_alias));
    return __builtin_convertvector(*(const Four*)from, Floats);
#endif
}

template <class W>
inline Vector load(const W* from) {
    Vector v;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) v.part[p] = floats_of(from + p * WIDTH);
    return v;
}

#if defined(SPARSECLI_NEON)  // whole vectors at a time
inline Vector floats_of(int8x16_t bytes) {
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    Vector v;
    v.part[0] = (Floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    v.part[1] = (Floats)vcvtq_f32_s32(vmovl_high_s16(low));
    v.part[2] = (Floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    v.part[3] = (Floats)vcvtq_f32_s32(vmovl_high_s16(high));
    return v;
}

inline Vector load(const int8_t* from) { return floats_of(vld1q_s8(from)); }

inline Vector load(const uint16_t* from) {
    const uint16x8_t low = vld1q_u16(from), high = vld1q_u16(from + 8);
    Vector v;
    v.part[0] = (Floats)vshll_n_u16(vget_low_u16(low), 16);
    v.part[1] = (Floats)vshll_high_n_u16(low, 16);
    v.part[2] = (Floats)vshll_n_u16(vget_low_u16(high), 16);
    v.part[3] = (Floats)vshll_high_n_u16(high, 16);
    return v;
}
#endif

// Pairs of bfloat16 in 32 bits each: the first and the second of every pair, as floats.
inline Floats first_of(Ints pairs) { return (Floats)(pairs << 16); }
inline Floats second_of(Ints pairs) { return (Floats)(pairs & int32_t(0xffff0000)); }

inline void load_pairs(const uint16_t* from, Vector& first, Vector& second) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) {
        const Ints pairs = *(const IntsAt*)(from + 2 * WIDTH * p);
        first.part[p] = first_of(pairs);
        second.part[p] = second_of(pairs);
    }
}

// Floats rounded to bfloat16, to nearest, ties to even, in the upper half of their bits; NaN stays NaN.
inline Ints bfloat16_bits(Floats values) {
    const Ints bits = (Ints)values;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits | 1 << 22 : bits + 0x7fff + (bits >> 16 & 1);
}

inline void store(uint16_t* to, const Vector& v) {
#if defined(SPARSECLI_BF16) && defined(SPARSECLI_AVX512)
    *(__m256i_u*)to = (__m256i)_mm512_cvtneps_pbh((__m512)v.part[0]);
#elif defined(SPARSECLI_BF16)
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; p += 2) {
        Ints eight;
        asm("bfcvtn %0.4h, %1.4s" : "=w"(eight) : "w"(v.part[p]));
        asm("bfcvtn2 %0.8h, %1.4s" : "+w"(eight) : "w"(v.part[p + 1]));
        *(IntsAt*)(to + p * WIDTH) = eight;
    }
#else
    typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
    typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));
    typedef uint16_t HalvesAt __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p)
        *(HalvesAt*)(to + p * WIDTH) = __builtin_convertvector((Words)bfloat16_bits(v.part[p]) >> 16, Halves);
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
                 : type == FLOAT16  ? to_float(((const Half*)values)[i])
                                    : float(((const int8_t*)values)[i]) * *scale;
}

// -- exponentials --------------------------------------------------------------------------------------------

// e^x to about 2e-7, relative: 2^n p(r) with n = round(x / ln 2) and a polynomial for |r| <= ln 2 / 2.
inline Vector exponential(const Vector& x) {
    Vector result;
#pragma GCC unroll 4
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
#pragma GCC unroll 4
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
    const float inverse = 1 / std::sqrt(variance / float(count) + float(epsilon));
    const Vector inverses = fill(inverse);
    for (int64_t i = 0; i < whole; i += LANES) {
        Vector y = (load(x + i) - middle) * inverses * load(weight + i);
        store(out + i, bias ? y + load(bias + i) : y);
    }
    for (int64_t i = whole; i < count; ++i) out[i] = (x[i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0);
}

constexpr float NOTHING = 1e-30f;  // vectors without a larger number count as zero: 1 / scale would not be finite

// -- integers ------------------------------------------------------------------------------------------------

// values * inverse to nearest, ties to even; below 2^22.
inline Ints rounded(Floats values, Floats inverse) {
#if defined(SPARSECLI_AVX512)
    return (Ints)_mm512_cvtps_epi32((__m512)(values * inverse));
#elif defined(SPARSECLI_AVX2)
    return (Ints)_mm256_cvtps_epi32((__m256)(values * inverse));
#elif defined(SPARSECLI_NEON)
    return (Ints)vcvtnq_s32_f32((float32x4_t)(values * inverse));
#else
    const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: a sum with it has no fraction
    Floats product = values * inverse;
#if defined(__aarch64__)
    asm(""
        : "+w"(product));  // keeps the sum from being fused with the product, which would round some ties differently
#endif
    return (Ints)(product + magic) - (Ints)magic;
#endif
}

// 2 WIDTH bytes as 16-bit integers.
inline Shorts shorts_of(const int8_t* from) {
#if defined(SPARSECLI_AVX512)
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#elif defined(SPARSECLI_AVX2)
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#elif defined(SPARSECLI_NEON)
    return (Shorts)vmovl_s8(vld1_s8(from));
#else
    typedef int8_t Eight __attribute__((vector_size(8), aligned(1), may_alias));
    return __builtin_convertvector(*(const Eight*)from, Shorts);
#endif
}

inline Shorts shorts_of(const int16_t* from) { return (Shorts)(*(const IntsAt*)from); }

// total + the sums of two neighbouring products of 16-bit integers. Assembly where it is one instruction: with
// intrinsics compilers copy the sums from register to register.
inline Ints add_pairs(Ints total, Shorts a, Shorts b) {
#if defined(SPARSECLI_VNNI) && defined(SPARSECLI_AVX512)
    asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
    return total;
#elif defined(SPARSECLI_VNNI)
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(total) : "x"(a), "x"(b));
    return total;
#elif defined(SPARSECLI_AVX512)
    return total + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(SPARSECLI_AVX2)
    return total + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const Ints x = (Ints)a, y = (Ints)b;
    return total + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// The same four bytes in every 32 bits.
inline Ints pair_everywhere(const void* from) {
#if defined(SPARSECLI_AVX512)
    Ints four;
    asm("vpbroadcastd %1, %0" : "=v"(four) : "m"(*(const char (*)[4])from));
    return four;
#else
    typedef int32_t Four __attribute__((aligned(1), may_alias));
    return *(const Four*)from - Ints{};
#endif
}

// Bytes of a panel, which holds weights + 128; PANEL_ZERO is what is still added to them after loading.
#if defined(SPARSECLI_NEON) && !defined(SPARSECLI_I8MM)
constexpr int32_t PANEL_ZERO = 0;
inline Ints panel_bytes(const void* from) { return *(const IntsAt*)from ^ int32_t(0x80808080); }
#else
constexpr int32_t PANEL_ZERO = 128;
inline Ints panel_bytes(const void* from) { return *(const IntsAt*)from; }
#endif

#if defined(SPARSECLI_QUADS)
// total + sums of four neighbouring products: bytes of a panel with signed bytes.
inline Ints add_quads(Ints total, Ints bytes, Ints signed_bytes) {
#if defined(SPARSECLI_AVX512)
    asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(bytes), "v"(signed_bytes));
    return total;
#elif defined(SPARSECLI_VNNI)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(total) : "x"(bytes), "x"(signed_bytes));
    return total;
#elif defined(SPARSECLI_I8MM)
    asm("usdot %0.4s, %1.16b, %2.16b" : "+w"(total) : "w"(bytes), "w"(signed_bytes));
    return total;
#elif defined(SPARSECLI_DOTPROD)
    asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(total) : "w"(bytes), "w"(signed_bytes));
    return total;
#else  // two products of at most 127 and 128 fit into 16 bits
    const int8x16_t a = (int8x16_t)bytes, b = (int8x16_t)signed_bytes;
    const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
    return (Ints)vpadalq_s16((int32x4_t)total, pairs);
#endif
}
#endif

#if defined(SPARSECLI_BF16)
inline Floats add_pairs(Floats total, Ints a, Ints b) {  // bfloat16 with bfloat16
#if defined(SPARSECLI_AVX512)
    asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
#else
    asm("bfdot %0.4s, %1.8h, %2.8h" : "+w"(total) : "w"(a), "w"(b));
#endif
    return total;
}
#endif

// -- 8-bit weights with 16-bit activations ------------------------------------------------------------------

// INTEGERS of each at a time. Activations are integers of at most LARGEST in magnitude; Sums are running sums in
// registers.
#if defined(SPARSECLI_DOTPROD)
// Sixteen activations are stored as their low bytes, then their high bytes, all signed: 256 high + low.
constexpr int64_t INTEGERS = 4 * WIDTH;
constexpr int32_t LARGEST = 127 * 256 + 127;
typedef int8_t Bytes __attribute__((vector_size(WIDTH * 4)));
struct Integers {
    Ints low, high;
};
struct Sums {
    Ints low, high;
};

inline Bytes weights_of(const int8_t* from) { return (Bytes)(*(const IntsAt*)from); }
inline Integers integers_of(const int16_t* from) { return {*(const IntsAt*)from, *(const IntsAt*)(from + 2 * WIDTH)}; }

inline Ints add_signed_quads(Ints total, Ints a, Ints b) {
    asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(total) : "w"(a), "w"(b));
    return total;
}
inline Sums add_products(const Sums& total, Bytes w, const Integers& x) {
    return {add_signed_quads(total.low, (Ints)w, x.low), add_signed_quads(total.high, (Ints)w, x.high)};
}
inline Ints total_of(const Sums& sums) { return sums.low + (sums.high << 8); }

// Splits `count` 16-bit integers, a multiple of INTEGERS, into their bytes.
inline void arrange(int16_t* integers, int64_t count) {
    for (int64_t i = 0; i < count; i += INTEGERS) {
        const Shorts a = shorts_of(integers + i), b = shorts_of(integers + i + 2 * WIDTH);
        *(IntsAt*)(integers + i) = (Ints)vuzp1q_s8((int8x16_t)a, (int8x16_t)b);
        *(IntsAt*)(integers + i + 2 * WIDTH) = (Ints)vuzp2q_s8((int8x16_t)(a + 128), (int8x16_t)(b + 128));
    }
}
#else
constexpr int64_t INTEGERS = 2 * WIDTH;
constexpr int32_t LARGEST = 32767;
using Integers = Shorts;
using Sums = Ints;

inline Shorts weights_of(const int8_t* from) { return shorts_of(from); }
inline Shorts integers_of(const int16_t* from) { return shorts_of(from); }

inline Ints add_products(Ints total, Shorts w, Shorts x) {
#if defined(SPARSECLI_NEON)
    const int16x8_t a = (int16x8_t)w, b = (int16x8_t)x;
    return (Ints)vmlal_high_s16(vmlal_s16((int32x4_t)total, vget_low_s16(a), vget_low_s16(b)), a, b);
#else
    return add_pairs(total, w, x);
#endif
}
inline Ints total_of(Ints sums) { return sums; }
inline void arrange(int16_t*, int64_t) {}
#endif

// -- sums over lanes -----------------------------------------------------------------------------------------

// Sums over the lanes of four vectors, which are added up as the columns of one matrix.
inline void sum_four(Floats a, Floats b, Floats c, Floats d, float* out) {
#if defined(SPARSECLI_AVX512)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(SPARSECLI_AVX2)
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
    const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#elif defined(SPARSECLI_NEON)
    const float32x4_t ab = vpaddq_f32((float32x4_t)a, (float32x4_t)b), cd = vpaddq_f32((float32x4_t)c, (float32x4_t)d);
    vst1q_f32(out, vpaddq_f32(ab, cd));
#else
    const Floats four[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) out[i] = sum(four[i]);
#endif
}

// The same for R vectors, in an order of additions that does not depend on R.
template <int R>
inline void sum_each(const Floats* v, float* out) {
    float four[4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 4) {
        sum_four(v[r], v[r + 1 < R ? r + 1 : r], v[r + 2 < R ? r + 2 : r], v[r + 3 < R ? r + 3 : r], four);
        for (int i = 0; i < 4 && r + i < R; ++i) out[r + i] = four[i];
    }
}
