// GGUF's blocks put into panels (ops/gguf.inl), row by row; the twin is model/gguf_types.py.
#include <cstring>
#include <vector>

#include "engine.h"
#include "parallel.h"
#include "ops/ops.h"

namespace sparsecli {

namespace {

#include "ops/gguf_blocks.inl"

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
