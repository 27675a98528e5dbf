// Runs every op of every instruction set that this processor has on random and odd shapes against its twin in
// ops/scalar.h; `perf` measures instead.
//
//   ops [--isa NAME] [--op NAME] [--seed N] [--quick] [--list]
//   ops perf [--isa NAME] [--op NAME] [--threads N]
//
// Results may differ by rounding: a sum of n float products in at least four lanes goes through n / 4 + 8 additions,
// each of which rounds by 2^-24 of the sum so far, at most the sum of magnitudes. Integer sums are exact.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "ops/scalar.h"

using namespace sparsecli;

namespace {

constexpr double EPSILON = 1.0 / (1 << 24);
const char* TYPE_NAMES[] = {"float32", "bfloat16", "int8",   "int4", "int3", "q4_0", "q4_1", "q5_0",   "q5_1",
                            "q8_0",    "iq4_nl",   "iq4_xs", "q3_k", "q4_k", "q5_k", "q6_k", "sketch", "float16"};

struct Options {
    std::string isa, op;
    uint64_t seed = 1;
    int threads = 0;
    bool quick = false, list = false, perf = false;
};

// Memory that begins on a cache line, with some lines behind it that ops may prefetch.
template <class T>
struct Memory {
    std::unique_ptr<char[]> held;
    T* data;
    int64_t size;

    explicit Memory(int64_t count) : held(new char[size_t(count) * sizeof(T) + 128]()), size(count) {
        data = (T*)((uintptr_t(held.get()) + 63) / 64 * 64);
    }
    T& operator[](int64_t i) { return data[i]; }
};

class Harness {
  public:
    Harness(const Ops& ops, const Options& options) : k(ops), options_(options), random_(options.seed) {}

    const Ops& k;
    int64_t passed = 0, failed = 0;

    bool quick() const { return options_.quick; }
    int64_t whole(int64_t least, int64_t most) { return least + int64_t(random_() % uint64_t(most - least + 1)); }
    float number() { return float(int64_t(random_() % 4001) - 2000) / 1000; }

    // A float16 of 2^-5 to 2^2, or one too small for an exponent.
    uint16_t half() { return uint16_t(whole(0, 1) << 15 | (whole(0, 9) ? whole(10, 16) : 0) << 10 | whole(0, 1023)); }

    // A float16 of 2^-8 to 2^-5.
    uint16_t small_half() { return uint16_t(whole(0, 1) << 15 | whole(7, 9) << 10 | whole(0, 1023)); }

    // Begins a case, whose name is printed where it fails.
    void begin(const std::string& text) { case_ = text, wrong_ = false, ++passed; }

    void same(double got, double expected, double tolerance, const char* what, int64_t at) {
        if (std::fabs(got - expected) <= tolerance) return;  // not so for NaN
        if (!wrong_) {
            std::printf("FAILED %s: %s: %s[%lld] is %.9g, expected %.9g within %.3g (--seed %llu)\n", k.name,
                        case_.c_str(), what, (long long)at, got, expected, tolerance,
                        (unsigned long long)options_.seed);
            --passed, ++failed;
        }
        wrong_ = true;
    }

    void same(double got, const scalar::Sum& expected, int64_t terms, const char* what, int64_t at) {
        same(got, expected.value, double(terms / 4 + 8) * EPSILON * (expected.magnitude + 1e-30), what, at);
    }

    // Writes a random weight of some type; padding stays zero.
    void put(void* data, int64_t type, int64_t offset) {
        if (type == FLOAT32) ((float*)data)[offset] = number();
        if (type == BFLOAT16) ((uint16_t*)data)[offset] = scalar::bfloat16_of(number());
        if (type == FLOAT16) ((uint16_t*)data)[offset] = half();
        if (type == INT8) ((int8_t*)data)[offset] = int8_t(whole(-127, 127));
    }

    // Random activations, padded with zeros; `plain` holds integers in order, for the twins.
    struct Forms {
        Memory<float> values;
        Memory<int16_t> integers, whole;
        Memory<float> scales;
        Memory<int32_t> sums;
        Memory<int8_t> bytes;
        Memory<ByteScale> byte_scales;
        Memory<int32_t> byte_sums;
        Activations all, plain;

        Forms(Harness& h, int64_t tokens, int64_t cols)
            : values(tokens * round_up(cols, PAD)),
              integers(values.size),
              whole(values.size),
              scales(tokens),
              sums(values.size / QUANT_GROUP),
              bytes(values.size),
              byte_scales(values.size / BYTE_GROUP),
              byte_sums(values.size / LANES) {
            const int64_t stride = round_up(cols, PAD);
            for (int64_t t = 0; t < tokens; ++t) {
                for (int64_t i = 0; i < cols; ++i) values[t * stride + i] = h.number();
                scales[t] = h.k.quantise(values.data + t * stride, stride, integers.data + t * stride,
                                         sums.data + t * (stride / QUANT_GROUP));
                h.k.quantise_bytes(values.data + t * stride, stride, bytes.data + t * stride,
                                   byte_scales.data + t * (stride / BYTE_GROUP), byte_sums.data + t * (stride / LANES));
            }
            for (int64_t i = 0; i < whole.size; ++i) whole[i] = scalar::integer(h.k.bytes, integers.data, i);
            all = plain = {values.data, integers.data, scales.data,      stride,
                           sums.data,   bytes.data,    byte_scales.data, byte_sums.data};
            plain.integers = whole.data;
        }
    };

    // Memory for a matrix of `bytes`, with random scales.
    struct Weights {
        Memory<char> memory;
        Memory<float> scales;
        Matrix matrix;

        Weights(Harness& h, int64_t bytes, int64_t scale_count, int64_t type, int64_t rows, int64_t cols)
            : memory(bytes), scales(scale_count) {
            for (int64_t i = 0; i < scale_count; ++i) scales[i] = float(h.whole(1, 100)) / 5000;
            matrix = {memory.data, type == INT8 ? scales.data : nullptr, type, rows, cols};
        }
    };

    Weights rows(int64_t type, int64_t count, int64_t cols) {
        Weights w(*this, count * round_up(cols, PAD) * type_bytes(type), count, type, count, cols);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t c = 0; c < cols; ++c) put(w.memory.data, type, scalar::rows_offset(w.matrix, r, c));
        return w;
    }

    Weights spans(int64_t type, int64_t count, int64_t cols) {
        if (of_gguf(type)) return gguf(type, count, cols);
        if (type == INT4 || type == INT3) return quantized(type, count, cols);
        Weights w(*this, count * round_up(cols, PAD) * type_bytes(type), count, type, count, cols);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t c = 0; c < cols; ++c) put(w.memory.data, type, scalar::spans_offset(w.matrix, r, c));
        return w;
    }

    Weights quantized(int64_t type, int64_t count, int64_t cols) {
        const int64_t bits = type == INT4 ? 4 : 3, groups = groups_of(cols), bytes = quantized_panel(cols, bits);
        Weights w(*this, round_up(count, LANES) / LANES * bytes, 0, type, count, cols);
        for (int64_t panel = 0; panel * LANES < count; ++panel) {
            char* at = w.memory.data + panel * bytes;
            for (int64_t i = 0; i < groups * 2 * bits * LANES * 4; ++i) at[i] = char(random_());
            at += groups * 2 * bits * LANES * 4;
            for (int64_t i = 0; i < groups * LANES; ++i)
                ((uint16_t*)at)[i] = scalar::bfloat16_of(float(whole(1, 100)) / 500);
            at += groups * LANES * 2;
            for (int64_t i = 0; i < groups * LANES; ++i) at[i] = char(whole(0, 240));
        }
        return w;
    }

    // Random codes and byte scales; float16 scales of 2^-8 to 2^-5.
    Weights gguf(int64_t type, int64_t count, int64_t cols) {
        Weights w(*this, round_up(count, LANES) / LANES * gguf_panel(cols, type), 0, type, count, cols);
        for (int64_t i = 0; i < w.memory.size; ++i) w.memory[i] = char(random_());
        const bool minima = type == Q4_1 || type == Q5_1 || type == Q4_K || type == Q5_K;
        const int64_t halves = (type >= IQ4_XS ? 1 : 2) * (minima ? 2 : 1) * LANES;
        if (type == SKETCH) {  // in front of the blocks
            for (int64_t panel = 0; panel < w.memory.size; panel += gguf_panel(cols, type))
                for (int64_t i = 0; i < 2 * LANES; ++i) ((uint16_t*)(w.memory.data + panel))[i] = small_half();
            return w;
        }
        const int64_t bytes = GGUF_BLOCK_BYTES[type - Q4_0];
        const bool filled = type == Q6_K || type == Q3_K || type == IQ4_XS;
        const int64_t end = filled ? bytes - 32 : bytes;  // behind the last of them
        for (int64_t block = 0; block < w.memory.size; block += bytes)
            for (int64_t i = 0; i < halves; ++i) ((uint16_t*)(w.memory.data + block + end))[i - halves] = small_half();
        return w;
    }

    // The same as in a file: row after row.
    Weights gguf_rows(int64_t type, int64_t count, int64_t cols) {
        constexpr int64_t BYTES[] = {18, 20, 22, 24, 34, 18, 136, 110, 144, 176, 210};  // by type - Q4_0
        const int64_t weights = gguf_block(type) == 256 ? 256 : 32, bytes = BYTES[type - Q4_0];
        Weights w(*this, count * cols / weights * bytes, 0, type, count, cols);
        for (int64_t i = 0; i < w.memory.size; ++i) w.memory[i] = char(random_());
        for (int64_t block = 0; block < w.memory.size; block += bytes) {
            const bool last = type == Q3_K || type == Q6_K, two = !last && type != IQ4_XS;
            for (int64_t i = 0; i < 1 + two; ++i) {
                const uint16_t value = small_half();
                if (i == 0 || type == Q4_1 || type == Q5_1 || type == Q4_K || type == Q5_K)
                    std::memcpy(w.memory.data + block + (last ? bytes - 2 : 2 * i), &value, 2);
            }
        }
        w.matrix.by_rows = true;
        return w;
    }

    Weights panels(int64_t type, int64_t outputs, int64_t inputs, int64_t taps, int64_t step) {
        const int64_t padded = round_up(inputs, step), wide = round_up(outputs, LANES);
        Weights w(*this, taps * padded * wide * type_bytes(type), wide, type, outputs, inputs * taps);
        if (type == INT8) std::memset(w.memory.data, 128, size_t(w.memory.size));
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t o = 0; o < outputs; ++o)
                for (int64_t i = 0; i < inputs; ++i) {
                    const int64_t offset = tap * padded * wide + scalar::panels_offset(type, outputs, padded, o, i);
                    put(w.memory.data, type, offset);
                    if (type == INT8) w.memory[offset] = char(w.memory[offset] + 128);
                }
        return w;
    }

  private:
    const Options& options_;
    std::mt19937_64 random_;
    std::string case_;
    bool wrong_ = false;
};

std::string text(const char* format, auto... values) {
    char line[256];
    std::snprintf(line, sizeof line, format, values...);
    return line;
}

// -- one function for each op --------------------------------------------------------------------------------

void test_matmul(Harness& h) {
    for (int64_t type = FLOAT32; type <= FLOAT16; ++type)
        for (const int64_t given : {1, 63, 64, 100, 129, 1000, 2048, 2112, 5000})
            for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 9, 17}) {
                const int64_t cols = of_gguf(type) && gguf_block(type) == 256 ? round_up(given, 256) : given;
                if (h.quick() && (cols > 2304 || tokens > 7)) continue;
                const int64_t count = h.whole(1, 90);
                const auto w = h.spans(type, count, cols);
                const Harness::Forms x(h, tokens, cols);
                const int64_t step = type >= INT4 && type != FLOAT16 ? LANES : 1;
                const int64_t begin = h.whole(0, count - 1) / step * step, end = h.whole(begin, count);
                Memory<float> out(tokens * count);
                std::fill_n(out.data, out.size, NAN);
                h.begin(text("matmul %s cols %ld tokens %ld rows %ld to %ld of %ld", TYPE_NAMES[type], long(cols),
                             long(tokens), long(begin), long(end), long(count)));
                h.k.matmul(w.matrix, begin, end, x.all, tokens, out.data, count);
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t r = 0; r < count; ++r) {
                        if (r >= begin && r < end)
                            h.same(out[t * count + r], scalar::matmul(w.matrix, r, x.plain, t), cols, "out",
                                   t * count + r);
                        else if (!std::isnan(out[t * count + r]))
                            h.same(out[t * count + r], NAN, 0, "untouched out", t * count + r);
                    }
            }
}

void test_read_gguf(Harness& h) {
    for (int64_t type = Q4_0; type <= SKETCH; ++type)
        for (const int64_t cols : {1, 63, 256, 300, 1024}) {
            const int64_t count = h.whole(1, 40), row = h.whole(0, count - 1);
            const auto w = h.spans(type, count, cols);
            Memory<float> out(cols);
            h.begin(text("read_gguf %s cols %ld row %ld of %ld", TYPE_NAMES[type], long(cols), long(row), long(count)));
            h.k.read_gguf(w.matrix, row, out.data);
            for (int64_t c = 0; c < cols; ++c) {
                const double expected = scalar::GgufRow(w.matrix, row).value(c);
                h.same(out[c], expected, 1e-6 * (std::fabs(expected) + 100), "out", c);
            }
        }
}

void test_gguf_rows(Harness& h) {
    for (int64_t type = Q4_0; type <= Q6_K; ++type)
        for (const int64_t given : {32, 64, 256, 1536}) {
            const int64_t cols = round_up(given, gguf_block(type) == 256 ? 256 : 32), count = h.whole(1, 40);
            const auto w = h.gguf_rows(type, count, cols);
            const Harness::Forms x(h, 1, cols);
            std::vector<int32_t> rows;
            for (int64_t row = 0; row < count; ++row)
                if (h.whole(0, 1)) rows.push_back(int32_t(row));
            Memory<float> out(count), values(cols);
            std::fill_n(out.data, count, NAN);
            h.begin(text("gguf_row_dots %s cols %ld, %ld of %ld rows", TYPE_NAMES[type], long(cols), long(rows.size()),
                         long(count)));
            h.k.gguf_row_dots(w.matrix, rows.data(), int64_t(rows.size()), x.all, out.data);
            int64_t listed = 0;
            for (int64_t row = 0; row < count; ++row) {
                const bool asked = listed < int64_t(rows.size()) && rows[size_t(listed)] == row;
                listed += asked;
                if (asked)
                    h.same(out[row], scalar::matmul(w.matrix, row, x.plain, 0), cols * 4, "out", row);
                else if (!std::isnan(out[row]))
                    h.same(out[row], NAN, 0, "untouched out", row);
            }
            h.begin(text("read_gguf %s by rows, cols %ld", TYPE_NAMES[type], long(cols)));
            h.k.read_gguf(w.matrix, count - 1, values.data);
            for (int64_t c = 0; c < cols; ++c) {
                const auto [product, minimum] = scalar::file_parts(w.matrix, count - 1, c);
                h.same(values[c], product + minimum, 1e-6 * (std::fabs(product + minimum) + 100), "value", c);
            }
        }
}

void test_quantise_bytes(Harness& h) {
    for (const int64_t count : {64, 128, 1024}) {
        const Harness::Forms x(h, 1, count);
        h.begin(text("quantise_bytes %ld", long(count)));
        for (int64_t i = 0; i < count; ++i) {
            double top = 0, sum = 0;
            for (int64_t j = 0; j < BYTE_GROUP; ++j)
                top = std::max(top, std::fabs(double(x.values.data[i / BYTE_GROUP * BYTE_GROUP + j])));
            for (int64_t j = 0; j < LANES; ++j) sum += x.bytes.data[i / LANES * LANES + j];
            const auto [scale, product] = x.byte_scales.data[i / BYTE_GROUP];
            h.same(scale, top / 127, 1e-6 * top, "scale", i);
            h.same(double(x.bytes.data[i]) * scale, x.values.data[i], 0.503 * scale, "value", i);
            h.same(x.byte_sums.data[i / LANES], sum, 0, "sum", i);
            const int32_t* sums = x.byte_sums.data + i / BYTE_GROUP * 2;
            h.same(product, scale * float(sums[0] + sums[1]), 0, "sum of values", i);
        }
    }
}

void test_quantise(Harness& h) {
    for (const int64_t count : {64, 128, 1024}) {
        Memory<float> values(count);
        Memory<int16_t> integers(count);
        Memory<int32_t> sums(count / QUANT_GROUP);
        for (int64_t i = 0; i < count; ++i) values[i] = h.number();
        h.begin(text("quantise %ld", long(count)));
        const double scale = h.k.quantise(values.data, count, integers.data, sums.data);
        double top = 0;
        for (int64_t i = 0; i < count; ++i) top = std::max(top, std::fabs(double(values[i])));
        for (int64_t i = 0; i < count; ++i)  // half a step, and the last bits of what is rounded
            h.same(scalar::integer(h.k.bytes, integers.data, i) * scale, values[i], scale * 0.503, "value", i);
        for (int64_t g = 0; g * QUANT_GROUP < count; ++g) {
            int64_t sum = 0;
            for (int64_t i = 0; i < QUANT_GROUP; ++i)
                sum += scalar::integer(h.k.bytes, integers.data, g * QUANT_GROUP + i);
            h.same(sums[g], double(sum), 0, "sum", g);
        }
        std::fill_n(values.data, count, 0.0f);
        h.same(h.k.quantise(values.data, count, integers.data, nullptr), 0, 0, "scale of zeros", 0);
        for (int64_t i = 0; i < count; ++i) h.same(integers[i], 0, 0, "integer of zeros", i);
    }
}

void test_multiplicative(Harness& h) {
    struct Shape {
        int64_t modules, width;
    };
    Memory<char> scratch(1 << 19);
    for (int64_t type = FLOAT32; type <= INT8; ++type)
        for (const Shape s : {Shape{1, 5}, {2, 64}, {7, 20}, {16, 64}, {3, 97}, {16, 80}, {70, 9}, {4, 300}}) {
            const int64_t d = s.modules * s.width, inputs = s.modules == 4 ? 777 : d;
            const auto D = h.rows(type, s.modules, inputs);
            const auto E = h.panels(type, s.width, inputs, 1, PAD);
            Memory<float> x(round_up(inputs, PAD)), bias(d), out(d);
            for (int64_t i = 0; i < inputs; ++i) x[i] = h.number();
            for (int64_t i = 0; i < d; ++i) bias[i] = h.number(), out[i] = NAN;
            const int64_t begin = h.whole(0, s.modules - 1), end = h.whole(begin + 1, s.modules);
            const int64_t panels = (s.width + PANEL - 1) / PANEL, from = h.whole(0, panels - 1);
            const bool biased = h.whole(0, 1);
            ReadAhead ahead;
            ahead.add(D.memory.data, D.memory.size);
            h.begin(text("multiplicative %s modules %ld of %ld width %ld inputs %ld panels from %ld", TYPE_NAMES[type],
                         long(end - begin), long(s.modules), long(s.width), long(inputs), long(from)));
            h.k.multiplicative(D.matrix, E.matrix, biased ? bias.data : nullptr, x.data, begin, end, from, panels,
                               out.data, scratch.data, biased ? &ahead : nullptr);
            for (int64_t m = begin; m < end; ++m) {
                const auto products = scalar::products(D.matrix, type, x.data, m);
                for (int64_t o = from * PANEL; o < s.width; ++o) {
                    scalar::Sum sum = scalar::multiplicative(D.matrix, E.matrix, products, m, o);
                    if (biased) sum.add(bias[m * s.width + o]);
                    h.same(out[m * s.width + o], sum, 4 * inputs, "out", m * s.width + o);
                }
            }
        }
}

void test_convolve(Harness& h) {
    for (int64_t type = FLOAT32; type <= BFLOAT16; ++type)
        for (const int64_t width : {4, 16, 33, 64, 100})
            for (const int64_t taps : {1, 3}) {
                const int64_t modules = h.whole(1, 20), inputs = 3 * width, lead = width;
                const auto kernel = h.panels(type, width, inputs, taps, 4);
                Memory<char> inputs_of_taps(taps * (modules + 3) * width * 4 + 256);
                std::vector<const void*> rows;
                for (int64_t tap = 0; tap < taps; ++tap) {
                    char* row = inputs_of_taps.data + tap * (modules + 3) * width * type_bytes(type);
                    for (int64_t i = 0; i < modules * width; ++i) h.put(row, type, lead + i);
                    rows.push_back(row + lead * type_bytes(type));
                }
                Memory<float> bias(width), out(modules * width);
                for (int64_t i = 0; i < width; ++i) bias[i] = h.number();
                h.begin(text("convolve %s width %ld taps %ld modules %ld", TYPE_NAMES[type], long(width), long(taps),
                             long(modules)));
                h.k.convolve(kernel.matrix, bias.data, taps, rows.data(), width, lead, 0, modules, out.data, nullptr);
                for (int64_t m = 0; m < modules; ++m)
                    for (int64_t o = 0; o < width; ++o) {
                        auto sum = scalar::convolve(kernel.matrix, taps, rows.data(), width, lead, m, o);
                        sum.add(bias[o]);
                        h.same(out[m * width + o], sum, 4 * inputs * taps, "out", m * width + o);
                    }
            }
}

void test_choose(Harness& h) {
    for (int64_t type = FLOAT32; type <= INT8; ++type)
        for (const int64_t size : {2, 8, 16, 33, 64, 100})
            for (const int64_t tokens : {1, 3, 6}) {
                const int64_t blocks = h.whole(1, 5), rank = h.whole(1, 40), k = h.whole(1, std::min<int64_t>(size, 4));
                const Choice c{size, k, round_up(rank, 2), round_up(size, LANES)};
                Harness::Weights w(h, blocks * c.padded_block * c.rank * type_bytes(type), blocks * c.padded_block,
                                   type, blocks * size, rank);
                Memory<float> bias(blocks * c.padded_block);
                const bool tie = h.whole(0, 3) == 0;  // all weights zero: the first units win
                for (int64_t b = 0; b < blocks; ++b)
                    for (int64_t u = 0; u < c.padded_block; ++u) {
                        bias[b * c.padded_block + u] = u >= size ? -INFINITY : tie ? 0 : h.number() / 8;
                        for (int64_t i = 0; i < rank && u < size && !tie; ++i)
                            h.put(w.memory.data, type, scalar::blocks_offset(type, c, b, i, u));
                    }
                const Harness::Forms z(h, tokens, rank);
                Memory<int32_t> units(tokens * blocks * k);
                Memory<float> weights(tokens * blocks * k);
                const auto rows = h.rows(FLOAT32, 1, 64);
                h.begin(text("choose %s block %ld k %ld rank %ld tokens %ld%s", TYPE_NAMES[type], long(size), long(k),
                             long(rank), long(tokens), tie ? " tie" : ""));
                h.k.choose(w.matrix, bias.data, c, 0, blocks, z.all, tokens, units.data, weights.data, blocks * k,
                           {rows.memory.data, nullptr, FLOAT32, 0, 0}, 2, true);
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t b = 0; b < blocks; ++b) {
                        std::vector<double> logits;
                        double size_of = 1, total = 0;
                        for (int64_t u = 0; u < size; ++u) {
                            const auto sum = scalar::controller_logit(w.matrix, c, z.plain, t, b, u);
                            logits.push_back(sum.value + bias[b * c.padded_block + u]);
                            size_of = std::max(size_of, sum.magnitude);
                        }
                        const double error = double(rank + 16) * EPSILON * size_of;
                        const double top = *std::max_element(logits.begin(), logits.end());
                        for (const double logit : logits) total += std::exp(logit - top);
                        for (int64_t j = 0; j < k; ++j) {
                            const int64_t at = (t * blocks + b) * k + j, unit = units[at] - b * size;
                            if (unit < 0 || unit >= size) {
                                h.same(double(unit), 0, 0, "unit outside its block", at);
                                continue;
                            }
                            if (tie) h.same(double(unit), double(j), 0, "unit of a tie", at);
                            const double best = *std::max_element(logits.begin(), logits.end());
                            h.same(logits[size_t(unit)], best, 2 * error, "logit of the unit", at);
                            h.same(weights[at], std::exp(logits[size_t(unit)] - top) / total, 4 * error + 1e-6,
                                   "probability", at);
                            logits[size_t(unit)] = -INFINITY;
                        }
                    }
            }
}

void test_units(Harness& h) {
    for (const int64_t type : {FLOAT32, BFLOAT16, FLOAT16, INT8})
        for (const int64_t cols : {10, 64, 100, 500, 4500})
            for (const int64_t parts : {2, 3}) {
                const int64_t units = h.whole(1, 30), count = h.whole(1, units);
                const auto w = h.rows(type, units * parts, cols);
                const Harness::Forms x(h, 1, cols);
                Memory<float> bias(units), hidden(count);
                std::vector<int32_t> chosen;
                for (int64_t i = 0; i < count; ++i) chosen.push_back(int32_t(h.whole(0, units - 1)));
                for (int64_t i = 0; i < units; ++i) bias[i] = h.number();
                for (int64_t kind = RELU; kind <= GELU_TANH; ++kind) {
                    const bool biased = h.whole(0, 1), far = h.whole(0, 1);
                    h.begin(text("unit_dots %s cols %ld parts %ld activation %ld count %ld", TYPE_NAMES[type],
                                 long(cols), long(parts), long(kind), long(count)));
                    h.k.unit_dots(w.matrix, parts, kind, biased ? bias.data : nullptr, chosen.data(), 0, count, x.all,
                                  far, hidden.data);
                    for (int64_t i = 0; i < count; ++i) {
                        auto gate = scalar::unit_dot(w.matrix, parts, chosen[size_t(i)], 0, x.plain);
                        if (biased) gate.add(bias[chosen[size_t(i)]]);
                        const auto up = parts == 3 ? scalar::unit_dot(w.matrix, parts, chosen[size_t(i)], 1, x.plain)
                                                   : scalar::Sum{1, 1};
                        const double error =
                            double(cols / 4 + 8) * EPSILON * gate.magnitude + 4e-7 * std::fabs(gate.value);
                        const double more = double(cols / 4 + 8) * EPSILON * up.magnitude;
                        h.same(hidden[i], scalar::activation(kind, gate.value) * up.value,
                               1.2 * error * std::fabs(up.value) + more * std::fabs(gate.value) + 1e-6, "h", i);
                    }
                }
                for (int64_t i = 0; i < count; ++i) chosen[size_t(i)] = int32_t(h.whole(0, units * parts - 1));
                h.begin(text("row_dots %s cols %ld count %ld", TYPE_NAMES[type], long(cols), long(count)));
                h.k.row_dots(w.matrix, chosen.data(), 0, count, x.all, h.whole(0, 1), hidden.data);
                for (int64_t i = 0; i < count; ++i)
                    h.same(hidden[i], scalar::unit_dot(w.matrix, 1, chosen[size_t(i)], 0, x.plain), cols, "dot", i);
                for (int64_t i = 0; i < count; ++i) chosen[size_t(i)] = int32_t(h.whole(0, units - 1));
                const int64_t begin = h.whole(0, cols / 20) * LANES, end = h.whole(std::min(begin, cols), cols);
                Memory<float> y(cols), before(cols);
                for (int64_t i = 0; i < cols; ++i) y[i] = before[i] = h.number();
                for (int64_t i = 0; i < count; ++i) hidden[i] = h.whole(0, 2) ? h.number() : 0;
                h.begin(text("unit_sums %s cols %ld to %ld of %ld parts %ld count %ld", TYPE_NAMES[type], long(begin),
                             long(end), long(cols), long(parts), long(count)));
                if (begin < end) h.k.unit_sums(w.matrix, parts, chosen.data(), hidden.data, count, begin, end, y.data);
                for (int64_t c = 0; c < cols; ++c) {
                    scalar::Sum sum;
                    sum.add(before[c]);
                    for (int64_t i = 0; i < count && c >= begin && c < end; ++i)
                        sum.add(hidden[i] * scalar::unit_value(w.matrix, parts, chosen[size_t(i)], c));
                    h.same(y[c], sum, 4 * count, "y", c);
                }
            }
}

void test_residuals(Harness& h) {
    for (const int64_t cols : {1, 64, 100, 576, 2048})
        for (const int64_t parts : {2, 3}) {
            const int64_t units = h.whole(1, 20), count = h.whole(1, units), groups = groups_of(cols);
            Harness::Weights w(h, units * residual_unit(cols, parts), 0, INT4, units, cols);
            for (int64_t u = 0; u < units; ++u)
                for (int64_t row = 0; row < parts; ++row) {
                    uint8_t* at = (uint8_t*)w.memory.data + u * residual_unit(cols, parts) + row * residual_row(cols);
                    for (int64_t c = 0; c < groups * QUANT_GROUP; ++c) {
                        const int64_t i = c % QUANT_GROUP, half = QUANT_GROUP / 2;
                        at[c / QUANT_GROUP * half + i % half] |= uint8_t(h.whole(0, 15) << (i < half ? 0 : 4));
                    }
                    for (int64_t g = 0; g < groups; ++g) {
                        const uint16_t scale = scalar::bfloat16_of(float(h.whole(1, 50)) / 500);
                        std::memcpy(at + groups * QUANT_GROUP / 2 + 2 * g, &scale, 2);
                    }
                }
            const Harness::Forms x(h, 1, cols);
            std::vector<int32_t> chosen;
            for (int64_t i = 0; i < count; ++i) chosen.push_back(int32_t((i * 7) % units));
            Memory<float> out(count * (parts - 1)), hidden(units), y(cols), before(cols);
            h.begin(text("residual_dots cols %ld parts %ld count %ld", long(cols), long(parts), long(count)));
            h.k.residual_dots(w.matrix, parts, chosen.data(), count, x.all, out.data);
            for (int64_t i = 0; i < count; ++i)
                for (int64_t row = 0; row < parts - 1; ++row) {
                    scalar::Sum sum;
                    for (int64_t c = 0; c < cols; ++c)
                        sum.add(scalar::residual_value(w.matrix, parts, chosen[size_t(i)], row, c) *
                                scalar::input(x.plain, INT4, 0, c));
                    h.same(out[i * (parts - 1) + row], sum, cols, "out", i * (parts - 1) + row);
                }
            for (int64_t u = 0; u < units; ++u) hidden[u] = h.whole(0, 3) ? h.number() : 0;
            for (int64_t c = 0; c < cols; ++c) y[c] = before[c] = h.number();
            const int64_t begin = std::min(h.whole(0, cols / LANES) * LANES, cols), end = h.whole(begin, cols);
            h.begin(text("residual_sums cols %ld to %ld of %ld parts %ld", long(begin), long(end), long(cols),
                         long(parts)));
            h.k.residual_sums(w.matrix, parts, chosen.data(), hidden.data, count, begin, end, y.data);
            for (int64_t c = 0; c < cols; ++c) {
                scalar::Sum sum;
                sum.add(before[c]);
                for (int64_t i = 0; i < count && c >= begin && c < end; ++i)
                    sum.add(hidden[chosen[size_t(i)]] *
                            scalar::residual_value(w.matrix, parts, chosen[size_t(i)], parts - 1, c));
                h.same(y[c], sum, 4 * count + 8, "y", c);
            }
        }
}

void test_elementwise(Harness& h) {
    for (const int64_t count : {1, 15, 16, 17, 64, 1000}) {
        Memory<float> x(count), gate(count), bias(count), out(count), back(count);
        for (int64_t i = 0; i < count; ++i) x[i] = 3 * h.number(), gate[i] = 5 * h.number(), bias[i] = h.number();
        for (int64_t kind = RELU; kind <= GELU_TANH; ++kind)
            for (const bool gated : {false, true}) {
                h.begin(text("activate %ld count %ld%s", long(kind), long(count), gated ? " gated" : ""));
                std::copy_n(x.data, count, out.data);
                h.k.activate(kind, gated ? gate.data : nullptr, out.data, count);
                for (int64_t i = 0; i < count; ++i) {
                    const double expected =
                        gated ? scalar::activation(kind, gate[i]) * x[i] : scalar::activation(kind, x[i]);
                    h.same(out[i], expected, 1e-6 * (1 + std::fabs(expected)) * (gated ? 1 + std::fabs(x[i]) : 1), "h",
                           i);
                }
            }
        for (const bool rms : {false, true}) {
            h.begin(text("normalize count %ld%s", long(count), rms ? " rms" : ""));
            h.k.normalize(x.data, gate.data, rms ? nullptr : bias.data, count, rms, 1e-5, out.data);
            double mean = 0, square = 0;
            for (int64_t i = 0; i < count; ++i) mean += rms ? 0 : double(x[i]) / double(count);
            for (int64_t i = 0; i < count; ++i) square += (x[i] - mean) * (x[i] - mean) / double(count);
            for (int64_t i = 0; i < count; ++i) {
                const double scale = gate[i] / std::sqrt(square + 1e-5);
                h.same(out[i], (x[i] - mean) * scale + (rms ? 0 : bias[i]),
                       double(count / 4 + 16) * EPSILON * (std::fabs(scale) * 12 + 2), "out", i);
            }
        }
        Memory<uint16_t> halves(count);
        x[0] = NAN;
        if (count > 1) x[1] = 1 + 1.0f / 256;  // a tie, to even
        h.begin(text("convert and widen count %ld", long(count)));
        h.k.convert(x.data, BFLOAT16, count, halves.data);
        h.k.widen(halves.data, nullptr, BFLOAT16, count, back.data);
        Memory<uint16_t> float16s(count);
        Memory<float> widened(count);
        for (int64_t i = 0; i < count; ++i) float16s[i] = h.half();
        h.k.widen(float16s.data, nullptr, FLOAT16, count, widened.data);
        for (int64_t i = 0; i < count; ++i) {
            h.same(widened[i], scalar::half_value(float16s[i]), 0, "float16", i);
            h.same(std::isnan(back[i]), std::isnan(x[i]), 0, "NaN", i);
            if (!std::isnan(x[i])) h.same(back[i], scalar::bfloat16_value(scalar::bfloat16_of(x[i])), 0, "bfloat16", i);
        }
    }
}

void test_attend(Harness& h) {
    for (int64_t type = FLOAT32; type <= INT8; ++type)
        for (const int64_t width : {1, 16, 20, 64, 100})
            for (const bool by_rows : {false, true})
                for (const int64_t longest : {1, 15, 16, 40, 200}) {
                    if (h.quick() && longest > 40) continue;
                    const int64_t stride = round_up(width, LANES), held = round_up(longest, LANES);
                    Memory<char> keys(held * stride * 4), values(held * stride * 4);
                    Memory<float> key_scales(held), value_scales(held), key(width), value(width);
                    // Half as many slots as positions: a ring that holds the last ones.
                    const bool ring = !by_rows && h.whole(0, 1);
                    const int64_t slots = ring ? round_up(longest / 2 + 1, LANES) : held;
                    const HeadCache cache{keys.data, values.data, key_scales.data, value_scales.data, by_rows, slots};
                    std::vector<float> kept;
                    h.begin(text("append and attend %s width %ld positions %ld%s", TYPE_NAMES[type], long(width),
                                 long(longest), by_rows ? " by rows" : ""));
                    for (int64_t position = 0; position < longest; ++position) {
                        double top = 0;
                        for (int64_t i = 0; i < width; ++i) {
                            key[i] = h.number(), value[i] = h.number();
                            top = std::max(top, std::fabs(double(key[i])));
                        }
                        h.k.append(key.data, value.data, type, width, position, cache, stride);
                        const double step = type == INT8 ? top / 127 * 0.501 : type == BFLOAT16 ? 1.0 / 128 : 0;
                        for (int64_t i = 0; i < width; ++i)
                            h.same(scalar::key_at(cache, type, width, stride, position % slots, i), key[i], step, "key",
                                   position);
                    }
                    const int64_t count = by_rows ? 1 : h.whole(1, QUERIES);
                    Memory<float> queries(QUERIES * stride), out(QUERIES * stride), scores(QUERIES * (held + 64));
                    const float* query[QUERIES];
                    float* to[QUERIES];
                    int64_t starts[QUERIES], lengths[QUERIES];
                    const double softcap = by_rows || h.whole(0, 1) ? 0 : 3;
                    for (int64_t q = 0; q < count; ++q) {
                        for (int64_t i = 0; i < width; ++i) queries[q * stride + i] = h.number();
                        query[q] = queries.data + q * stride, to[q] = out.data + q * stride;
                        const int64_t first = std::max<int64_t>(longest - slots, 0);
                        lengths[q] = h.whole(first + 1, longest);
                        starts[q] = ring || h.whole(0, 1) ? h.whole(first, lengths[q] - 1) : first;
                    }
                    const double scale = by_rows ? 1 : 0.125;
                    std::vector<int32_t> chosen;
                    for (int64_t position = 0; position < longest; position += h.whole(1, 3))
                        chosen.push_back(int32_t(position));
                    if (by_rows)
                        h.k.attend_chosen(query[0], chosen.data(), int64_t(chosen.size()), type, width, cache, stride,
                                          scores.data, to[0]);
                    else
                        h.k.attend(query, starts, lengths, count, type, width, cache, stride, float(scale),
                                   float(softcap), scores.data, held + 64, to);
                    for (int64_t q = 0; q < count; ++q) {
                        std::vector<int64_t> positions(chosen.begin(), chosen.end());
                        if (!by_rows) {
                            positions.clear();
                            for (int64_t position = starts[q]; position < lengths[q]; ++position)
                                positions.push_back(position % slots);
                        }
                        double size = 0;
                        const auto expected =
                            scalar::attend(query[q], positions, type, width, cache, stride, scale, softcap, size);
                        // An error of a score is one of its probability; exponentials have 4e-7 of their own.
                        const double error =
                            double(width / 2 + 16) * EPSILON * size * 2 + 1e-6 + double(positions.size() / 4) * EPSILON;
                        for (int64_t i = 0; i < width; ++i)
                            h.same(to[q][i], expected[size_t(i)].value, error * (expected[size_t(i)].magnitude + 1e-3),
                                   "out", i);
                    }
                }
}

void test_hash(Harness& h) {
    for (const int64_t width : {1, 16, 33, 64}) {
        const int64_t factors[] = {2 * h.whole(1, 8), 2 * h.whole(1, 20)}, count = h.whole(1, 2),
                      rounds = h.whole(1, 4);
        const int64_t round_columns = factors[0] / 2 + (count == 2 ? factors[1] / 2 : 0);
        const int64_t columns = round_up(rounds * round_columns, LANES), positions = 70,
                      stride = round_up(positions, LANES);
        Memory<float> rotations(width * columns), rotated(columns), key(width);
        Memory<int32_t> buckets(rounds * stride), found(positions);
        for (int64_t i = 0; i < width; ++i)
            for (int64_t c = 0; c < rounds * round_columns; ++c) rotations[i * columns + c] = h.number();
        h.begin(text("hash and find_same_bucket width %ld rounds %ld", long(width), long(rounds)));
        for (int64_t p = 0; p < positions; ++p) {
            for (int64_t i = 0; i < width; ++i) key[i] = h.number() + 0.01f * float(i);
            h.k.hash(key.data, width, rotations.data, columns, factors, count, rounds, rotated.data, buckets.data + p,
                     stride);
            for (int64_t r = 0; r < rounds && width > 1; ++r)
                h.same(
                    buckets[r * stride + p],
                    double(scalar::bucket(key.data, width, rotations.data, columns, factors, count, r * round_columns)),
                    0, "bucket", p);
        }
        const int64_t last = positions - 1, got = h.k.find_same_bucket(buckets.data, stride, rounds, last, found.data);
        std::vector<int64_t> expected;
        for (int64_t p = 0; p < last; ++p)
            for (int64_t r = 0; r < rounds; ++r)
                if (buckets[r * stride + p] == buckets[r * stride + last]) {
                    expected.push_back(p);
                    break;
                }
        h.same(double(got), double(expected.size()), 0, "count", 0);
        for (int64_t i = 0; i < std::min(got, int64_t(expected.size())); ++i)
            h.same(found[i], double(expected[size_t(i)]), 0, "found", i);
    }
}

// Lists of some sources for some rows, among them empty ones.
struct RandomLists {
    std::vector<int32_t> index;
    std::vector<int64_t> begin, end;
    Memory<float> sources, x;
    Gathered gathered;

    RandomLists(Harness& h, int64_t rows, int64_t count, int64_t first) : sources(count * SLICE), x(rows * SLICE) {
        for (int64_t r = 0; r < rows; ++r) {
            begin.push_back(int64_t(index.size()));
            for (int64_t i = h.whole(0, 9); i > 0; --i) index.push_back(int32_t(first + h.whole(0, count - 1)));
            end.push_back(int64_t(index.size()));
        }
        for (float* value = sources.data; value < sources.data + sources.size; ++value) *value = h.number();
        for (float* value = x.data; value < x.data + x.size; ++value) *value = h.number();
        gathered = {sources.data, first, index.data(), begin.data(), end.data(), rows};
    }
};

void test_gather(Harness& h) {
    for (const int64_t first : {0, 100}) {
        const int64_t rows = 20, count = 7;
        RandomLists lists(h, rows, count, first);
        const std::vector<int32_t>& index = lists.index;
        h.begin(text("gather_dots and gather_sums first %ld", long(first)));
        Memory<float> out(int64_t(index.size()) + 1), y(rows * SLICE);
        for (int64_t i = 0; i < y.size; ++i) y[i] = lists.x[i];
        h.k.gather_dots(lists.gathered, lists.x.data, false, out.data);
        std::vector<float> factor(out.data, out.data + index.size());
        h.k.gather_dots(lists.gathered, lists.x.data, true, out.data);
        h.k.gather_sums(lists.gathered, factor.data(), y.data);
        for (int64_t r = 0; r < rows; ++r) {
            std::vector<scalar::Sum> expected(SLICE);
            for (int64_t c = 0; c < SLICE; ++c) expected[size_t(c)].add(lists.x[r * SLICE + c]);
            for (int64_t i = lists.begin[size_t(r)]; i < lists.end[size_t(r)]; ++i) {
                const float* source = lists.sources.data + (index[size_t(i)] - first) * SLICE;
                scalar::Sum dot;
                for (int64_t c = 0; c < SLICE; ++c) {
                    dot.add(2.0 * source[c] * lists.x[r * SLICE + c]);
                    expected[size_t(c)].add(double(factor[size_t(i)]) * source[c]);
                }
                h.same(out[i], dot, SLICE, "dot", i);
            }
            for (int64_t c = 0; c < SLICE; ++c) h.same(y[r * SLICE + c], expected[size_t(c)], 16, "sum", r * SLICE + c);
        }
    }
}

void test_matrix_product(Harness& h) {
    for (const int64_t width : {16, 48, 64, 144})
        for (const int64_t rows : {1, 4, 7}) {
            const int64_t count = h.whole(1, 70);
            const bool turned = h.whole(0, 1);
            Memory<float> a(rows * count), b(count * width), c(rows * width);
            for (Memory<float>* each : {&a, &b, &c})
                for (int64_t i = 0; i < each->size; ++i) (*each)[i] = h.number();
            const std::vector<float> before(c.data, c.data + c.size);
            h.begin(text("add_matrix_product %ld x %ld x %ld%s", long(rows), long(count), long(width),
                         turned ? ", turned" : ""));
            const int64_t row = turned ? 1 : count, step = turned ? rows : 1;
            h.k.add_matrix_product(a.data, row, step, b.data, count, rows, width, c.data);
            for (int64_t m = 0; m < rows; ++m)
                for (int64_t n = 0; n < width; ++n) {
                    scalar::Sum sum;
                    sum.add(before[size_t(m * width + n)]);
                    for (int64_t i = 0; i < count; ++i) sum.add(double(a[m * row + i * step]) * b[i * width + n]);
                    h.same(c[m * width + n], sum, 4 * count, "c", m * width + n);
                }
        }
}

void test_choice_in_training(Harness& h) {
    for (const int64_t size : {1, 16, 33, 64}) {
        const int64_t width = round_up(size, LANES), count = std::min(size, int64_t(3)), first = h.whole(0, 1 << 20);
        const uint64_t seed = uint64_t(h.whole(0, 1ll << 40)) * 0x9e3779b97f4a7c15u;
        Memory<float> z(width), noisy(width), gradient(count);
        for (int64_t i = 0; i < width; ++i) noisy[i] = z[i] = i < size ? h.number() : -INFINITY;
        h.begin(text("choice and softmax in training, %ld units", long(size)));
        h.k.add_gumbel_noise(0.5f, seed, first, width, noisy.data);
        for (int64_t i = 0; i < size; ++i)
            h.same(noisy[i], z[i] + 0.5 * scalar::gumbel(seed, first + i), 1e-5, "noisy", i);
        std::vector<float> left(noisy.data, noisy.data + size);
        std::vector<int32_t> chosen(static_cast<size_t>(count));
        h.k.choose_largest(noisy.data, width, count, chosen.data());
        for (const int32_t unit : chosen) {
            const auto best = std::max_element(left.begin(), left.end());
            h.same(unit, double(best - left.begin()), 0, "chosen", 0);
            *best = -INFINITY;
        }
        for (int64_t j = 0; j < count; ++j) gradient[j] = h.number();
        const std::vector<double> p = scalar::softmax(z.data, size);
        std::vector<float> turned(z.data, z.data + width);
        h.k.softmax(z.data, width);
        for (int64_t i = 0; i < size; ++i) h.same(z[i], p[size_t(i)], 1e-6, "probability", i);
        double total = 0;
        for (int64_t j = 0; j < count; ++j) total += gradient[j] * p[size_t(chosen[size_t(j)])];
        h.k.softmax_gradient(turned.data(), width, chosen.data(), gradient.data, count);
        for (int64_t i = 0; i < size; ++i) {
            double own = 0;
            for (int64_t j = 0; j < count; ++j) own += chosen[size_t(j)] == i ? gradient[j] : 0.0f;
            h.same(turned[size_t(i)], p[size_t(i)] * (own - total), 4e-6, "gradient", i);
        }
    }
}

void test_slopes(Harness& h) {
    for (int64_t kind = RELU; kind <= GELU_TANH; ++kind) {
        const int64_t count = h.whole(1, 70);
        Memory<float> x(count), values(count), slopes(count);
        for (int64_t i = 0; i < count; ++i) x[i] = 4 * h.number();
        x[0] = 0;
        h.begin(text("activation_slopes %ld", long(kind)));
        h.k.activation_slopes(kind, x.data, count, values.data, slopes.data);
        for (int64_t i = 0; i < count; ++i) {
            h.same(values[i], scalar::activation(kind, x[i]), 2e-6, "value", i);
            h.same(slopes[i], scalar::slope(kind, x[i]), 2e-6, "slope", i);
        }
    }
}

struct Op {
    const char* name;
    void (*test)(Harness&);
};
constexpr Op OPS[] = {{"matmul", test_matmul},
                      {"quantise", test_quantise},
                      {"quantise_bytes", test_quantise_bytes},
                      {"read_gguf", test_read_gguf},
                      {"gguf_rows", test_gguf_rows},
                      {"multiplicative", test_multiplicative},
                      {"convolve", test_convolve},
                      {"choose", test_choose},
                      {"units", test_units},
                      {"residuals", test_residuals},
                      {"elementwise", test_elementwise},
                      {"attend", test_attend},
                      {"hash", test_hash},
                      {"gather", test_gather},
                      {"matrix_product", test_matrix_product},
                      {"choice_in_training", test_choice_in_training},
                      {"slopes", test_slopes}};

// -- speed ---------------------------------------------------------------------------------------------------

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The median of some runs, each long enough to be timed.
template <class F>
double median_of(const F& run) {
    std::vector<double> times;
    int64_t repeats = 1;
    for (double once = 0; once < 2e-3; repeats *= 4) {
        const double start = seconds();
        for (int64_t i = 0; i < repeats; ++i) run();
        once = seconds() - start;
        if (once >= 2e-3) break;
    }
    for (int i = 0; i < 7; ++i) {
        const double start = seconds();
        for (int64_t r = 0; r < repeats; ++r) run();
        times.push_back((seconds() - start) / double(repeats));
    }
    std::sort(times.begin(), times.end());
    return times[3];
}

// body(thread) on every thread.
template <class F>
void together(int threads, const F& body) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(body, i);
    body(0);
    for (std::thread& other : others) other.join();
}

double probe(const Memory<char>& memory, int threads) {
    double best = 0;
    for (int run = 0; run < 5; ++run) {
        const double start = seconds();
        together(threads, [&](int thread) {
            typedef int64_t Four __attribute__((vector_size(32)));
            const int64_t count = memory.size / 32 / threads;
            const Four* from = (const Four*)memory.data + thread * count;
            Four sums[4] = {};
            for (int64_t i = 0; i + 4 <= count; i += 4)
                for (int j = 0; j < 4; ++j) sums[j] |= from[i + j];
            volatile int64_t sink = (sums[0] | sums[1] | sums[2] | sums[3])[0];
            (void)sink;
        });
        best = std::max(best, double(memory.size) / (seconds() - start) / 1e9);
    }
    return best;
}

void say(const std::string& what, double time, double bytes, double products, double bandwidth) {
    std::printf("%-52s %10.1f us %8.1f GB/s %8.1f GMAC/s", what.c_str(), time * 1e6, bytes / time / 1e9,
                products / time / 1e9);
    if (bandwidth > 0) std::printf(" %5.0f %%", 100 * bytes / time / 1e9 / bandwidth);
    std::printf("\n");
}

void perf(const Ops& ops, const Options& options) {
    const int threads = options.threads ? options.threads : int(std::thread::hardware_concurrency());
    Options seeded = options;
    Harness h(ops, seeded);
    Memory<char> large(256 << 20);
    for (int64_t i = 0; i < large.size; i += 8)
        *(uint64_t*)(large.data + i) = 0x3c013c023b813b02ull + uint64_t(i % 251);
    const double bandwidth = probe(large, threads);
    std::printf("%s, memory reads %.1f GB/s with %d threads; cached rows with one\n", ops.name, bandwidth, threads);
    const auto selected = [&](const char* name) { return options.op.empty() || options.op == name; };
    for (int64_t type = FLOAT32; selected("matmul") && type <= FLOAT16; ++type)
        for (const bool cached : {false, true})
            for (const int64_t tokens : {1, 2, 4, 8, 16, 32, 128}) {
                if (!cached && tokens > 32) continue;
                const int64_t cols = 2048, bits = type == INT4 ? 4 : 3;
                const bool grouped = type == INT4 || type == INT3;
                const int64_t row = of_gguf(type) ? gguf_panel(cols, type) / LANES
                                    : grouped     ? quantized_panel(cols, bits) / LANES
                                                  : cols * type_bytes(type);
                const int64_t rows = (cached ? 1 << 20 : large.size / (tokens > 1 ? 4 : 1)) / row / 128 * 128;
                Memory<float> scales(rows), out(rows * tokens);
                const Matrix w{large.data, scales.data, type, rows, cols};
                const Harness::Forms x(h, tokens, cols);
                const int used = cached ? 1 : threads;
                const double time = median_of([&] {
                    together(used, [&](int thread) {
                        ops.matmul(w, rows / 64 * thread / used * 64, rows / 64 * (thread + 1) / used * 64, x.all,
                                   tokens, out.data, rows);
                    });
                });
                say(text("matmul %s, %ld tokens, %s", TYPE_NAMES[type], long(tokens),
                         cached ? "cached" : "from memory"),
                    time, double(rows * row), double(rows * cols * tokens), cached ? 0 : bandwidth);
            }
    for (const int64_t type : {Q8_0, Q4_K, Q6_K}) {
        if (!selected("gguf_rows")) break;
        const int64_t cols = 2048, bytes = cols / 256 * (type == Q8_0 ? 272 : type == Q4_K ? 144 : 210);
        const int64_t count = 1024, step = large.size / bytes / count;
        Memory<float> out(count * step);
        std::vector<int32_t> listed;
        for (int64_t i = 0; i < count; ++i) listed.push_back(int32_t(i * step + h.whole(0, step - 1)));
        const Matrix w{large.data, nullptr, type, count * step, cols, true};
        const Harness::Forms x(h, 1, cols);
        say(text("gguf_row_dots %s, %ld of %ld rows", TYPE_NAMES[type], long(count), long(count * step)),
            median_of([&] { ops.gguf_row_dots(w, listed.data(), count, x.all, out.data); }), double(count * bytes),
            double(count * cols), 0);
    }
    for (const int64_t type : {FLOAT32, BFLOAT16, FLOAT16, INT8}) {
        if (!selected("units")) break;
        const int64_t d = 1024, parts = 2, units = large.size / (d * parts * type_bytes(type));
        Memory<float> scales(units * parts), hidden(units), y(d);
        std::vector<int32_t> chosen;
        for (int64_t unit = 0; unit < units; unit += 64) chosen.push_back(int32_t(unit + h.whole(0, 63)));
        const Matrix w{large.data, scales.data, type, units * parts, d};
        const Harness::Forms x(h, 1, d);
        const int64_t count = int64_t(chosen.size());
        const double bytes = double(count * d * type_bytes(type)), products = double(count * d);
        say(text("unit_dots %s, one of 64 units", TYPE_NAMES[type]), median_of([&] {
                ops.unit_dots(w, parts, RELU, nullptr, chosen.data(), 0, count, x.all, true, hidden.data);
            }),
            bytes, products, 0);
        std::fill_n(hidden.data, count, 1.0f);
        say(text("unit_sums %s, one of 64 units", TYPE_NAMES[type]),
            median_of([&] { ops.unit_sums(w, parts, chosen.data(), hidden.data, count, 0, d, y.data); }), bytes,
            products, 0);
    }
    for (const int64_t count : {32, 256, 512, 1024, 2048}) {  // sources, of which rows take some at random
        if (!selected("gather")) break;
        const int64_t rows = 1024, each = 16;
        std::vector<int32_t> index;
        std::vector<int64_t> bounds;
        for (int64_t r = 0; r < rows; ++r) {
            bounds.push_back(r * each);
            for (int64_t i = 0; i < each; ++i) index.push_back(int32_t((i * count + h.whole(0, count - 1)) / each));
        }
        bounds.push_back(rows * each);
        float* memory = (float*)large.data;
        const Gathered g{memory, 0, index.data(), bounds.data(), bounds.data() + 1, rows};
        Memory<float> x(rows * SLICE), out(rows * each);
        const double products = double(rows * each * SLICE);
        say(text("gather_dots, %ld sources", long(count)),
            median_of([&] { ops.gather_dots(g, x.data, false, out.data); }), 4 * products, products, 0);
        std::fill_n(out.data, rows * each, 1.0f);
        say(text("gather_sums, %ld sources", long(count)), median_of([&] { ops.gather_sums(g, out.data, x.data); }),
            4 * products, products, 0);
    }
    if (selected("matrix_product")) {
        Memory<float> a(64 * 64), b(64 * 64), c(64 * 64);
        say("add_matrix_product, 64 x 64 x 64",
            median_of([&] { ops.add_matrix_product(a.data, 64, 1, b.data, 64, 64, 64, c.data); }), 3 * 64 * 64 * 4,
            64 * 64 * 64, 0);
    }
    if (selected("choice_in_training")) {
        Memory<float> z(64);
        int32_t chosen;
        say("add_gumbel_noise, 64 units", median_of([&] { ops.add_gumbel_noise(0.1f, 1, 0, 64, z.data); }), 256, 64, 0);
        say("choose_largest, 64 units", median_of([&] { ops.choose_largest(z.data, 64, 1, &chosen); }), 256, 64, 0);
        say("softmax, 64 units", median_of([&] { ops.softmax(z.data, 64); }), 256, 64, 0);
    }
    Memory<char> scratch(1 << 19);
    for (int64_t type = FLOAT32; selected("multiplicative") && type <= INT8; ++type)
        for (const int64_t modules : {16, 64}) {
            const int64_t width = modules == 16 ? 64 : 144, d = modules * width;
            Memory<float> scales(round_up(width, LANES) + modules), x(d), out(d);
            const Matrix D{large.data, scales.data, type, modules, d},
                E{large.data + (32 << 20), scales.data, type, width, d};
            for (int64_t i = 0; i < d; ++i) x[i] = h.number();
            say(text("multiplicative %s, %ld modules of %ld", TYPE_NAMES[type], long(modules), long(width)),
                median_of([&] {
                    ops.multiplicative(D, E, nullptr, x.data, 0, modules, 0, (width + PANEL - 1) / PANEL, out.data,
                                       scratch.data, nullptr);
                }),
                double((modules + width) * d * type_bytes(type)), double(d * d), 0);
        }
    for (int64_t type = FLOAT32; selected("attend") && type <= INT8; ++type)
        for (const int64_t positions : {128, 2048}) {
            const int64_t width = 64;
            Memory<float> scales(positions), query(width), out(width), scores(positions + 64);
            const HeadCache cache{large.data, large.data + (8 << 20), scales.data, scales.data, false, positions};
            const int64_t start = 0;
            const float* queries[] = {query.data};
            float* to[] = {out.data};
            say(text("attend %s, %ld positions", TYPE_NAMES[type], long(positions)), median_of([&] {
                    ops.attend(queries, &start, &positions, 1, type, width, cache, width, 0.125f, 0, scores.data,
                               positions + 64, to);
                }),
                double(2 * positions * width * type_bytes(type)), double(2 * positions * width), 0);
        }
}

Options options_of(int count, char** words) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const auto value = [&] { return i + 1 < count ? words[++i] : ""; };
        if (word == "perf")
            options.perf = true;
        else if (word == "--isa")
            options.isa = value();
        else if (word == "--op")
            options.op = value();
        else if (word == "--seed")
            options.seed = uint64_t(std::atoll(value()));
        else if (word == "--threads")
            options.threads = std::atoi(value());
        else if (word == "--quick")
            options.quick = true;
        else if (word == "--list")
            options.list = true;
        else
            std::fprintf(stderr, "%s: unknown word; see the head of tests/ops.cpp\n", word.c_str()), std::exit(2);
    }
    return options;
}

}  // namespace

int main(int count, char** words) {
    const Options options = options_of(count, words);
    int64_t passed = 0, failed = 0, sets = 0;
    for (const InstructionSet& set : instruction_sets) {
        if (options.list) {
            std::printf("%-14s %s\n", set.name,
                        !set.ops()        ? "not built"
                        : set.available() ? "yes"
                                          : "not on this processor");
            continue;
        }
        if (!set.available() || !set.ops() || (!options.isa.empty() && options.isa != set.name)) continue;
        ++sets;
        if (options.perf) {
            perf(*set.ops(), options);
            continue;
        }
        Harness harness(*set.ops(), options);
        for (const Op& op : OPS)
            if (options.op.empty() || options.op == op.name) op.test(harness);
        std::printf("%s: %lld passed, %lld failed\n", set.name, (long long)harness.passed, (long long)harness.failed);
        passed += harness.passed, failed += harness.failed;
    }
    if (options.list) {
        for (const Op& op : OPS) std::printf("%s\n", op.name);
        return 0;
    }
    if (!sets) std::fprintf(stderr, "no such instruction set here; see --list\n");
    if (!options.perf && sets) std::printf("ops: %lld passed, %lld failed\n", (long long)passed, (long long)failed);
    return failed || !sets || (!options.perf && !passed);
}
