// Weights in GGUF's types, with their own codes and scales, in panels: sixteen outputs are computed together.
// Part of all.inl, inside its namespaces.
//
// Every 32-bit lane belongs to one output and holds the codes of four neighbouring inputs, one in each byte, which are
// multiplied with four bytes of activations. Integer sums of a group of inputs are exact; then they are multiplied with
// the group's scale in float32.

// How a type's weights are made of codes. A panel is a sequence of blocks of BLOCK columns, each of which holds
//   codes   of every group of 32 columns: the lower bits of all, then the upper ones (see visit_quads)
//   scales  simple: float16 [group][row], with MIN also minima of the same form
//           super:  bytes [group of GROUP][row], with three bits packed (see ByteScales), with MIN also minima; then
//                   one float16 [row] for the scales of the whole block, with MIN another one for the minima; BY_ROW
//                   these are the same for all blocks, and lie in front of them
// and is filled up to whole cache lines. A weight is scale * (code - ZERO), with MIN scale * code + minimum, where a
// minimum of super blocks counts negative; with TABLE it is scale * IQ4_VALUES[code].
template <int64_t TYPE>
struct Gguf;

template <int BITS_, int64_t BLOCK_, int GROUP_, bool SUPER_, bool MIN_, int ZERO_, bool TABLE_ = false,
          bool BY_ROW_ = false>
struct GgufType {
    static constexpr int BITS = BITS_, GROUP = GROUP_, ZERO = ZERO_;
    static constexpr int64_t BLOCK = BLOCK_, PARTS_OF_32 = 32 / GROUP, CODES = 64 * BITS;  // bytes of 32 columns
    static constexpr bool SUPER = SUPER_, MIN = MIN_, TABLE = TABLE_, BY_ROW = BY_ROW_, PACKED = BITS == 3;
    static constexpr bool SIGNED = BITS == 8 || TABLE;  // what is multiplied
    static constexpr int64_t GROUPS = BLOCK / GROUP, ROWS_OF_SCALES = PACKED ? 12 : GROUPS;
    static constexpr int64_t SCALES = BLOCK / 32 * CODES;  // offset in a block
    static constexpr int64_t MINIMA = SCALES + ROWS_OF_SCALES * LANES * (SUPER ? 1 : 2);
    static constexpr int64_t HALVES = (1 + MIN) * 2 * LANES;  // bytes of the scales of scales, and of minima
    static constexpr int64_t HEAD = BY_ROW ? HALVES : 0;      // bytes in front of the blocks
    static constexpr int64_t OF_SCALES = BY_ROW ? 0 : SCALES + (1 + MIN) * ROWS_OF_SCALES * LANES;
    static constexpr int64_t BYTES =
        SCALES + (1 + MIN) * (MINIMA - SCALES) + (SUPER && !BY_ROW ? HALVES : 0) + 63 & ~63;

    // The scales of a block's scales; those of its minima follow them.
    static const uint8_t* outer(const uint8_t* panel, const uint8_t* block) {
        return (BY_ROW ? panel : block) + OF_SCALES;
    }
};

template <>
struct Gguf<Q4_0> : GgufType<4, 64, 32, false, false, 8> {};
template <>
struct Gguf<Q4_1> : GgufType<4, 64, 32, false, true, 0> {};
template <>
struct Gguf<Q5_0> : GgufType<5, 64, 32, false, false, 16> {};
template <>
struct Gguf<Q5_1> : GgufType<5, 64, 32, false, true, 0> {};
template <>
struct Gguf<Q8_0> : GgufType<8, 64, 32, false, false, 0> {};
template <>
struct Gguf<IQ4_NL> : GgufType<4, 64, 32, false, false, 0, true> {};
template <>
struct Gguf<IQ4_XS> : GgufType<4, 256, 32, true, false, 0, true> {};
template <>
struct Gguf<Q3_K> : GgufType<3, 256, 16, true, false, 4> {};
template <>
struct Gguf<Q4_K> : GgufType<4, 256, 32, true, true, 0> {};
template <>
struct Gguf<Q5_K> : GgufType<5, 256, 32, true, true, 0> {};
template <>
struct Gguf<Q6_K> : GgufType<6, 256, 16, true, false, 32> {};
template <>
struct Gguf<SKETCH> : GgufType<2, 64, 32, true, true, 0, false, true> {};

typedef uint8_t UnsignedBytes __attribute__((vector_size(WIDTH * 4)));

// -- conversions ---------------------------------------------------------------------------------------------

// Sixteen float16.
inline Vector load_halves(const uint8_t* from) { return load((const Half*)from); }

inline Vector floats_of(const Codes& integers) {
    Vector v;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) v.part[p] = __builtin_convertvector((Ints)integers.part[p], Floats);
    return v;
}

// Scales of one byte, which is signed where there are no minima.
template <class T>
inline Vector load_byte_scales(const uint8_t* from) {
    if constexpr (T::MIN) return floats_of(bytes_widened(from));
    return load((const int8_t*)from);
}

// -- codes ---------------------------------------------------------------------------------------------------

// Codes of eight bits and values of tables are signed; instructions that take unsigned ones get them with 128 added.
#if defined(SPARSECLI_QUADS)
constexpr int SIGNED_ZERO = PANEL_ZERO;
#else
constexpr int SIGNED_ZERO = 0;
#endif
template <class T>
constexpr int32_t ZERO_OF = T::SIGNED ? SIGNED_ZERO : T::ZERO;

constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IqTable {
    alignas(16) uint8_t values[16];

    constexpr IqTable() : values() {
        for (int code = 0; code < 16; ++code) values[code] = uint8_t(IQ4_VALUES[code] + SIGNED_ZERO);
    }
};
constexpr IqTable IQ_TABLE;

// The values of codes, one in each byte, with SIGNED_ZERO added.
inline Codes values_of(Codes c) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) {
#if defined(SPARSECLI_AVX512)
        const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)IQ_TABLE.values));
        c.part[p] = (Lanes)_mm512_shuffle_epi8(table, (__m512i)c.part[p]);
#elif defined(SPARSECLI_AVX2)
        const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)IQ_TABLE.values));
        c.part[p] = (Lanes)_mm256_shuffle_epi8(table, (__m256i)c.part[p]);
#elif defined(SPARSECLI_NEON)
        c.part[p] = (Lanes)vqtbl1q_u8(vld1q_u8(IQ_TABLE.values), (uint8x16_t)c.part[p]);
#else
        for (int i = 0; i < WIDTH; ++i) {
            const uint32_t four = c.part[p][i];
            c.part[p][i] = uint32_t(IQ_TABLE.values[four & 15]) | uint32_t(IQ_TABLE.values[four >> 8 & 15]) << 8 |
                           uint32_t(IQ_TABLE.values[four >> 16 & 15]) << 16 |
                           uint32_t(IQ_TABLE.values[four >> 24]) << 24;
        }
#endif
    }
    return c;
}

// The index-th field of BITS bits of every byte, moved to bit AT; the others are zero.
template <int BITS, int AT>
inline Codes field(const Codes& word, int index) {
    constexpr uint32_t MASK = 0x01010101u * ((1 << BITS) - 1) << AT;
    const int shift = AT - BITS * index;  // to the left
    Codes c = word;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) c.part[p] = (shift > 0 ? c.part[p] << shift : c.part[p] >> -shift) & MASK;
    return c;
}

inline Codes operator|(Codes a, const Codes& b) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) a.part[p] |= b.part[p];
    return a;
}

// Calls use(quad, codes) for the eight quads of 32 columns, with TABLE the values of the codes. Lane r of the i-th 64
// bytes has the lower four bits of quads i and i + 4 of row r. Then follow, with five bits, the fifth of all quads: bit
// q of a byte is that of quad q; with six, the others of quads 0 to 3, two bits each, then of quads 4 to 7. With three,
// there are first the lower two bits of quads 0 to 3, then of quads 4 to 7, then the third of all; with two, there is no
// third. With eight, quads follow one another.
template <class T, class F>
inline void visit_quads(const uint8_t* from, const F& use) {
    if constexpr (T::BITS == 8) {
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
            Codes c = load_codes(from + 64 * q);
            if constexpr (SIGNED_ZERO) {
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; ++p) c.part[p] ^= 0x80808080;
            }
            use(q, c);
        }
    } else if constexpr (T::BITS < 4) {
        Codes third = {};
        if constexpr (T::BITS == 3) third = load_codes(from + 128);
#pragma GCC unroll 2
        for (int w = 0; w < 2; ++w) {
            const Codes two = load_codes(from + 64 * w);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                Codes c = field<2, 0>(two, v);
                if constexpr (T::BITS == 3) c = c | field<1, 2>(third, 4 * w + v);
                use(4 * w + v, c);
            }
        }
    } else {
        constexpr int UPPER = T::BITS == 4 ? 1 : T::BITS - 4, QUADS = 8 / UPPER;  // bits, and quads in 64 bytes
        Codes words[UPPER];
#pragma GCC unroll 2
        for (int w = 0; w < UPPER && T::BITS > 4; ++w) words[w] = load_codes(from + 256 + 64 * w);
        // Where registers are few, one group after the other.
        constexpr int TURNS = T::PARTS_OF_32 == 2 && WIDTH < LANES ? 2 : 1;
#pragma GCC unroll 2
        for (int turn = 0; turn < TURNS; ++turn)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                const Codes c = load_codes(from + 64 * v);
                if (turn == 0) {
                    Codes low = field<4, 0>(c, 0);
                    if constexpr (T::BITS > 4) low = low | field<UPPER, 4>(words[0], v);
                    if constexpr (T::TABLE) low = values_of(low);
                    use(v, low);
                }
                if (turn == TURNS - 1) {
                    Codes high = field<4, 0>(c, 1);
                    if constexpr (T::BITS > 4) high = high | field<UPPER, 4>(words[UPPER - 1], (v + 4) % QUADS);
                    if constexpr (T::TABLE) high = values_of(high);
                    use(v + 4, high);
                }
            }
    }
}

// Sums of products of quads of codes with quads of activations.
template <class T>
struct QuadSums {
    Codes total = {};
#if !defined(SPARSECLI_QUADS) && (defined(SPARSECLI_AVX2) || defined(SPARSECLI_AVX512))
    Codes narrow = {};  // pairs of 16 bits
    int held = 0;       // quads in them
    static constexpr int MOST = T::SIGNED ? 1 : T::BITS == 6 ? 2 : T::BITS == 4 || T::BITS == 2 ? 8 : 4;
    static_assert(T::GROUP / 4 % MOST == 0);
    static_assert(MOST * 2 * 127 * (T::SIGNED ? 128 : (1 << T::BITS) - 1) < 1 << 15);

    void widen() {
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) {
#if defined(SPARSECLI_AVX512)
            total.part[p] += (Lanes)_mm512_madd_epi16((__m512i)narrow.part[p], _mm512_set1_epi16(1));
#else
            total.part[p] += (Lanes)_mm256_madd_epi16((__m256i)narrow.part[p], _mm256_set1_epi16(1));
#endif
        }
        narrow = Codes{};
        held = 0;
    }
#endif

    // Subtracts what products have too much, given the sum of their activations.
    void subtract_zero(const int32_t* sum_of_x) {
        const Ints sum = pair_everywhere(sum_of_x);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) total.part[p] -= (Lanes)(sum * ZERO_OF<T>);
    }

    // Four activations in every lane.
    void add(const Codes& codes, const int8_t* four) {
#if defined(SPARSECLI_VNNI) && defined(SPARSECLI_AVX512)
        Lanes sum = total.part[0];  // by value, so that it stays in a register
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes.part[0]), "m"(*(const char (*)[4])four));
        total.part[0] = sum;
        return;
#endif
        const Ints x = pair_everywhere(four);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) {
#if defined(SPARSECLI_QUADS)
            total.part[p] = (Lanes)add_quads((Ints)total.part[p], (Ints)codes.part[p], x);
#elif defined(SPARSECLI_AVX512)
            __m512i c = (__m512i)codes.part[p], y = (__m512i)x;
            if constexpr (T::SIGNED) {
                y = _mm512_mask_sub_epi8(y, _mm512_movepi8_mask(c), _mm512_setzero_si512(), y);
                c = _mm512_abs_epi8(c);
            }
            narrow.part[p] = (Lanes)((Halves)narrow.part[p] + (Halves)_mm512_maddubs_epi16(c, y));
#elif defined(SPARSECLI_AVX2)
            __m256i c = (__m256i)codes.part[p], y = (__m256i)x;
            if constexpr (T::SIGNED) y = _mm256_sign_epi8(y, c), c = _mm256_abs_epi8(c);
            narrow.part[p] = (Lanes)((Halves)narrow.part[p] + (Halves)_mm256_maddubs_epi16(c, y));
#else
            const Ints c = (Ints)codes.part[p];
            Ints sum = (Ints)total.part[p];
            sum += (c << 24 >> 24) * (x << 24 >> 24) + (c << 16 >> 24) * (x << 16 >> 24);
            total.part[p] = (Lanes)(sum + (c << 8 >> 24) * (x << 8 >> 24) + (c >> 24) * (x >> 24));
#endif
        }
#if !defined(SPARSECLI_QUADS) && (defined(SPARSECLI_AVX2) || defined(SPARSECLI_AVX512))
        if (++held == MOST) widen();
#endif
    }

    Vector floats() const { return floats_of(total); }
};

// -- activations ---------------------------------------------------------------------------------------------

// Bytes of -127 to 127, with the scale of every 32 of them, and the sum of every 16.
void quantise_bytes(const float* values, int64_t count, int8_t* bytes, ByteScale* scales, int32_t* sums) {
    typedef int8_t Narrow __attribute__((vector_size(WIDTH)));
    typedef int8_t NarrowAt __attribute__((vector_size(WIDTH), aligned(1), may_alias));
    for (int64_t group = 0; group < count; group += BYTE_GROUP) {
        const Vector a = load(values + group), b = load(values + group + LANES);
        const float limit = maximum(larger(magnitude(a), magnitude(b)));
        const Floats inverse = broadcast(limit > NOTHING ? 127 / limit : 0);
        const float scale = limit > NOTHING ? limit / 127 : 0;
        int32_t both = 0;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            Ints total = Ints{};
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; ++p) {
                const Ints whole = rounded((half ? b : a).part[p], inverse);
                total += whole;
                *(NarrowAt*)(bytes + group + half * LANES + p * WIDTH) = __builtin_convertvector(whole, Narrow);
            }
            both += sums[group / LANES + half] = sum(total);
        }
        scales[group / BYTE_GROUP] = {scale, scale * float(both)};
    }
}

// Tokens that are multiplied with codes at once: so many sums stay in registers.
#if defined(SPARSECLI_AVX512)
constexpr int GGUF_TOKENS = 8;
#elif defined(SPARSECLI_AVX2) || defined(SPARSECLI_NEON)
constexpr int GGUF_TOKENS = 4;
#else
constexpr int GGUF_TOKENS = 2;
#endif

// -- products ------------------------------------------------------------------------------------------------

// The byte scales of a super block, [group][row]. PACKED ones are six bits with 32 added, as in a file: the lower four
// of groups g and g + 8 in a byte, then the upper two of groups g, g + 4, g + 8 and g + 12.
template <class T>
struct ByteScales {
    const uint8_t* bytes;
    alignas(64) uint8_t unpacked[T::PACKED ? T::GROUPS * LANES : 1];

    explicit ByteScales(const uint8_t* block) : bytes(block + T::SCALES) {
        if constexpr (T::PACKED) {
            const Codes low[2] = {load_codes(bytes), load_codes(bytes + 64)}, high = load_codes(bytes + 128);
#pragma GCC unroll 4
            for (int four = 0; four < 4; ++four) {
                const Codes six = field<4, 0>(low[four % 2], four / 2) | field<2, 4>(high, four);
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; ++p)
                    *(LanesAt*)(unpacked + 64 * four + 4 * WIDTH * p) = (Lanes)((UnsignedBytes)six.part[p] - 32);
            }
            bytes = unpacked;
        }
    }
    ByteScales(const ByteScales&) = delete;
};

// The scales of a group of columns of sixteen rows, and their minima.
template <class T>
inline Vector scales_of(const uint8_t* panel, const uint8_t* block, const ByteScales<T>& scales, int64_t group) {
    if constexpr (T::SUPER)
        return load_halves(T::outer(panel, block)) * load_byte_scales<T>(scales.bytes + group * LANES);
    return load_halves(block + T::SCALES + group * 2 * LANES);
}

template <class T>
inline Vector minima_of(const uint8_t* panel, const uint8_t* block, int64_t group) {
    if constexpr (T::SUPER)
        return fill(0) -
               load_halves(T::outer(panel, block) + 2 * LANES) * load_byte_scales<T>(block + T::MINIMA + group * LANES);
    return load_halves(block + T::MINIMA + group * 2 * LANES);
}

// What follows in memory is prefetched while a block is read for the first time, spread over the block: more requests at
// once than the processor holds would stop it.
template <class T>
inline void prefetch_ahead(const uint8_t* block, int64_t i) {
    constexpr int64_t LINES = (T::BYTES / 64 * 32 + T::BLOCK - 1) / T::BLOCK;
#pragma GCC unroll 16
    for (int64_t line = 0; line < LINES; ++line)
        __builtin_prefetch(block + STREAM_DISTANCE + 64 * (LINES * i + line), 0, 2);
}

// y (N, LANES) += the products of some blocks with N tokens' activations from `column` on. Codes are unpacked once for all
// of them and stay in registers. Every token has its own sums: a result does not depend on the other tokens.
template <class T, int N>
void add_gguf_blocks(const uint8_t* panel, const uint8_t* block, int64_t blocks, bool first, const Activations& x,
                     int64_t token, int64_t column, float* y) {
    constexpr int64_t ALL = T::BLOCK / 32, SUMS = 32 / LANES;
    ByteScale of_x[N][ALL];  // side by side: so many pointers would not fit into registers
    int32_t sums_of_x[N][ZERO_OF<T> ? SUMS * ALL : 1];
    Vector total[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) total[n] = load(y + n * LANES);
    for (; blocks > 0; --blocks, block += T::BYTES, column += T::BLOCK) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const int64_t at = (token + n) * x.stride + column;
            std::memcpy(of_x[n], x.byte_scales + at / 32, sizeof of_x[n]);
            if constexpr (ZERO_OF<T>) std::memcpy(sums_of_x[n], x.byte_sums + at / LANES, sizeof sums_of_x[n]);
        }
        const int8_t* bytes = x.bytes + token * x.stride + column;
        const ByteScales<T> byte_scales(block);
        for (int64_t i = 0; i < ALL; ++i) {
            if (first) prefetch_ahead<T>(block, i);
            QuadSums<T> sums[T::PARTS_OF_32][N];
#pragma GCC unroll 8
            for (int n = 0; ZERO_OF<T> && n < N; ++n)
                for (int s = 0; s < SUMS; ++s)
                    sums[s * T::PARTS_OF_32 / SUMS][n].subtract_zero(sums_of_x[n] + SUMS * i + s);
            visit_quads<T>(block + i * T::CODES, [&](int quad, const Codes& codes) {
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
                    sums[quad * T::PARTS_OF_32 / 8][n].add(codes, bytes + n * x.stride + 32 * i + 4 * quad);
            });
            Vector scales[T::PARTS_OF_32], minima;
#pragma GCC unroll 2
            for (int part = 0; part < T::PARTS_OF_32; ++part)
                scales[part] = scales_of<T>(panel, block, byte_scales, i * T::PARTS_OF_32 + part);
            if constexpr (T::MIN) minima = minima_of<T>(panel, block, i);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Vector products = scales[0] * sums[0][n].floats();
                if constexpr (T::PARTS_OF_32 == 2) add_product(products, scales[1], sums[1][n].floats());
                add_product(total[n], products, fill(of_x[n][i].scale));
                if constexpr (T::MIN) add_product(total[n], minima, fill(of_x[n][i].sum));
            }
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(y + n * LANES, total[n]);
}

// The same for any number of tokens, N at once where so many are left.
template <class T, int N>
inline void add_gguf_tokens(const uint8_t* panel, const uint8_t* block, int64_t blocks, bool first,
                            const Activations& x, int64_t token, int64_t tokens, int64_t column, float* y) {
    for (; tokens >= N; tokens -= N, token += N, y += N * LANES, first = false)
        add_gguf_blocks<T, N>(panel, block, blocks, first, x, token, column, y);
    if constexpr (N > 1)
        if (tokens) add_gguf_tokens<T, N / 2>(panel, block, blocks, first, x, token, tokens, column, y);
}

template <int64_t TYPE>
void gguf_matmul(const Matrix& w, int64_t begin, int64_t end, const Activations& x, int64_t tokens, float* out,
                 int64_t out_stride) {
    using T = Gguf<TYPE>;
    static_assert(T::BYTES == GGUF_BLOCK_BYTES[TYPE - Q4_0]);
    constexpr int64_t STEP = 256 / T::BLOCK;  // blocks that stay in the first-level cache for all tokens
    const int64_t blocks = (w.cols + T::BLOCK - 1) / T::BLOCK, bytes = T::HEAD + blocks * T::BYTES;
    alignas(64) float y[TOKENS_AT_ONCE * LANES];
    for (int64_t row = begin; row < end; row += LANES) {
        const uint8_t* panel = (const uint8_t*)w.data + row / LANES * bytes;
        for (int64_t t = 0; t < tokens; t += TOKENS_AT_ONCE) {
            const int64_t held = t + TOKENS_AT_ONCE < tokens ? TOKENS_AT_ONCE : tokens - t;
            std::memset(y, 0, size_t(held * LANES) * sizeof(float));
            for (int64_t b = 0; b < blocks; b += STEP)
                add_gguf_tokens<T, GGUF_TOKENS>(panel, panel + T::HEAD + b * T::BYTES,
                                                b + STEP < blocks ? STEP : blocks - b, t == 0, x, t, held, b * T::BLOCK,
                                                y);
            for (int64_t u = 0; u < held; ++u)
                std::memcpy(out + (t + u) * out_stride + row, y + u * LANES,
                            size_t(row + LANES <= end ? LANES : end - row) * sizeof(float));
        }
    }
}

// One row's weights, as an embedding needs them: value by value.
template <int64_t TYPE>
void gguf_row(const Matrix& w, int64_t row, float* out) {
    using T = Gguf<TYPE>;
    const int64_t blocks = (w.cols + T::BLOCK - 1) / T::BLOCK, lane = row % LANES;
    const uint8_t* panel = (const uint8_t*)w.data + row / LANES * (T::HEAD + blocks * T::BYTES);
    const auto half = [&](const uint8_t* from) { return to_float(((const Half*)from)[lane]); };
    for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* block = panel + T::HEAD + b * T::BYTES;
        const ByteScales<T> byte_scales(block);
        for (int64_t group = 0; group < T::GROUPS; ++group) {
            float scale, minimum = 0;
            if constexpr (T::SUPER) {
                const uint8_t byte = byte_scales.bytes[group * LANES + lane];
                scale = half(T::outer(panel, block)) * float(T::MIN ? int(byte) : int(int8_t(byte)));
                if constexpr (T::MIN)
                    minimum =
                        -half(T::outer(panel, block) + 2 * LANES) * float(block[T::MINIMA + group * LANES + lane]);
            } else {
                scale = half(block + T::SCALES + group * 2 * LANES);
                if constexpr (T::MIN) minimum = half(block + T::MINIMA + group * 2 * LANES);
            }
            for (int i = 0; i < T::GROUP; ++i) {
                const int64_t column = group * T::GROUP + i, at = column % 32, quad = at / 4;
                const uint8_t* codes = block + column / 32 * T::CODES + 4 * lane + at % 4;
                int code = codes[64 * (T::BITS == 8 ? quad : T::BITS < 4 ? quad / 4 : quad % 4)];
                if constexpr (T::BITS == 8) code = int8_t(code);
                if constexpr (T::BITS < 4) code = code >> 2 * (quad % 4) & 3;
                if constexpr (T::BITS == 3) code |= (codes[128] >> quad & 1) << 2;
                if constexpr (T::BITS >= 4 && T::BITS < 8) code = code >> 4 * (quad / 4) & 15;
                if constexpr (T::BITS == 5) code |= (codes[256] >> quad & 1) << 4;
                if constexpr (T::BITS == 6) code |= (codes[256 + 64 * (quad / 4)] >> 2 * (quad % 4) & 3) << 4;
                if constexpr (T::TABLE) code = IQ4_VALUES[code];
                if (b * T::BLOCK + column < w.cols)
                    out[b * T::BLOCK + column] = scale * float(code - T::ZERO) + minimum;
            }
        }
    }
}

template <class F>
inline void with_gguf_type(int64_t type, const F& use) {
    switch (type) {
        case Q4_0:
            return use.template operator()<Q4_0>();
        case Q4_1:
            return use.template operator()<Q4_1>();
        case Q5_0:
            return use.template operator()<Q5_0>();
        case Q5_1:
            return use.template operator()<Q5_1>();
        case Q8_0:
            return use.template operator()<Q8_0>();
        case IQ4_NL:
            return use.template operator()<IQ4_NL>();
        case IQ4_XS:
            return use.template operator()<IQ4_XS>();
        case Q3_K:
            return use.template operator()<Q3_K>();
        case Q4_K:
            return use.template operator()<Q4_K>();
        case Q5_K:
            return use.template operator()<Q5_K>();
        case Q6_K:
            return use.template operator()<Q6_K>();
        default:
            return use.template operator()<SKETCH>();
    }
}
