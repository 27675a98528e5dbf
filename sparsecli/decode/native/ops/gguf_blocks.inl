// Blocks of GGUF's types as they are in files: sizes and codes. Part of all.inl and of gguf.cpp, inside their unnamed
// namespaces; the twin is model/gguf_types.py.

// A type's block in a file: its weights, bytes, bits of a code, whether there are minima.
struct Source {
    int64_t weights, bytes, bits;
    bool minima;
};
constexpr Source SOURCES[] = {{32, 18, 4, false},  {32, 20, 4, true},   {32, 22, 5, false},   {32, 24, 5, true},
                              {32, 34, 8, false},  {32, 18, 4, false},  {256, 136, 4, false}, {256, 110, 3, false},
                              {256, 144, 4, true}, {256, 176, 5, true}, {256, 210, 6, false}};

// The codes of a block of 32 weights whose scales and minima take `at` bytes.
inline void codes_of_32(const Source& source, const uint8_t* from, int64_t at, uint8_t* codes) {
    if (source.bits == 8) {
        std::memcpy(codes, from + at, 32);
        return;
    }
    uint32_t fifth = 0;
    if (source.bits == 5) std::memcpy(&fifth, from + at, 4), at += 4;
    for (int i = 0; i < 16; ++i) {
        codes[i] = uint8_t((from[at + i] & 15) | (fifth >> i & 1) << 4);
        codes[16 + i] = uint8_t(from[at + i] >> 4 | (fifth >> (16 + i) & 1) << 4);
    }
}

inline void codes_of_256(const Source& source, const uint8_t* from, uint8_t* codes) {
    if (source.bits == 3) {
        for (int group = 0; group < 8; ++group)
            for (int i = 0; i < 32; ++i) {
                const uint8_t two = from[32 + 32 * (group / 4) + i] >> 2 * (group % 4) & 3;
                codes[32 * group + i] = uint8_t(two | (from[i] >> group & 1) << 2);
            }
        return;
    }
    if (source.bits == 4 && !source.minima) {
        for (int group = 0; group < 8; ++group) codes_of_32(source, from, 8 + 16 * group, codes + 32 * group);
        return;
    }
    if (source.bits == 6) {  // two halves of 128, with four quarters each
        for (int half = 0; half < 2; ++half, codes += 128) {
            const uint8_t *low = from + 64 * half, *upper = from + 128 + 32 * half;
            for (int i = 0; i < 32; ++i) {
                codes[i] = uint8_t((low[i] & 15) | (upper[i] & 3) << 4);
                codes[32 + i] = uint8_t((low[32 + i] & 15) | (upper[i] >> 2 & 3) << 4);
                codes[64 + i] = uint8_t(low[i] >> 4 | (upper[i] >> 4 & 3) << 4);
                codes[96 + i] = uint8_t(low[32 + i] >> 4 | upper[i] >> 6 << 4);
            }
        }
        return;
    }
    const uint8_t *low = from + source.bytes - 128, *fifth = from + 16;
    for (int pair = 0; pair < 4; ++pair, low += 32)
        for (int i = 0; i < 32; ++i) {
            codes[64 * pair + i] = low[i] & 15;
            codes[64 * pair + 32 + i] = low[i] >> 4;
            if (source.bits == 5) {
                codes[64 * pair + i] |= (fifth[i] >> 2 * pair & 1) << 4;
                codes[64 * pair + 32 + i] |= (fifth[i] >> (2 * pair + 1) & 1) << 4;
            }
        }
}
