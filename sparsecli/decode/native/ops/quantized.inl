// Weights in 3 or 4 bits, in panels: sixteen outputs are computed together, a group of inputs at a time.
// Part of all.inl, inside its namespaces.
//
// Every 32-bit lane belongs to one output. Pairs of 16-bit numbers are multiplied: the codes of two neighbouring inputs
// with their activations; on Arm with dot products of bytes, quads of codes in bytes. Codes are masked but not shifted,
// which is cheaper: they are multiplied by 1, 2, 16, 32 or 256 as they stand in their 16 bits, as long as sums fit into
// 32 bits. Each such factor has its own sum.

typedef uint32_t Lanes __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t LanesAt __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(WIDTH * 4)));

struct Codes {
    Lanes part[PARTS];
};

inline Codes load_codes(const uint8_t* from) {
    Codes c;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) c.part[p] = *(const LanesAt*)(from + 4 * WIDTH * p);
#if defined(SPARSECLI_AVX512)
    asm("" : "+v"(c.part[0]));  // keeps it in a register: compilers load it again for each use
#endif
    return c;
}

// LANES bytes, one in each lane.
inline Codes bytes_widened(const uint8_t* from) {
    Codes c;
#if defined(SPARSECLI_AVX512)
    c.part[0] = (Lanes)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(SPARSECLI_AVX2)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p)
        c.part[p] = (Lanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + p * WIDTH)));
#elif defined(SPARSECLI_NEON)
    const uint8x16_t bytes = vld1q_u8(from);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    c.part[0] = (Lanes)vmovl_u16(vget_low_u16(low));
    c.part[1] = (Lanes)vmovl_high_u16(low);
    c.part[2] = (Lanes)vmovl_u16(vget_low_u16(high));
    c.part[3] = (Lanes)vmovl_high_u16(high);
#else
    for (int i = 0; i < LANES; ++i) c.part[i / WIDTH][i % WIDTH] = from[i];
#endif
    return c;
}

inline Codes halves_shifted(Codes a, int bits) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] = (Lanes)((Halves)a.part[p] >> bits);
    return a;
}

inline Codes operator&(Codes a, uint32_t mask) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] &= mask;
    return a;
}

inline Codes rotated_right(Codes a, int bits) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] = a.part[p] >> bits | a.part[p] << (32 - bits);
    return a;
}

// Bits of `a` where the mask has ones, of `b` elsewhere.
inline Codes mixed(uint32_t mask, const Codes& a, const Codes& b) {
    Codes c;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p)
#if defined(SPARSECLI_AVX512)
        c.part[p] = (Lanes)_mm512_ternarylogic_epi32(_mm512_set1_epi32(int(mask)), (__m512i)a.part[p],
                                                     (__m512i)b.part[p], 0xca);
#else
        c.part[p] = (a.part[p] & mask) | (b.part[p] & ~mask);
#endif
    return c;
}

// sums += both inputs of `codes` with x[0] and x[1].
inline void add_pairs(Codes& sums, const Codes& codes, const int16_t* x) {
#if defined(SPARSECLI_VNNI) && defined(SPARSECLI_AVX512)
    Lanes total = sums.part[0];  // by value, so that it stays in a register
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(total) : "v"(codes.part[0]), "m"(*(const char (*)[4])x));
    sums.part[0] = total;
#else
    const Shorts pair = (Shorts)pair_everywhere(x);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) {
        Lanes total = (Lanes)add_pairs((Ints)sums.part[p], (Shorts)codes.part[p], pair);
#if defined(SPARSECLI_AVX2) || defined(SPARSECLI_AVX512)
        asm("" : "+v"(total));  // compilers would add products in another order, for which they store all of them
#endif
        sums.part[p] = total;
    }
#endif
}

#if defined(SPARSECLI_AVX512)
constexpr int QUANT_TOKENS = 8;
#elif defined(SPARSECLI_NEON)
constexpr int QUANT_TOKENS = 2;
#else
constexpr int QUANT_TOKENS = 4;
#endif
constexpr int FACTORS = 4;  // sums that a group has

// The layout of a group's codes (packed/quantized_layouts.py). `visit` calls use(i, factor, codes) for every pair i of
// inputs, in order, with codes multiplied by 2^power[factor]; `total` returns sixteen times the sum without the
// factors.
template <int BITS>
struct Planes;

#if !defined(SPARSECLI_DOTPROD)
// Eight vectors; lane r of the i-th has inputs 8 i .. 8 i + 7 of output r, as four pairs: one code of each in either
// half.
template <>
struct Planes<4> {
    static constexpr int64_t BYTES = 512;
    static constexpr int power[FACTORS] = {0, 4, 8, 0};

    template <class F>
    static void visit(const uint8_t* from, const F& use) {
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
            const Codes c = load_codes(from + 64 * v);
            use(4 * v, 0, c & 0x000f000f);
            use(4 * v + 1, 1, c & 0x00f000f0);
            use(4 * v + 2, 2, c & 0x0f000f00);
            use(4 * v + 3, 3, halves_shifted(c, 12));
        }
    }

    static Codes total(const Codes* sums) {
        Codes all;
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p)
            all.part[p] =
                ((sums[0].part[p] + sums[3].part[p]) << 4) + sums[1].part[p] + (Lanes)((Ints)sums[2].part[p] >> 4);
        return all;
    }
};

// Four vectors with two bits of every code, in fields f = 0 .. 7 of either half, and two with the third: for fields
// with an even f the code's highest bit, above the other two, for those with an odd f its lowest, below them.
template <>
struct Planes<3> {
    static constexpr int64_t BYTES = 384;
    static constexpr int power[FACTORS] = {0, 1, 4, 5};

    template <class F>
    static void visit(const uint8_t* from, const F& use) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Codes two = load_codes(from + 64 * v), ones = load_codes(from + 64 * (4 + v / 2));
            const Codes one = v % 2 ? rotated_right(ones, 2) : ones;
            const Codes even = mixed(0x33333333, two, one), odd = mixed(0xcccccccc, two, one);
            use(8 * v, 0, even & 0x00070007);
            use(8 * v + 1, 1, odd & 0x000e000e);
            use(8 * v + 2, 2, even & 0x00700070);
            use(8 * v + 3, 3, odd & 0x00e000e0);
            use(8 * v + 4, 0, halves_shifted(even, 8) & 0x00070007);
            use(8 * v + 5, 1, halves_shifted(odd, 8) & 0x000e000e);
            use(8 * v + 6, 2, halves_shifted(even, 8) & 0x00700070);
            use(8 * v + 7, 3, halves_shifted(odd, 8) & 0x00e000e0);
        }
    }

    static Codes total(const Codes* sums) {
        Codes all;
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p)
            all.part[p] =
                (sums[0].part[p] << 4) + (sums[1].part[p] << 3) + sums[2].part[p] + (Lanes)((Ints)sums[3].part[p] >> 1);
        return all;
    }
};

#else
// The same memory as quads of inputs, one code in each byte. `order` is which of sixteen inputs these are.
inline Codes bytes_shifted(Codes a, int bits) {
    typedef uint8_t Bytes __attribute__((vector_size(WIDTH * 4)));
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] = (Lanes)((Bytes)a.part[p] >> bits);
    return a;
}

template <>
struct Planes<4> {
    static constexpr int64_t BYTES = 512;
    static constexpr int power[FACTORS] = {};
    static constexpr uint8_t order[] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};

    template <class F>
    static void visit(const uint8_t* from, const F& use) {
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
            const Codes c = load_codes(from + 64 * v);
            use(2 * v, 0, c & 0x0f0f0f0f);
            use(2 * v + 1, 0, bytes_shifted(c, 4));
        }
    }
};

template <>
struct Planes<3> {
    static constexpr int64_t BYTES = 384;
    static constexpr int power[FACTORS] = {};
    static constexpr uint8_t order[] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};

    template <class F>
    static void visit(const uint8_t* from, const F& use) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Codes two = load_codes(from + 64 * v), ones = load_codes(from + 64 * (4 + v / 2));
            const Codes one = v % 2 ? rotated_right(ones, 2) : ones;
            const Codes even = mixed(0x33333333, two, one), odd = mixed(0xcccccccc, two, one);
            use(4 * v, 0, even & 0x07070707);
            use(4 * v + 1, 0, bytes_shifted(odd, 1) & 0x07070707);
            use(4 * v + 2, 0, bytes_shifted(even, 4) & 0x07070707);
            use(4 * v + 3, 0, bytes_shifted(odd, 5));
        }
    }
};
#endif

// Calls use(i, codes) for every pair (or quad) i of a group, with codes shifted down to their values.
template <int BITS, class F>
inline void visit_shifted(const uint8_t* from, const F& use) {
    Planes<BITS>::visit(from, [&](int i, int factor, const Codes& codes) {
        use(i, halves_shifted(codes, Planes<BITS>::power[factor]));
    });
}

// Sixteen activations, to be multiplied with shifted codes, and the sums of the products.
#if defined(SPARSECLI_DOTPROD)
constexpr int TOGETHER = 4;
struct PanelSums {
    Codes low, high;
};

inline Codes total_of(const PanelSums& sums) {
    Codes all;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) all.part[p] = sums.low.part[p] + (sums.high.part[p] << 8);
    return all;
}

// totals += quads of bytes with those of one lane of x.
template <int LANE>
inline void add_lane(Codes& totals, const Codes& codes, Ints x) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) {
        Lanes total = totals.part[p];  // by value, so that it stays in a register
        asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(total) : "w"(codes.part[p]), "w"(x), "i"(LANE));
        totals.part[p] = total;
    }
}

inline void add_lane(Codes& totals, const Codes& codes, Ints x, int lane) {
    switch (lane) {
        case 0:
            return add_lane<0>(totals, codes, x);
        case 1:
            return add_lane<1>(totals, codes, x);
        case 2:
            return add_lane<2>(totals, codes, x);
        default:
            return add_lane<3>(totals, codes, x);
    }
}

template <int BITS>
struct Sixteen {
    Ints low, high;
    Sixteen() = default;
    explicit Sixteen(const int16_t* x) {
        const Integers all = integers_of(x);
        const uint8x16_t order = vld1q_u8(Planes<BITS>::order);
        low = (Ints)vqtbl1q_s8((int8x16_t)all.low, order);
        high = (Ints)vqtbl1q_s8((int8x16_t)all.high, order);
    }
    void add_to(PanelSums& sums, const Codes& codes, int i) const {
        add_lane(sums.low, codes, low, i);
        add_lane(sums.high, codes, high, i);
    }
};
#else
constexpr int TOGETHER = 2;
#if defined(SPARSECLI_NEON)
struct PanelSums {  // products of the first and of the last four 16-bit numbers, before neighbours are added
    Codes first, last;
};

inline Codes total_of(const PanelSums& sums) {
    Codes all;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p)
        all.part[p] = (Lanes)vpaddq_s32((int32x4_t)sums.first.part[p], (int32x4_t)sums.last.part[p]);
    return all;
}

inline void add_pairs(PanelSums& sums, const Codes& codes, const int16_t* x) {
    const int16x8_t pair = (int16x8_t)pair_everywhere(x);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) {
        const int16x8_t c = (int16x8_t)codes.part[p];
        sums.first.part[p] = (Lanes)vmlal_s16((int32x4_t)sums.first.part[p], vget_low_s16(c), vget_low_s16(pair));
        sums.last.part[p] = (Lanes)vmlal_high_s16((int32x4_t)sums.last.part[p], c, pair);
    }
}
#else
using PanelSums = Codes;
inline Codes total_of(const Codes& sums) { return sums; }
#endif

template <int BITS>
struct Sixteen {
    const int16_t* x;
    Sixteen() = default;
    explicit Sixteen(const int16_t* from) : x(from) {}
    void add_to(PanelSums& sums, const Codes& codes, int i) const { add_pairs(sums, codes, x + 2 * i); }
};
#endif
constexpr int STEPS = 16 / TOGETHER;

inline Codes sixteen_times(Codes sums) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) sums.part[p] <<= 4;
    return sums;
}

// A panel: the codes of all groups, then their scales and their zeros, sixteen of each for a group.
template <int BITS>
struct Panel {
    const uint8_t* codes;
    const uint16_t* scale;
    const uint8_t* zero;

    Panel(const uint8_t* from, int64_t groups)
        : codes(from),
          scale((const uint16_t*)(from + groups * Planes<BITS>::BYTES)),
          zero((const uint8_t*)(scale + groups * LANES)) {}

    // y += scale * (16 * sum(code * x) - zero * sum(x)), exact but for the last product.
    void add_group(Vector& y, int64_t g, const Codes& sixteen_times, int32_t sum_of_x) const {
        const Codes zeros = bytes_widened(zero + g * LANES);
        Vector sums;
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p)
            sums.part[p] =
                __builtin_convertvector((Ints)(sixteen_times.part[p] - zeros.part[p] * uint32_t(sum_of_x)), Floats);
        add_product(y, load(scale + g * LANES), sums);
    }
};

// Sixteen outputs of one token, times 16 and without the scale of its activations.
template <int BITS>
inline Vector panel_of_one(const Panel<BITS>& panel, int64_t groups, const int16_t* x, const int32_t* sums_of_x) {
    Vector y = fill(0);
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* codes = panel.codes + g * Planes<BITS>::BYTES;
#pragma GCC unroll 8
        for (int64_t line = 0; line < Planes<BITS>::BYTES; line += 64)
            __builtin_prefetch(codes + STREAM_DISTANCE + line, 0, 2);
        const int16_t* group = x + g * QUANT_GROUP;
#if defined(SPARSECLI_NEON)  // few registers, and each output has two sums already
        PanelSums sums = {};
        const Sixteen<BITS> all[] = {Sixteen<BITS>(group), Sixteen<BITS>(group + 16), Sixteen<BITS>(group + 32),
                                     Sixteen<BITS>(group + 48)};
        visit_shifted<BITS>(codes, [&](int i, const Codes& codes) { all[i / STEPS].add_to(sums, codes, i % STEPS); });
        panel.add_group(y, g, sixteen_times(total_of(sums)), sums_of_x[g]);
#else
        Codes sums[FACTORS] = {};
        Planes<BITS>::visit(
            codes, [&](int pair, int factor, const Codes& codes) { add_pairs(sums[factor], codes, group + 2 * pair); });
        panel.add_group(y, g, Planes<BITS>::total(sums), sums_of_x[g]);
#endif
    }
    return y;
}

// Groups whose codes are unpacked at a time, for many tokens: they stay in the first-level cache.
constexpr int64_t GROUPS_AT_ONCE = 4;
constexpr int64_t TOKENS_AT_ONCE = 128;

struct UnpackedGroup {
    Codes codes[QUANT_GROUP / TOGETHER];
};

// The same for T tokens and some groups whose codes were unpacked; added to y (T, LANES).
template <int BITS, int T>
inline void add_groups(const Panel<BITS>& panel, const UnpackedGroup* unpacked, int64_t first, int64_t last,
                       const int16_t* x, const int32_t* sums_of_x, int64_t stride, float* y) {
    for (int64_t g = first; g < last; ++g) {
        PanelSums sums[T] = {};
        for (int64_t at = 0; at < QUANT_GROUP; at += 16) {
            const int16_t* group = x + g * QUANT_GROUP + at;
            const Codes* codes = unpacked[g - first].codes + at / TOGETHER;
#if defined(SPARSECLI_NEON)
            asm("" : "+r"(codes) : : "memory");  // read where they are used: registers are few
#endif
            Sixteen<BITS> inputs[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) inputs[t] = Sixteen<BITS>(group + t * stride);
#pragma GCC unroll 4
            for (int i = 0; i < STEPS; ++i) {
                const Codes some = codes[i];
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) inputs[t].add_to(sums[t], some, i);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            Vector total = load(y + t * LANES);  // not kept meanwhile: registers are few
            panel.add_group(total, g, sixteen_times(total_of(sums[t])), sums_of_x[t * (stride / QUANT_GROUP) + g]);
            store(y + t * LANES, total);
        }
    }
}

// Sixteen outputs of many tokens in y (tokens, LANES): codes are unpacked once for all of them.
template <int BITS>
inline void panel_of_many(const Panel<BITS>& panel, int64_t groups, const int16_t* x, const int32_t* sums_of_x,
                          int64_t stride, int64_t tokens, float* y) {
    UnpackedGroup unpacked[GROUPS_AT_ONCE];
    std::memset(y, 0, size_t(tokens * LANES) * sizeof(float));
    for (int64_t first = 0; first < groups; first += GROUPS_AT_ONCE) {
        const int64_t last = first + GROUPS_AT_ONCE < groups ? first + GROUPS_AT_ONCE : groups;
        for (int64_t g = first; g < last; ++g)
            visit_shifted<BITS>(panel.codes + g * Planes<BITS>::BYTES,
                                [&](int i, const Codes& codes) { unpacked[g - first].codes[i] = codes; });
        for (int64_t t = 0; t < tokens; t += QUANT_TOKENS)
            add_groups<BITS, QUANT_TOKENS>(panel, unpacked, first, last, x + t * stride,
                                           sums_of_x + t * (stride / QUANT_GROUP), stride, y + t * LANES);
    }
}

template <int BITS>
void quantized_matmul(const Matrix& w, int64_t begin, int64_t end, const Activations& x, int64_t tokens, float* out,
                      int64_t out_stride) {
    const int64_t groups = groups_of(w.cols), bytes = quantized_panel(w.cols, BITS), sums = x.stride / QUANT_GROUP;
    const int64_t tiled = tokens / QUANT_TOKENS * QUANT_TOKENS;
    alignas(64) float y[TOKENS_AT_ONCE * LANES];
    for (int64_t row = begin; row < end; row += LANES) {
        const Panel<BITS> panel((const uint8_t*)w.data + row / LANES * bytes, groups);
        // The next panel's scales and zeros are a second stream, which processors do not prefetch beside that of the
        // codes.
        if (row + LANES < end) prefetch(panel.codes + bytes + groups * Planes<BITS>::BYTES, groups * LANES * 3);
        const auto keep = [&](int64_t t, const Vector& of_token) {
            float lane[LANES];
            store(lane, of_token * fill(x.scales[t] / 16));
            std::memcpy(out + t * out_stride + row, lane, size_t(row + LANES <= end ? LANES : end - row) * 4);
        };
        for (int64_t t = 0; t < tiled; t += TOKENS_AT_ONCE) {
            const int64_t held = t + TOKENS_AT_ONCE < tiled ? TOKENS_AT_ONCE : tiled - t;
            panel_of_many<BITS>(panel, groups, x.integers + t * x.stride, x.sums + t * sums, x.stride, held, y);
            for (int64_t u = 0; u < held; ++u) keep(t + u, load(y + u * LANES));
        }
        for (int64_t t = tiled; t < tokens; ++t)
            keep(t, panel_of_one<BITS>(panel, groups, x.integers + t * x.stride, x.sums + t * sums));
    }
}

// -- residuals of units --------------------------------------------------------------------------------------

// Sixteen codes minus 8: the low nibbles of as many bytes, or with SHIFT = 4 the high ones.
template <int SHIFT>
inline Vector residual_values(const uint8_t* from) {
#if defined(SPARSECLI_NEON)
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    return floats_of((int8x16_t)(((Bytes)vld1q_u8(from) >> SHIFT & 15) - 8));
#else
    const Codes bytes = bytes_widened(from);
    Vector values;
#if defined(SPARSECLI_AVX512)
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    values.part[0] =
        (Floats)_mm512_permutexvar_ps((__m512i)(bytes.part[0] >> SHIFT), table);  // by the lowest four bits
#else
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p)
        values.part[p] = __builtin_convertvector((Ints)(bytes.part[p] >> SHIFT & 15) - 8, Floats);
#endif
    return values;
#endif
}

// A row times one token's integers, without their scale. Sums of a group are exact.
inline float residual_dot(const uint8_t* codes, const uint16_t* scale, int64_t groups, const int16_t* x) {
    constexpr int64_t HALF = QUANT_GROUP / 2;
    Floats total = Floats{};
    for (int64_t g = 0; g < groups; ++g) {
        Sums sums = {};
#pragma GCC unroll 4
        for (int64_t i = 0; i < HALF; i += INTEGERS) {
            const auto bytes = weights_of((const int8_t*)codes + g * HALF + i);
            const int16_t* group = x + g * QUANT_GROUP + i;
            sums = add_products(sums, (bytes & 15) - 8, integers_of(group));
            sums = add_products(sums, (bytes >> 4 & 15) - 8, integers_of(group + HALF));
        }
        total = fused(total, __builtin_convertvector(total_of(sums), Floats), broadcast(to_float(scale[g])));
    }
    return sum(total);
}

// The codes and scales of a row of a unit's residual.
struct Residual {
    const uint8_t* codes;
    const uint16_t* scale;

    Residual() = default;
    Residual(const Matrix& residual, int64_t parts, int64_t unit, int64_t row)
        : codes((const uint8_t*)residual.data + unit * residual_unit(residual.cols, parts) +
                row * residual_row(residual.cols)),
          scale((const uint16_t*)(codes + groups_of(residual.cols) * (QUANT_GROUP / 2))) {}
};

void residual_dots(const Matrix& residual, int64_t parts, const int32_t* chosen, int64_t count, const Activations& x,
                   float* out) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t row = 0; row < parts - 1; ++row) {
            const Residual r(residual, parts, chosen[i], row);
            out[i * (parts - 1) + row] =
                residual_dot(r.codes, r.scale, groups_of(residual.cols), x.integers) * x.scales[0];
        }
}

// y[0 .. 32) += factor[i] * columns [column, column + 32) of row i: the low nibbles of a group's bytes, or the high
// ones.
template <int SHIFT>
inline void add_half_group(const Residual* rows, const float* factor, int64_t count, int64_t column, float* y) {
    const int64_t group = column / QUANT_GROUP;
    Vector low = load(y), high = load(y + LANES);
    for (int64_t i = 0; i < count; ++i) {
        const Vector scaled = fill(factor[i] * to_float(rows[i].scale[group]));
        const uint8_t* codes = rows[i].codes + group * (QUANT_GROUP / 2);
        add_product(low, scaled, residual_values<SHIFT>(codes));
        add_product(high, scaled, residual_values<SHIFT>(codes + LANES));
    }
    store(y, low);
    store(y + LANES, high);
}

void residual_sums(const Matrix& residual, int64_t parts, const int32_t* chosen, const float* h, int64_t count,
                   int64_t begin, int64_t end, float* y) {
    constexpr int64_t HALF = QUANT_GROUP / 2, AT_ONCE = 64;  // rows that stay cached while columns pass
    static_assert(HALF == 2 * LANES);
    Residual rows[AT_ONCE];
    float factor[AT_ONCE];
    for (int64_t i = 0; i < count;) {
        int64_t found = 0;
        for (; i < count && found < AT_ONCE; ++i) {
            if (h[chosen[i]] == 0) continue;
            rows[found] = Residual(residual, parts, chosen[i], parts - 1);
            factor[found++] = h[chosen[i]];
        }
        for (int64_t c = begin / HALF * HALF; c < end; c += HALF) {
            float line[HALF] = {};
            const int64_t first = c < begin ? begin : c, last = c + HALF < end ? c + HALF : end;
            std::memcpy(line + first - c, y + first, size_t(last - first) * 4);
            if (c % QUANT_GROUP)
                add_half_group<4>(rows, factor, found, c, line);
            else
                add_half_group<0>(rows, factor, found, c, line);
            std::memcpy(y + first, line + first - c, size_t(last - first) * 4);
        }
    }
}
