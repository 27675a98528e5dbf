// Rows of GGUF's types as they are in files, of which some are read: those of the likeliest tokens, and an embedding's.
// Part of all.inl, inside its namespaces.

// A block taken apart: value = scale * code + minimum, where groups of sixteen weights or of `group` share both.
struct FileBlock {
    int64_t weights, group;
    alignas(64) int8_t codes[256];
    float scales[16], minima[16];  // minima only where the type has them

    void subtract(int zero) {
        for (int64_t i = 0; i < weights; ++i) codes[i] = int8_t(codes[i] - zero);
    }

    FileBlock(int64_t type, const uint8_t* from) {
        const Source& source = SOURCES[type - Q4_0];
        const auto half = [&](int64_t at) {
            Half value;
            std::memcpy(&value, from + at, sizeof value);
            return to_float(value);
        };
        uint8_t* unsigned_codes = (uint8_t*)codes;
        weights = source.weights, group = 32;
        if (weights == 32) {
            codes_of_32(source, from, source.minima ? 4 : 2, unsigned_codes);
            scales[0] = half(0);
            if (source.minima) minima[0] = half(2);
            if (type == Q4_0) subtract(8);
            if (type == Q5_0) subtract(16);
        } else {
            codes_of_256(source, from, unsigned_codes);
        }
        if (type == Q3_K) {
            group = 16;
            const uint8_t* packed = from + 96;
            for (int g = 0; g < 16; ++g) {
                const int low = packed[g % 8] >> 4 * (g / 8) & 15, high = packed[8 + g % 4] >> 2 * (g / 4) & 3;
                scales[g] = half(108) * float((low | high << 4) - 32);
            }
            subtract(4);
        }
        if (type == Q6_K) {
            group = 16;
            for (int g = 0; g < 16; ++g) scales[g] = half(208) * float(int8_t(from[192 + g]));
            subtract(32);
        }
        if (type == IQ4_XS)
            for (int g = 0; g < 8; ++g) {
                const int low = from[4 + g / 2] >> 4 * (g % 2) & 15, high = from[2 + g / 4] >> 2 * (g % 4) & 3;
                scales[g] = half(0) * float((low | high << 4) - 32);
            }
        if (type == IQ4_XS || type == IQ4_NL)
            for (int64_t i = 0; i < weights; ++i) codes[i] = IQ4_VALUES[unsigned_codes[i]];
        if (type == Q4_K || type == Q5_K) {
            const uint8_t* packed = from + 4;
            for (int g = 0; g < 8; ++g) {
                const int low = g < 4 ? packed[g] & 63 : (packed[g + 4] & 15) | packed[g - 4] >> 6 << 4;
                const int minimum = g < 4 ? packed[g + 4] & 63 : packed[g + 4] >> 4 | packed[g] >> 6 << 4;
                scales[g] = half(0) * float(low);
                minima[g] = -half(2) * float(minimum);
            }
        }
    }
};

inline int64_t file_row_bytes(const Matrix& w) {
    const Source& source = SOURCES[w.type - Q4_0];
    return w.cols / source.weights * source.bytes;
}

// The sum of COUNT products of bytes, which is exact.
template <int COUNT>
inline int32_t byte_dot(const int8_t* a, const int8_t* b) {
    int32_t sum = 0;
    for (int i = 0; i < COUNT; ++i) sum += int32_t(a[i]) * b[i];
    return sum;
}

float file_row_dot(const Matrix& w, const uint8_t* row, const Activations& x) {
    const Source& source = SOURCES[w.type - Q4_0];
    float y = 0;
    for (int64_t column = 0; column < w.cols; column += source.weights, row += source.bytes) {
        const FileBlock block(w.type, row);
        for (int64_t first = 0; first < block.weights; first += block.group) {
            const int64_t at = column + first, group = first / block.group;
            const ByteScale& of_x = x.byte_scales[at / BYTE_GROUP];
            const int32_t sum = block.group == 16 ? byte_dot<16>(block.codes + first, x.bytes + at)
                                                  : byte_dot<32>(block.codes + first, x.bytes + at);
            y += block.scales[group] * (float(sum) * of_x.scale);
            if (source.minima) y += block.minima[group] * of_x.sum;
        }
    }
    return y;
}

void gguf_row_dots(const Matrix& w, const int32_t* rows, int64_t count, const Activations& x, float* out) {
    constexpr int64_t AHEAD = 2;  // rows that are prefetched
    const int64_t bytes = file_row_bytes(w);
    const auto prefetch_row = [&](int64_t i) {
        if (i < count) prefetch((const uint8_t*)w.data + rows[i] * bytes, bytes);
    };
    for (int64_t i = 0; i < AHEAD; ++i) prefetch_row(i);
    for (int64_t i = 0; i < count; ++i) {
        prefetch_row(i + AHEAD);
        out[rows[i]] = file_row_dot(w, (const uint8_t*)w.data + rows[i] * bytes, x);
    }
}

void read_file_row(const Matrix& w, int64_t row, float* out) {
    const Source& source = SOURCES[w.type - Q4_0];
    const uint8_t* from = (const uint8_t*)w.data + row * file_row_bytes(w);
    for (int64_t column = 0; column < w.cols; column += source.weights, from += source.bytes) {
        const FileBlock block(w.type, from);
        for (int64_t i = 0; i < block.weights; ++i) {
            const int64_t group = i / block.group;
            out[column + i] = block.scales[group] * float(block.codes[i]) + (source.minima ? block.minima[group] : 0);
        }
    }
}

void read_gguf(const Matrix& w, int64_t row, float* out) {
    if (w.by_rows) return read_file_row(w, row, out);
    with_gguf_type(w.type, [&]<int64_t TYPE>() { gguf_row<TYPE>(w, row, out); });
}
