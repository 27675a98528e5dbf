// The types that ops compute with: packed weights, activations, caches, and a table of ops for each instruction set.
//
// Padding saves kernels from handling tails: rows are multiples of PAD elements long, panels and blocks multiples of
// LANES wide, filled with zeros. Sums run over LANES fixed lanes, so that results do not depend on how threads share
// the work.
#pragma once
#include <cstdint>

namespace sparsecli {

constexpr int64_t LANES = 16;        // floats that are computed together
constexpr int64_t PAD = 64;          // elements that a row's length is rounded up to
constexpr int64_t PANEL = 64;        // columns of a panel
constexpr int64_t SPAN = 2048;       // columns of a long row that are read at a time: activations stay in the L1 cache
constexpr int64_t GROUP = 256;       // inputs that share a scale when products are quantised
constexpr int64_t QUANT_GROUP = 64;  // inputs that share a scale and a zero where weights have 3 or 4 bits
constexpr int64_t BYTE_GROUP = 32;   // activations that share a scale where these are bytes, as GGUF's types need them
constexpr int64_t MAX_BLOCK = 4096;  // units of a block
constexpr int64_t QUERIES = 4;       // queries that share one reading of keys and values
constexpr int64_t SLICE = 128;       // columns of gathered rows that are computed together in training

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

enum Type : int64_t {
    FLOAT32 = 0,
    BFLOAT16 = 1,
    INT8 = 2,
    INT4 = 3,
    INT3 = 4,
    Q4_0 = 5,  // GGUF's own, see gguf.inl
    Q4_1 = 6,
    Q5_0 = 7,
    Q5_1 = 8,
    Q8_0 = 9,
    IQ4_NL = 10,
    IQ4_XS = 11,
    Q3_K = 12,
    Q4_K = 13,
    Q5_K = 14,
    Q6_K = 15,
    SKETCH = 16,  // of a head: laid out as theirs, in two bits
    FLOAT16 = 17  // rows, spans and units alone
};
inline int64_t type_bytes(int64_t type) { return type == FLOAT32 ? 4 : type == BFLOAT16 || type == FLOAT16 ? 2 : 1; }

inline int64_t groups_of(int64_t cols) { return (cols + QUANT_GROUP - 1) / QUANT_GROUP; }

// Whether a type is one of GGUF's or a sketch, which are multiplied with bytes.
inline bool of_gguf(int64_t type) { return type >= Q4_0 && type <= SKETCH; }

// Columns of a block of such a type, and bytes of LANES rows of one.
inline int64_t gguf_block(int64_t type) { return type >= IQ4_XS && type != SKETCH ? 256 : 64; }
constexpr int64_t GGUF_BLOCK_BYTES[] = {576,  640,  704,  768,  1088, 576,
                                        2240, 1792, 2368, 2880, 3392, 320};  // by type - Q4_0
// Bytes in front of the blocks of LANES rows, and of all of them.
inline int64_t gguf_panel_head(int64_t type) { return type == SKETCH ? 64 : 0; }
inline int64_t gguf_panel(int64_t cols, int64_t type) {
    const int64_t blocks = (cols + gguf_block(type) - 1) / gguf_block(type);
    return gguf_panel_head(type) + blocks * GGUF_BLOCK_BYTES[type - Q4_0];
}

// Bytes of LANES quantized rows, and of a row and a unit of residuals.
inline int64_t quantized_panel(int64_t cols, int64_t bits) {
    return round_up(groups_of(cols) * LANES * (bits * QUANT_GROUP / 8 + 3), 64);
}
inline int64_t residual_row(int64_t cols) { return groups_of(cols) * (QUANT_GROUP / 2 + 2); }
inline int64_t residual_unit(int64_t cols, int64_t parts) { return round_up(parts * residual_row(cols), 64); }

// Weights in one of these layouts (packed/layouts.py writes them):
//   rows      (rows, cols) with cols rounded up to PAD; int8 has a scale for each row
//   spans     the same, but rows longer than SPAN are cut: first the first SPAN columns of all rows, then the next
//   panels    a linear map cols -> rows stored for outer products: panels of PANEL outputs, each [cols / p][outputs][p]
//             where p = 1, 2, 4 for float32, bfloat16, int8 (stored with 128 added); int8 has a scale for each output
//   blocks    the controller's second factor: [block][rank / 2][unit][2], float32 [block][rank][unit]
//   units     rows of chosen units: [unit][gate, up, down], each PAD-rounded; int8 has a scale for each row
//   quantized dense maps in INT4 or INT3: panels of LANES rows, of each the codes of every group of QUANT_GROUP columns
//             (quantized.inl), then scales (bfloat16) and zeros (bytes, in sixteenths) as [group][row]
//   gguf      dense maps in GGUF's types: panels of LANES rows (gguf.inl); those from IQ4_XS on have whole blocks; or,
//             `by_rows`, row after row as in a file (gguf_rows.inl), of which some are read
//   residual  [unit][gate, up, down]: a row's codes in 4 bits, columns j and j + 32 of a group in one byte, then its
//             scales (bfloat16); value = scale * (code - 8)
struct Matrix {
    const void* data = nullptr;
    const float* scale = nullptr;
    int64_t type = FLOAT32, rows = 0, cols = 0;
    bool by_rows = false;  // GGUF's types only
};

// Rows of activations, `stride` elements apart and padded with zeros: `values` for float weights; `integers` and
// `scales` for int8 and quantized weights, with `sums` of every QUANT_GROUP integers for the latter. The order of
// integers is private to `quantise` and the ops that take them (see Ops::bytes). GGUF's types are multiplied with
// `bytes`, which have a scale for every BYTE_GROUP, with the sums of every LANES bytes.
struct ByteScale {
    float scale, sum;  // of what the bytes stand for: scale times their sum
};

struct Activations {
    const float* values;
    const int16_t* integers;
    const float* scales;
    int64_t stride;
    const int32_t* sums;
    const int8_t* bytes = nullptr;
    const ByteScale* byte_scales = nullptr;
    const int32_t* byte_sums = nullptr;
};

// Keys and values of one layer and one head of one sequence.
struct HeadCache {
    const void* keys;           // [position / LANES][width][LANES], or by_rows
    const void* values;         // [position][value_stride]
    const float* key_scales;    // [position], int8 only
    const float* value_scales;  // [position], int8 only
    bool by_rows;               // keys are laid out as values, padded with zeros
    int64_t slots;              // positions that there is room for, a multiple of LANES; p lies at p % slots
};

// Lists of gathered rows, one for each of `rows`: row r has index[i] for begin[r] <= i < end[r]. `sources` are SLICE
// columns of each row that there is, the one with index `first` at the beginning.
struct Gathered {
    const float* sources;
    int64_t first;
    const int32_t* index;
    const int64_t *begin, *end;
    int64_t rows;
};

// What `choose` chooses from a controller's block.
struct Choice {
    int64_t block_size, units_per_block, rank, padded_block;
};

// Memory that will be read soon, in order. Ops that compute more than they read prefetch some of it now and then; what
// was prefetched is dropped from the list.
struct ReadAhead {
    struct Piece {
        const char *next, *end;
    };
    static constexpr int64_t MOST = 64;
    Piece pieces[MOST];
    int64_t count = 0, first = 0;

    void clear() { count = first = 0; }
    void add(const void* from, int64_t bytes) {
        if (count < MOST && bytes > 0) pieces[count++] = {(const char*)from, (const char*)from + bytes};
    }
    void some(int64_t lines) {
        while (lines > 0 && first < count) {
            Piece& piece = pieces[first];
            for (; lines > 0 && piece.next < piece.end; --lines, piece.next += 64) __builtin_prefetch(piece.next, 0, 2);
            if (piece.next >= piece.end) ++first;
        }
    }
};

enum Activation : int64_t { RELU = 0, GELU = 1, SILU = 2, GELU_TANH = 3 };

struct Ops {
    const char* name;

    bool bytes;  // sixteen integers are stored as their low bytes, then their high bytes: 256 high + low, both signed

    // values -> integers and, unless null, their sums; returns the scale. `count` is a multiple of PAD.
    float (*quantise)(const float* values, int64_t count, int16_t* integers, int32_t* sums);

    // The same for GGUF's types: values -> bytes, scales and sums.
    void (*quantise_bytes)(const float* values, int64_t count, int8_t* bytes, ByteScale* scales, int32_t* sums);

    // out = row of w as floats; w is `gguf`.
    void (*read_gguf)(const Matrix& w, int64_t row, float* out);

    // out[rows[i]] = w[rows[i]] . x for `count` rows, which are read one by one; w is `gguf` by_rows.
    void (*gguf_row_dots)(const Matrix& w, const int32_t* rows, int64_t count, const Activations& x, float* out);

    // out[t * out_stride + r] = w[r] . x[t] for rows [begin, end) and t < tokens; w is `spans`, or `quantized` or
    // `gguf` with `begin` a multiple of LANES.
    void (*matmul)(const Matrix& w, int64_t begin, int64_t end, const Activations& x, int64_t tokens, float* out,
                   int64_t out_stride);

    // out[s * width + m] = sum_i x[i] D[s, i] E[m, i] + bias[s * width + m] for modules [module_begin, module_end)
    // and outputs m of panels [panel_begin, panel_end). D is `rows`, E is `panels`.
    void (*multiplicative)(const Matrix& D, const Matrix& E, const float* bias, const float* x, int64_t module_begin,
                           int64_t module_end, int64_t panel_begin, int64_t panel_end, float* out, void* scratch,
                           ReadAhead* ahead);

    // out[s * width_out + c] = bias[c] + sum over taps of window(s) . kernel[tap][c], modules [begin, end).
    // rows[tap] points to module 0 of the input at that position; a window starts `lead` elements before its module.
    void (*convolve)(const Matrix& kernel, const float* bias, int64_t taps, const void* const* rows, int64_t stride,
                     int64_t lead, int64_t begin, int64_t end, float* out, ReadAhead* ahead);

    // Choices of blocks [begin, end) for every token: units[t * unit_stride + block * k + j], best first; with
    // `probabilities` (the same layout) also each chosen unit's softmax probability. `far`: `rows` of chosen units are
    // prefetched while further blocks stream in.
    void (*choose)(const Matrix& second, const float* bias, const Choice& choice, int64_t begin, int64_t end,
                   const Activations& z, int64_t tokens, int32_t* units, float* probabilities, int64_t unit_stride,
                   const Matrix& rows, int64_t parts, bool far);

    // h[i] = activation(first[u_i] . x + unit_bias[u_i]) (times up[u_i] . x when gated) for chosen units [begin, end).
    // `far`: rows come from memory and are prefetched; otherwise they are cached, since many tokens share them.
    void (*unit_dots)(const Matrix& units, int64_t parts, int64_t activation, const float* unit_bias,
                      const int32_t* chosen, int64_t begin, int64_t end, const Activations& x, bool far, float* h);

    // out[i] = row u_i of w . x for chosen rows [begin, end); w is `units` with one row each. `far` as above.
    void (*row_dots)(const Matrix& w, const int32_t* chosen, int64_t begin, int64_t end, const Activations& x, bool far,
                     float* out);

    // y[c] += sum_i h[i] down[u_i][c] over columns [begin, end); units with h = 0 are not read.
    void (*unit_sums)(const Matrix& units, int64_t parts, const int32_t* chosen, const float* h, int64_t count,
                      int64_t begin, int64_t end, float* y);

    // out[i * (parts - 1) + r] = r-th row of chosen[i]'s residual . x, and y[c] += sum_i h[chosen[i]] * its last row
    // over columns [begin, end), `begin` a multiple of LANES.
    void (*residual_dots)(const Matrix& residual, int64_t parts, const int32_t* chosen, int64_t count,
                          const Activations& x, float* out);
    void (*residual_sums)(const Matrix& residual, int64_t parts, const int32_t* chosen, const float* h, int64_t count,
                          int64_t begin, int64_t end, float* y);

    // Prefetches memory into the second-level cache.
    void (*prefetch)(const void* from, int64_t bytes);

    void (*activate)(int64_t activation, const float* gate, float* h, int64_t count);
    void (*normalize)(const float* x, const float* weight, const float* bias, int64_t count, bool rms, double epsilon,
                      float* out);
    void (*convert)(const float* values, int64_t type, int64_t count, void* out);  // float32 and bfloat16
    void (*widen)(const void* values, const float* scale, int64_t type, int64_t count, float* out);

    // Writes one key (width) and one value at `position`.
    void (*append)(const float* key, const float* value, int64_t type, int64_t width, int64_t position,
                   const HeadCache& cache, int64_t value_stride);

    // out[i] = softmax(s) V over positions starts[i] <= p < lengths[i], for up to QUERIES queries, with scores
    // s = q[i] K^T * scale, or softcap * tanh(s / softcap) unless `softcap` is 0.
    void (*attend)(const float* const* queries, const int64_t* starts, const int64_t* lengths, int64_t count,
                   int64_t type, int64_t width, const HeadCache& cache, int64_t value_stride, float scale,
                   float softcap, float* scores, int64_t score_stride, float* const* out);

    // x = limit * tanh(x / limit).
    void (*soft_cap)(float* x, int64_t count, float limit);

    // buckets[r * stride] = the bucket of a key in round r. Each factor's digit is the index of the largest number
    // among `rotated` = key . rotations (width, columns) and its negatives, which are counted behind it; the first
    // factor is the least significant digit. `rotated` is scratch of `columns` floats.
    void (*hash)(const float* key, int64_t width, const float* rotations, int64_t columns, const int64_t* factors,
                 int64_t count, int64_t rounds, float* rotated, int32_t* buckets, int64_t stride);

    // Positions before `position` that share a bucket with it in any round, in order; returns how many.
    int64_t (*find_same_bucket)(const int32_t* buckets, int64_t stride, int64_t rounds, int64_t position,
                                int32_t* found);

    // out = softmax(q K^T) V over `count` chosen positions of a cache with keys by_rows.
    void (*attend_chosen)(const float* query, const int32_t* chosen, int64_t count, int64_t type, int64_t width,
                          const HeadCache& cache, int64_t value_stride, float* scores, float* out);

    // out[i] = source index[i] . x[r] for every i of a row's list, or added to it; x (rows, SLICE).
    void (*gather_dots)(const Gathered& g, const float* x, bool add, float* out);

    // y[r] += sum of factor[i] * source index[i] over a row's list, in its order; y (rows, SLICE).
    void (*gather_sums)(const Gathered& g, const float* factor, float* y);

    // c[m][n] += sum_i a[m * a_row + i * a_step] b[i][n] for i < count in order; b and c are `width` wide, a multiple of
    // LANES.
    void (*add_matrix_product)(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t count,
                               int64_t rows, int64_t width, float* c);

    // scores[i] += temperature * Gumbel noise, number first + i of a seed; `count` is a multiple of LANES.
    void (*add_gumbel_noise)(float temperature, uint64_t seed, int64_t first, int64_t count, float* scores);

    // The `count` largest scores, best first, of equal ones the first; they become minus infinity. `width` as below.
    void (*choose_largest)(float* scores, int64_t width, int64_t count, int32_t* chosen);

    // z = softmax(z) over `width` logits, a multiple of LANES; and z = the gradient of logits where p = softmax(z) has
    // `gradient` at `count` chosen ones and none elsewhere.
    void (*softmax)(float* z, int64_t width);
    void (*softmax_gradient)(float* z, int64_t width, const int32_t* chosen, const float* gradient, int64_t count);

    // An activation of every x, and its slope.
    void (*activation_slopes)(int64_t activation, const float* x, int64_t count, float* values, float* slopes);
};

// An instruction set: its name, whether this processor has it, and its ops, null where they are not built for this
// architecture. Ops must not be called unless `available`.
struct InstructionSet {
    const char* name;
    bool (*available)();
    const Ops* (*ops)();
};

// Every instruction set, the best first.
inline constexpr int64_t INSTRUCTION_SETS = 9;
extern const InstructionSet instruction_sets[INSTRUCTION_SETS];

// The ops of an instruction set by its name, of the best one for "auto"; null where this processor or build lacks it.
const Ops* find_ops(const char* name);

// The ops that the process uses: those that it selected last, the best ones before.
void select_ops(const Ops* ops);
const Ops& selected_ops();

const Ops* portable_ops();
const Ops* avx2_ops();
const Ops* avx2_vnni_ops();
const Ops* avx512_ops();
const Ops* avx512_vnni_ops();
const Ops* avx512_bf16_ops();
const Ops* neon_ops();
const Ops* neon_dotprod_ops();
const Ops* neon_i8mm_bf16_ops();

}  // namespace sparsecli
