// Plain twins of the ops: element by element, in double, from the layouts that ops.h describes. The harness
// (tests/ops.cpp) compares every instruction set with them. They are not part of the library.
//
// A twin that returns `Sum`s also gives the sum of magnitudes, on which rounding errors depend.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "ops/ops.h"

namespace sparsecli::scalar {

struct Sum {
    double value = 0, magnitude = 0;

    void add(double product) { value += product, magnitude += std::fabs(product); }
};

inline float bfloat16_value(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t bfloat16_of(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline double half_value(uint16_t bits) {  // of a float16 that is finite
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits >> 15 ? -size : size;
}

// -- offsets of elements -------------------------------------------------------------------------------------

inline int64_t rows_offset(const Matrix& w, int64_t row, int64_t col) { return row * round_up(w.cols, PAD) + col; }

inline int64_t spans_offset(const Matrix& w, int64_t row, int64_t col) {
    const int64_t first = col / SPAN * SPAN, width = std::min(SPAN, round_up(w.cols, PAD) - first);
    return first * w.rows + row * width + col - first;
}

// `inputs` of a panel in memory: of E all, of a convolution those of one tap.
inline int64_t panels_offset(int64_t type, int64_t outputs, int64_t inputs, int64_t output, int64_t input) {
    const int64_t first = output / PANEL * PANEL, width = std::min(PANEL, round_up(outputs, LANES) - first);
    const int64_t pack = 4 / type_bytes(type);
    return first * inputs + input / pack * pack * width + (output - first) * pack + input % pack;
}

inline int64_t blocks_offset(int64_t type, const Choice& c, int64_t block, int64_t rank, int64_t unit) {
    const int64_t first = block * c.padded_block * c.rank, pack = type == FLOAT32 ? 1 : 2;
    return first + rank / pack * pack * c.padded_block + unit * pack + rank % pack;
}

inline double stored(const void* data, int64_t type, int64_t offset) {
    if (type == FLOAT32) return ((const float*)data)[offset];
    if (type == BFLOAT16) return bfloat16_value(((const uint16_t*)data)[offset]);
    if (type == FLOAT16) return half_value(((const uint16_t*)data)[offset]);
    return ((const int8_t*)data)[offset];
}

// Codes, scales and zeros of a quantized matrix.
struct Quantized {
    const uint8_t* panel;
    int64_t groups, bits, lane;

    Quantized(const Matrix& w, int64_t row)
        : panel((const uint8_t*)w.data + row / LANES * quantized_panel(w.cols, w.type == INT4 ? 4 : 3)),
          groups(groups_of(w.cols)),
          bits(w.type == INT4 ? 4 : 3),
          lane(row % LANES) {}

    uint32_t word(int64_t group, int64_t index) const {
        uint32_t value;
        std::memcpy(&value, panel + ((group * 2 * bits + index) * LANES + lane) * 4, 4);
        return value;
    }

    int64_t code(int64_t col) const {
        const int64_t group = col / QUANT_GROUP, i = col % QUANT_GROUP, half = 16 * (i % 2);
        if (bits == 4) return word(group, i / 8) >> (i % 8 / 2 * 4 + half) & 15;
        const int64_t index = i / 16, field = i % 16 / 2, offset = 2 * field + half;
        const bool odd = field % 2;
        const int64_t two = word(group, index) >> offset & 3;
        const int64_t one = word(group, 4 + index / 2) >> ((offset + (odd ? -1 : 2) + 2 * (index % 2)) % 32) & 1;
        return odd ? two << 1 | one : two | one << 2;
    }

    double scale(int64_t group) const {
        uint16_t bits16;
        std::memcpy(&bits16, panel + groups * 2 * bits * LANES * 4 + (group * LANES + lane) * 2, 2);
        return bfloat16_value(bits16);
    }

    double zero(int64_t group) const {
        return panel[groups * (2 * bits * LANES * 4 + LANES * 2) + group * LANES + lane] / 16.0;
    }

    double value(int64_t col) const { return scale(col / QUANT_GROUP) * (code(col) - zero(col / QUANT_GROUP)); }
};

// Weights of a row in one of GGUF's types, from its panel.
struct GgufRow {
    const uint8_t* panel;
    int64_t type, lane;

    GgufRow(const Matrix& w, int64_t row)
        : panel((const uint8_t*)w.data + row / LANES * gguf_panel(w.cols, w.type)), type(w.type), lane(row % LANES) {}

    static double half(const uint8_t* from) { return half_value(uint16_t(from[0] | from[1] << 8)); }

    double value(int64_t col) const {
        const auto [product, minimum] = parts(col);
        return product + minimum;
    }

    // scale * code, and the minimum: ops sum them up apart, and both are rounded.
    std::pair<double, double> parts(int64_t col) const {
        const bool super = type >= IQ4_XS, sketch = type == SKETCH;
        const bool minima = type == Q4_1 || type == Q5_1 || type == Q4_K || type == Q5_K || sketch;
        const bool five = type == Q5_0 || type == Q5_1 || type == Q5_K;
        const int64_t bits = type == Q8_0 ? 8 : type == Q6_K ? 6 : five ? 5 : type == Q3_K ? 3 : sketch ? 2 : 4;
        const int64_t block = gguf_block(type), in_block = col % block, size = type == Q6_K || type == Q3_K ? 16 : 32;
        const uint8_t* at = panel + gguf_panel_head(type) + col / block * GGUF_BLOCK_BYTES[type - Q4_0];
        // Codes: of every 32 columns, [word][row][4].
        const uint8_t* codes = at + in_block / 32 * 64 * bits + 4 * lane + col % 4;
        const int64_t quad = in_block % 32 / 4;
        int64_t code = bits == 8   ? int8_t(codes[64 * quad])
                       : bits <= 3 ? codes[64 * (quad / 4)] >> 2 * (quad % 4) & 3
                                   : codes[64 * (quad % 4)] >> 4 * (quad / 4) & 15;
        if (bits == 3) code += (codes[128] >> quad & 1) * 4;
        if (bits == 5) code += (codes[256] >> quad & 1) * 16;
        if (bits == 6) code += (codes[256 + 64 * (quad / 4)] >> 2 * (quad % 4) & 3) * 16;
        if (type == Q4_0) code -= 8;
        if (type == Q5_0) code -= 16;
        if (type == Q6_K) code -= 32;
        if (type == Q3_K) code -= 4;
        constexpr int VALUES[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
        if (type == IQ4_NL || type == IQ4_XS) code = VALUES[code];
        const uint8_t* scales = at + block / 32 * 64 * bits;
        const int64_t group = in_block / size, groups = block / size;
        if (type == Q3_K) {  // 12 rows of bytes hold 16 of scales
            const int64_t low = scales[group % 8 * LANES + lane] >> 4 * (group / 8) & 15;
            const int64_t high = scales[(8 + group % 4) * LANES + lane] >> 2 * (group / 4) & 3;
            return {half(scales + 12 * LANES + 2 * lane) * double((low + 16 * high - 32) * code), 0};
        }
        if (!super) {
            const double minimum = minima ? half(scales + 2 * ((groups + group) * LANES + lane)) : 0;
            return {half(scales + 2 * (group * LANES + lane)) * double(code), minimum};
        }
        const uint8_t* of_block = sketch ? panel : scales + (minima ? 2 : 1) * groups * LANES;
        const int64_t byte = scales[group * LANES + lane];
        const double scale = half(of_block + 2 * lane) * double(minima ? byte : int8_t(byte));
        if (!minima) return {scale * double(code), 0};
        return {scale * double(code), -half(of_block + 2 * (LANES + lane)) * scales[(groups + group) * LANES + lane]};
    }
};

// A weight of GGUF's types in a row as it is in a file, read as the format says: scale * code, and the minimum.
inline std::pair<double, double> file_parts(const Matrix& w, int64_t row, int64_t col) {
    const int64_t type = w.type, weights = gguf_block(type) == 256 ? 256 : 32;
    constexpr int64_t BYTES[] = {18, 20, 22, 24, 34, 18, 136, 110, 144, 176, 210};  // by type - Q4_0
    const uint8_t* at = (const uint8_t*)w.data + (row * (w.cols / weights) + col / weights) * BYTES[type - Q4_0];
    const int64_t i = col % weights, group = i / 32, half = i / 128, quarter = i % 128 / 32;
    const auto scale = [&](int64_t from) { return GgufRow::half(at + from); };
    constexpr int VALUES[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const auto nibble = [&](int64_t from) { return at[from + i % 16] >> 4 * (i % 32 / 16) & 15; };
    const auto fifth = [&](int64_t from) { return (at[from + i / 8] >> i % 8 & 1) * 16; };
    switch (type) {
        case Q4_0:
            return {scale(0) * (nibble(2) - 8), 0};
        case Q4_1:
            return {scale(0) * nibble(4), scale(2)};
        case Q5_0:
            return {scale(0) * (nibble(6) + fifth(2) - 16), 0};
        case Q5_1:
            return {scale(0) * (nibble(8) + fifth(4)), scale(2)};
        case Q8_0:
            return {scale(0) * int8_t(at[2 + i]), 0};
        case IQ4_NL:
            return {scale(0) * VALUES[nibble(2)], 0};
        case IQ4_XS: {
            const int low = at[4 + group / 2] >> 4 * (group % 2) & 15, high = at[2 + group / 4] >> 2 * (group % 4) & 3;
            return {scale(0) * (low + 16 * high - 32) * VALUES[nibble(8 + 16 * group)], 0};
        }
        case Q3_K: {
            const int64_t g = i / 16;
            const int low = at[96 + g % 8] >> 4 * (g / 8) & 15, high = at[104 + g % 4] >> 2 * (g / 4) & 3;
            const int code = (at[32 + 32 * half + i % 32] >> 2 * quarter & 3) + (at[i % 32] >> group & 1) * 4;
            return {scale(108) * (low + 16 * high - 32) * (code - 4), 0};
        }
        case Q6_K: {
            const int low = at[64 * half + i % 64] >> 4 * (i % 128 / 64) & 15;
            const int code = low + (at[128 + 32 * half + i % 32] >> 2 * quarter & 3) * 16;
            return {scale(208) * int8_t(at[192 + i / 16]) * (code - 32), 0};
        }
    }
    const uint8_t* six = at + 4;  // Q4_K and Q5_K
    const int of_scale = group < 4 ? six[group] & 63 : (six[group + 4] & 15) + (six[group - 4] >> 6) * 16;
    const int of_minimum = group < 4 ? six[group + 4] & 63 : (six[group + 4] >> 4) + (six[group] >> 6) * 16;
    const int low = at[(type == Q5_K ? 48 : 16) + 32 * (group / 2) + i % 32] >> 4 * (group % 2) & 15;
    const int code = low + (type == Q5_K ? (at[16 + i % 32] >> group & 1) * 16 : 0);
    return {scale(0) * of_scale * code, -scale(2) * of_minimum};
}

// An activation's integer; `bytes`: see Ops.
inline int16_t integer(bool bytes, const int16_t* integers, int64_t i) {
    if (!bytes) return integers[i];
    const int8_t* sixteen = (const int8_t*)(integers + i / 16 * 16);
    return int16_t(sixteen[16 + i % 16] * 256 + sixteen[i % 16]);
}

// The activation that a weight is multiplied with: a float, or a 16-bit integer times its row's scale.
inline double input(const Activations& x, int64_t type, int64_t token, int64_t col) {
    if (type <= BFLOAT16 || type == FLOAT16) return x.values[token * x.stride + col];
    if (of_gguf(type))
        return double(x.bytes[token * x.stride + col]) * x.byte_scales[(token * x.stride + col) / BYTE_GROUP].scale;
    return double(x.integers[token * x.stride + col]) * x.scales[token];
}

// -- ops -----------------------------------------------------------------------------------------------------

inline Sum matmul(const Matrix& w, int64_t row, const Activations& x, int64_t token) {
    Sum sum;
    for (int64_t col = 0; col < w.cols; ++col) {
        if (of_gguf(w.type)) {
            const auto [product, minimum] = w.by_rows ? file_parts(w, row, col) : GgufRow(w, row).parts(col);
            const double x_col = input(x, w.type, token, col);
            sum.add(product * x_col);
            sum.add(minimum * x_col);
            continue;
        }
        const double weight = w.type == INT4 || w.type == INT3 ? Quantized(w, row).value(col)
                                                               : stored(w.data, w.type, spans_offset(w, row, col)) *
                                                                     (w.type == INT8 ? w.scale[row] : 1);
        sum.add(weight * input(x, w.type, token, col));
    }
    return sum;
}

// Products of a module as they are rounded: as floats, as bfloat16, or for each GROUP of inputs as 8-bit integers and a
// scale.
inline std::vector<double> products(const Matrix& D, int64_t type, const float* x, int64_t module) {
    std::vector<float> all;
    for (int64_t i = 0; i < D.cols; ++i) all.push_back(x[i] * float(stored(D.data, D.type, rows_offset(D, module, i))));
    std::vector<double> kept;
    for (int64_t first = 0; first < D.cols; first += GROUP) {
        const int64_t last = std::min(first + GROUP, D.cols);
        float top = 0;
        for (int64_t i = first; i < last; ++i) top = std::max(top, std::fabs(all[size_t(i)]));
        for (int64_t i = first; i < last; ++i) {
            const float value = all[size_t(i)];
            if (type == FLOAT32) kept.push_back(value);
            if (type == BFLOAT16) kept.push_back(bfloat16_value(bfloat16_of(value)));
            if (type == INT8) kept.push_back(top > 1e-30f ? std::nearbyint(value * (127 / top)) * (top / 127) : 0);
        }
    }
    return kept;
}

inline Sum multiplicative(const Matrix& D, const Matrix& E, const std::vector<double>& products, int64_t module,
                          int64_t output) {
    Sum sum;
    for (int64_t i = 0; i < E.cols; ++i) {
        const int64_t offset = panels_offset(E.type, E.rows, round_up(E.cols, PAD), output, i);
        const double weight = E.type == INT8 ? (((const uint8_t*)E.data)[offset] - 128) * double(E.scale[output])
                                             : stored(E.data, E.type, offset);
        sum.add(products[size_t(i)] * weight * (D.type == INT8 ? D.scale[module] : 1));
    }
    return sum;
}

inline Sum convolve(const Matrix& kernel, int64_t taps, const void* const* rows, int64_t stride, int64_t lead,
                    int64_t module, int64_t output) {
    const int64_t inputs = kernel.cols / taps, padded = round_up(inputs, 4);
    Sum sum;
    for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t i = 0; i < inputs; ++i) {
            const int64_t offset = tap * padded * round_up(kernel.rows, LANES) +
                                   panels_offset(kernel.type, kernel.rows, padded, output, i);
            sum.add(stored(rows[tap], kernel.type, module * stride - lead + i) *
                    stored(kernel.data, kernel.type, offset));
        }
    return sum;
}

inline Sum controller_logit(const Matrix& second, const Choice& c, const Activations& z, int64_t token, int64_t block,
                            int64_t unit) {
    Sum sum;
    for (int64_t i = 0; i < c.rank; ++i)
        sum.add(stored(second.data, second.type, blocks_offset(second.type, c, block, i, unit)) *
                input(z, second.type, token, i) *
                (second.type == INT8 ? second.scale[block * c.padded_block + unit] : 1));
    return sum;
}

inline double activation(int64_t kind, double x) {
    if (kind == RELU) return x > 0 ? x : 0;
    if (kind == SILU) return x / (1 + std::exp(-x));
    if (kind == GELU_TANH) return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
}

// Row `part` of a unit with the only token.
inline Sum unit_dot(const Matrix& units, int64_t parts, int64_t unit, int64_t part, const Activations& x) {
    const int64_t row = unit * parts + part;
    Sum sum;
    for (int64_t col = 0; col < units.cols; ++col)
        sum.add(stored(units.data, units.type, rows_offset(units, row, col)) * input(x, units.type, 0, col) *
                (units.type == INT8 ? units.scale[row] : 1));
    return sum;
}

inline double unit_value(const Matrix& units, int64_t parts, int64_t unit, int64_t col) {
    const int64_t row = unit * parts + parts - 1;
    return stored(units.data, units.type, rows_offset(units, row, col)) * (units.type == INT8 ? units.scale[row] : 1);
}

inline double residual_value(const Matrix& residual, int64_t parts, int64_t unit, int64_t row, int64_t col) {
    const uint8_t* codes =
        (const uint8_t*)residual.data + unit * residual_unit(residual.cols, parts) + row * residual_row(residual.cols);
    const int64_t group = col / QUANT_GROUP, i = col % QUANT_GROUP, half = QUANT_GROUP / 2;
    const uint8_t both = codes[group * half + i % half];
    uint16_t scale;
    std::memcpy(&scale, codes + groups_of(residual.cols) * half + group * 2, 2);
    return ((i < half ? both & 15 : both >> 4) - 8) * double(bfloat16_value(scale));
}

inline double cached(const void* data, const float* scales, int64_t type, int64_t position, int64_t offset) {
    return stored(data, type, offset) * (type == INT8 ? scales[position] : 1);
}

inline double key_at(const HeadCache& cache, int64_t type, int64_t width, int64_t stride, int64_t position, int64_t i) {
    const int64_t offset =
        cache.by_rows ? position * stride + i : position / LANES * width * LANES + i * LANES + position % LANES;
    return cached(cache.keys, cache.key_scales, type, position, offset);
}

// Attention of one query to some positions: `width` numbers, and how large scores are; `softcap` limits them unless 0.
inline std::vector<Sum> attend(const float* query, const std::vector<int64_t>& positions, int64_t type, int64_t width,
                               const HeadCache& cache, int64_t stride, double scale, double softcap,
                               double& score_size) {
    std::vector<double> scores;
    double top = -INFINITY, total = 0;
    for (const int64_t position : positions) {
        Sum score;
        for (int64_t i = 0; i < width; ++i)
            score.add(query[i] * key_at(cache, type, width, stride, position, i) * scale);
        if (softcap) score.value = softcap * std::tanh(score.value / softcap);
        scores.push_back(score.value);
        top = std::max(top, score.value);
        score_size = std::max(score_size, score.magnitude);
    }
    for (double& score : scores) total += score = std::exp(score - top);
    std::vector<Sum> out(static_cast<size_t>(width));
    for (size_t at = 0; at < positions.size(); ++at)
        for (int64_t i = 0; i < width; ++i)
            out[size_t(i)].add(
                scores[at] / total *
                cached(cache.values, cache.value_scales, type, positions[at], positions[at] * stride + i));
    return out;
}

// The slope of an activation.
inline double slope(int64_t kind, double x) {
    if (kind == RELU) return x > 0;
    if (kind == SILU) {
        const double share = 1 / (1 + std::exp(-x));
        return share + x * share * (1 - share);
    }
    if (kind == GELU) return 0.5 * (1 + std::erf(x / std::sqrt(2.0))) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
    const double root = std::sqrt(2 / M_PI), rise = std::tanh(root * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + rise) + 0.5 * x * (1 - rise * rise) * root * (1 + 3 * 0.044715 * x * x);
}

// Gumbel noise: number i of a seed.
inline double gumbel(uint64_t seed, int64_t i) {
    uint32_t x = uint32_t(seed) + uint32_t(i);
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x ^= uint32_t(seed >> 32);
    x *= 0x846ca68bu;
    x ^= x >> 16;
    const double u = std::clamp(double(x >> 8) / (1 << 24), double(1e-6f), double(1 - 1e-6f));
    return -std::log(-std::log(u));
}

inline std::vector<double> softmax(const float* z, int64_t width) {
    double total = 0;
    std::vector<double> p(size_t(width), 0.0);
    const double top = *std::max_element(z, z + width);
    for (int64_t i = 0; i < width; ++i) total += p[size_t(i)] = std::exp(z[i] - top);
    for (double& share : p) share /= total;
    return p;
}

// The bucket of a key in one round, whose rotations begin at `column`.
inline int64_t bucket(const float* key, int64_t width, const float* rotations, int64_t columns, const int64_t* factors,
                      int64_t count, int64_t column) {
    int64_t found = 0, scale = 1;
    for (int64_t factor = 0; factor < count; ++factor) {
        const int64_t half = factors[factor] / 2;
        int64_t best = 0;
        double top = -INFINITY;
        for (int64_t i = 0; i < 2 * half; ++i) {
            double rotated = 0;
            for (int64_t c = 0; c < width; ++c) rotated += double(key[c]) * rotations[c * columns + column + i % half];
            if (i >= half) rotated = -rotated;
            if (rotated > top) top = rotated, best = i;
        }
        found += best * scale;
        scale *= 2 * half;
        column += half;
    }
    return found;
}

}  // namespace sparsecli::scalar
