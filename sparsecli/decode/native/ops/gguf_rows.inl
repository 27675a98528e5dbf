// Rows of GGUF's types as they are in files, of which some are read: those of the likeliest tokens, and an embedding's.
// Part of all.inl, inside its namespaces.

// A block taken apart: value = scale * code + minimum, where the GROUP weights of a group share both.
template <int64_t TYPE>
struct FileBlock {
    static constexpr const Source& SOURCE = SOURCES[TYPE - Q4_0];
    static constexpr int64_t WEIGHTS = SOURCE.weights, GROUP = TYPE == Q3_K || TYPE == Q6_K ? 16 : 32;
    alignas(64) int8_t codes[WEIGHTS];
    float scales[WEIGHTS / GROUP], minima[WEIGHTS / GROUP];  // minima only where the type has them

    void subtract(int zero) {
        for (int64_t i = 0; i < WEIGHTS; ++i) codes[i] = int8_t(codes[i] - zero);
    }

    explicit FileBlock(const uint8_t* from) {
        const auto half = [&](int64_t at) {
            Half value;
            std::memcpy(&value, from + at, sizeof value);
            return to_float(value);
        };
        uint8_t* unsigned_codes = (uint8_t*)codes;
        if constexpr (WEIGHTS == 32) {
            codes_of_32(SOURCE, from, SOURCE.minima ? 4 : 2, unsigned_codes);
            scales[0] = half(0);
            if constexpr (SOURCE.minima) minima[0] = half(2);
            if constexpr (TYPE == Q4_0) subtract(8);
            if constexpr (TYPE == Q5_0) subtract(16);
        } else {
            codes_of_256(SOURCE, from, unsigned_codes);
        }
        if constexpr (TYPE == Q3_K) {
            const uint8_t* packed = from + 96;
            for (int g = 0; g < 16; ++g) {
                const int low = packed[g % 8] >> 4 * (g / 8) & 15, high = packed[8 + g % 4] >> 2 * (g / 4) & 3;
                scales[g] = half(108) * float((low | high << 4) - 32);
            }
            subtract(4);
        }
        if constexpr (TYPE == Q6_K) {
            for (int g = 0; g < 16; ++g) scales[g] = half(208) * float(int8_t(from[192 + g]));
            subtract(32);
        }
        if constexpr (TYPE == IQ4_XS)
            for (int g = 0; g < 8; ++g) {
                const int low = from[4 + g / 2] >> 4 * (g % 2) & 15, high = from[2 + g / 4] >> 2 * (g % 4) & 3;
                scales[g] = half(0) * float((low | high << 4) - 32);
            }
        if constexpr (TYPE == IQ4_XS || TYPE == IQ4_NL)
            for (int64_t i = 0; i < WEIGHTS; ++i) codes[i] = IQ4_VALUES[unsigned_codes[i]];
        if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
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

// Sketches are in no file.
template <class F>
inline void with_file_type(int64_t type, const F& use) {
    with_gguf_type(type, [&]<int64_t TYPE>() {
        if constexpr (TYPE != SKETCH) use.template operator()<TYPE>();
    });
}

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

template <int64_t TYPE>
float file_row_dot(const uint8_t* row, int64_t cols, const Activations& x) {
    using Block = FileBlock<TYPE>;
    float y = 0;
    for (int64_t column = 0; column < cols; column += Block::WEIGHTS, row += Block::SOURCE.bytes) {
        const Block block(row);
        int32_t sums[Block::WEIGHTS / Block::GROUP];
        for (int64_t g = 0; g < Block::WEIGHTS / Block::GROUP; ++g)
            sums[g] = byte_dot<Block::GROUP>(block.codes + g * Block::GROUP, x.bytes + column + g * Block::GROUP);
        for (int64_t g = 0; g < Block::WEIGHTS / Block::GROUP; ++g) {
            const int64_t at = column + g * Block::GROUP;
            const ByteScale& of_x = x.byte_scales[at / BYTE_GROUP];
            y += block.scales[g] * (float(sums[g]) * of_x.scale);
            if constexpr (Block::SOURCE.minima) y += block.minima[g] * of_x.sum;
        }
    }
    return y;
}

void gguf_row_dots(const Matrix& w, const int32_t* rows, int64_t count, const Activations& x, float* out) {
    constexpr int64_t AHEAD = 3;  // rows that are prefetched
    const int64_t bytes = file_row_bytes(w);
    const auto row_at = [&](int64_t i) { return (const uint8_t*)w.data + rows[i] * bytes; };
    for (int64_t i = 0; i < AHEAD && i < count; ++i) prefetch(row_at(i), bytes);
    with_file_type(w.type, [&]<int64_t TYPE>() {
        for (int64_t i = 0; i < count; ++i) {
            if (i + AHEAD < count) prefetch(row_at(i + AHEAD), bytes);
            out[rows[i]] = file_row_dot<TYPE>(row_at(i), w.cols, x);
        }
    });
}

void read_file_row(const Matrix& w, int64_t row, float* out) {
    const uint8_t* from = (const uint8_t*)w.data + row * file_row_bytes(w);
    with_file_type(w.type, [&]<int64_t TYPE>() {
        using Block = FileBlock<TYPE>;
        for (int64_t column = 0; column < w.cols; column += Block::WEIGHTS, from += Block::SOURCE.bytes) {
            const Block block(from);
            for (int64_t i = 0; i < Block::WEIGHTS; ++i) {
                const int64_t g = i / Block::GROUP;
                out[column + i] =
                    block.scales[g] * float(block.codes[i]) + (Block::SOURCE.minima ? block.minima[g] : 0);
            }
        }
    });
}

void read_gguf(const Matrix& w, int64_t row, float* out) {
    if (w.by_rows) return read_file_row(w, row, out);
    with_gguf_type(w.type, [&]<int64_t TYPE>() { gguf_row<TYPE>(w, row, out); });
}
