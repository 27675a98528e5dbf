// GGUF's blocks put into panels (ops/gguf.inl), row by row; the twin is model/gguf_types.py.
#include <cstring>
#include <vector>

#include "engine.h"
#include "parallel.h"
#include "ops/ops.h"

namespace sparsecli {

namespace {

// A type's block in a file: its weights, bytes, bits of a code, whether there are minima.
struct Source {
    int64_t weights, bytes, bits;
    bool minima;
};
constexpr Source SOURCES[] = {{32, 18, 4, false},  {32, 20, 4, true},   {32, 22, 5, false},   {32, 24, 5, true},
                              {32, 34, 8, false},  {32, 18, 4, false},  {256, 136, 4, false}, {256, 110, 3, false},
                              {256, 144, 4, true}, {256, 176, 5, true}, {256, 210, 6, false}};

// The codes of a block of 32 weights whose scales and minima take `at` bytes.
void codes_of_32(const Source& source, const uint8_t* from, int64_t at, uint8_t* codes) {
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

void codes_of_256(const Source& source, const uint8_t* from, uint8_t* codes) {
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

// The bytes of 32 codes of one row, `to` being those of its lane.
void write_codes(int64_t bits, const uint8_t* codes, uint8_t* to) {
    for (int i = 0; i < 16; ++i) {
        const int at = 64 * (i / 4) + i % 4;
        if (bits == 8) {
            to[at] = codes[i];
            to[256 + at] = codes[16 + i];
            continue;
        }
        if (bits == 3) {
            for (int half = 0; half < 2; ++half) {
                const uint8_t code = codes[16 * half + i];
                to[64 * half + i % 4] |= uint8_t((code & 3) << 2 * (i / 4));
                to[128 + i % 4] |= uint8_t((code >> 2) << (4 * half + i / 4));
            }
            continue;
        }
        to[at] = uint8_t((codes[i] & 15) | codes[16 + i] << 4);
    }
    for (int i = 0; i < 32 && bits == 5; ++i) to[256 + i % 4] |= uint8_t((codes[i] >> 4) << i / 4);
    for (int i = 0; i < 32 && bits == 6; ++i)
        to[256 + 64 * (i / 16) + i % 4] |= uint8_t((codes[i] >> 4) << 2 * (i / 4 % 4));
}

void write_row(int64_t type, const uint8_t* raw, int64_t cols, int64_t lane, uint8_t* panel) {
    const Source& source = SOURCES[type - Q4_0];
    const int64_t block_cols = gguf_block(type), bytes = GGUF_BLOCK_BYTES[type - Q4_0];
    const int64_t code_bytes = block_cols / 32 * 64 * source.bits;
    uint8_t codes[256];
    for (int64_t col = 0; col < cols; col += source.weights, raw += source.bytes) {
        uint8_t* block = panel + col / block_cols * bytes;
        uint8_t* scales = block + code_bytes;
        const int64_t group = col % block_cols / 32;
        if (source.weights == 32) {
            codes_of_32(source, raw, source.minima ? 4 : 2, codes);
            write_codes(source.bits, codes, block + group * 64 * source.bits + 4 * lane);
            std::memcpy(scales + 2 * (group * LANES + lane), raw, 2);
            if (source.minima) std::memcpy(scales + 2 * ((2 + group) * LANES + lane), raw + 2, 2);
            continue;
        }
        codes_of_256(source, raw, codes);
        for (int64_t g = 0; g < 8; ++g)
            write_codes(source.bits, codes + 32 * g, block + g * 64 * source.bits + 4 * lane);
        if (source.bits == 6) {
            for (int64_t g = 0; g < 16; ++g) scales[g * LANES + lane] = raw[192 + g];
            std::memcpy(scales + 16 * LANES + 2 * lane, raw + 208, 2);
            continue;
        }
        if (source.bits == 3) {  // packed as in the file
            for (int64_t g = 0; g < 12; ++g) scales[g * LANES + lane] = raw[96 + g];
            std::memcpy(scales + 12 * LANES + 2 * lane, raw + 108, 2);
            continue;
        }
        if (!source.minima) {  // IQ4_XS
            for (int64_t g = 0; g < 8; ++g) {
                const int upper = raw[2 + g / 4] >> 2 * (g % 4) & 3;
                scales[g * LANES + lane] = uint8_t(((raw[4 + g / 2] >> 4 * (g % 2) & 15) | upper << 4) - 32);
            }
            std::memcpy(scales + 8 * LANES + 2 * lane, raw, 2);
            continue;
        }
        const uint8_t* packed = raw + 4;  // six bits of eight scales and eight minima
        for (int64_t g = 0; g < 8; ++g) {
            const bool upper = g >= 4;
            const uint8_t scale = upper ? packed[g + 4] & 15 | packed[g - 4] >> 6 << 4 : packed[g] & 63;
            const uint8_t minimum = upper ? packed[g + 4] >> 4 | packed[g] >> 6 << 4 : packed[g + 4] & 63;
            scales[g * LANES + lane] = scale;
            scales[(8 + g) * LANES + lane] = minimum;
        }
        std::memcpy(scales + 16 * LANES + 2 * lane, raw, 2);
        std::memcpy(scales + 18 * LANES + 2 * lane, raw + 2, 2);
    }
}

}  // namespace
}  // namespace sparsecli

using namespace sparsecli;

int64_t sparsecli_arrange_gguf(int64_t type, const uint8_t* raw, int64_t rows, int64_t cols, uint8_t* panels,
                               int64_t threads) {
    if (type < Q4_0 || type > Q6_K || cols % SOURCES[type - Q4_0].weights) return -1;
    const Source& source = SOURCES[type - Q4_0];
    const int64_t row_bytes = cols / source.weights * source.bytes, bytes = gguf_panel(cols, type);
    const int64_t count = (rows + LANES - 1) / LANES;
    const std::vector<uint8_t> zeros(size_t(row_bytes), 0);  // rows that fill the last panel
    in_parallel(threads, [&](int64_t number) {
        const int64_t first = count * number / threads, last = count * (number + 1) / threads;
        for (int64_t row = first * LANES; row < last * LANES; ++row)
            write_row(type, row < rows ? raw + row * row_bytes : zeros.data(), cols, row % LANES,
                      panels + row / LANES * bytes);
    });
    return 0;
}
