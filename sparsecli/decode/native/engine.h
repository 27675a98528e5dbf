// The C interface of the decode engine: pointers and 64-bit sizes, no exceptions, no global state but the chosen
// instruction set. Functions that can fail return null or a negative number and leave one line in `error`
// (SPARSECLI_ERROR_BYTES). `binding.py` is the only caller and mirrors the structures below.
#pragma once
#include <cstdint>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {

enum { SPARSECLI_ERROR_BYTES = 256 };

struct sparsecli_shape {
    int64_t d_model, layers, heads, head_width, key_value_heads, max_positions, vocabulary;
    int64_t feed_forward;  // 0 dense, 1 sparse, 2 mixture, 3 selector, 4 precision, 5 spark
    int64_t d_ff, activation, gated;
    int64_t block_size,
        rank;          // mixture: units of an expert, and experts; selector: rank of the bypass; spark: inputs of the
                       // predictor
    int64_t positive;  // selector: units above their threshold, not the best of a block
    int64_t probability_gate;  // of a chosen unit or expert: 1 yes, of a mixture's before its activations, 2 behind
    int64_t normalized_probabilities;  // mixture: those of the chosen experts add up to 1
    int64_t projection;                // 0 dense, 1 multiplicative, 2 dense_conv, 3 multiplicative_conv
    int64_t output;                    // 0 none, 1 dense, 2 multiplicative, 3 multiplicative_conv
    int64_t modules, kernel;
    int64_t value_concat;          // 0 none, 1 modules, 2 whole
    int64_t query_key_norm;        // before rotary positions: 0 none, 1 over every head, 2 over all heads together
    int64_t query_rank, key_rank;  // of two maps in a row; 0: one map each
    int64_t rms;
    int64_t post_norms;        // norms behind attention and the feed-forward layer, too, or only there
    int64_t positions;         // 0 learned, 1 sinusoidal, 2 rotary
    int64_t rotary_width;      // elements of a head that are turned, from its start
    int64_t rotary_switch;     // longest text that `frequencies` turn, others by `long_frequencies`; 0: all of them
    int64_t parallel;          // attention and feed-forward of a block read the same stream
    int64_t streams;           // 2: blocks read one and add to the other, in turn
    int64_t concatenate;       // the two streams are put side by side in the end, not averaged
    int64_t attention_layers;  // of a block with two streams
    int64_t shared_query_key;  // keys are unit queries: 1 of one projection, 2 the mean of two
    int64_t hash_rounds;       // of LSH attention; 0: attention to all keys
    int64_t most_keys;         // that a token attends to then, itself among them
    int64_t encoder;           // its output: 0 none, 1 read by cross-attention, 2 a prefix of the tokens
    int64_t query_modules;     // of cross-attention's queries; 0: dense
    int64_t recurrent_layers, recurrent_width;  // of the branch beside the feed-forward layer
    int64_t head_modules;                       // 0: dense
    int64_t head_candidates;                    // likeliest tokens that `head.exact` scores again; 0: none
    int64_t cache_type;                         // of keys and values
    int64_t conv_type;                          // of convolutions' inputs and kernels
    int64_t units_on_disk;                      // units are mapped from a file: read a layer's chosen rows ahead
    int64_t poison;                             // fill working memory with NaN first, for tests
    double epsilon, embedding_scale;
    double rotary_attention_factor;                     // on cosines and sines of `frequencies` and `long_frequencies`
    double attention_scale, attention_softcap;          // of scores; a limit of 0: none
    double residual_scale, logit_scale, logit_softcap;  // of what layers add, and of logits
    double unit_quantile;            // spark: standard deviations between the mean of the scores and the threshold
    const int64_t* units_per_block;  // of every layer, read once; mixture: experts a token
    const int64_t* windows;          // positions that a token sees in every layer; 0: all
    const int64_t* rotary_tables;    // of every layer: 0 none, 1 full, 2 sliding
};

int64_t sparsecli_interface(void);  // a version, and the size of the structure above: the caller compares

const char* sparsecli_instruction_set(const char* name, char* error);  // null: not available; "auto": the best

struct sparsecli_engine;
struct sparsecli_sequence;

sparsecli_engine* sparsecli_create(const sparsecli_shape* shape, int64_t threads, int64_t pin, char* error);
void sparsecli_destroy(sparsecli_engine* engine);

// Hands over packed tensors, of which the caller has made sure that they are those of the shape, of types that their
// ops compute with, and as long as their layout says (decode/packed/). Their memory stays the caller's.
struct sparsecli_tensor {
    const char* name;  // within its layer
    const void* data;
    const float* scale;  // of each row, int8 only
    int64_t layer;       // -1: the model's own
    int64_t type, rows, cols;
    int64_t by_rows;  // see ops.h
};
int64_t sparsecli_bind(sparsecli_engine* engine, const sparsecli_tensor* tensors, int64_t count, char* error);

// The rotations that an attention layer hashes keys with, in a text of 2^(level - 1) + 1 to 2^level positions: (heads,
// head_width, columns). Columns of a round are side by side, those of its first factor first, half as many of each as
// the factor; zeros fill them up to a multiple of 16. `cache_idx` numbers attention layers in order. Rotations have to
// be bound before sequences that may grow so long are made. Their memory stays the caller's.
int64_t sparsecli_bind_rotations(sparsecli_engine* engine, int64_t cache_idx, int64_t level, const int64_t* factors,
                                 int64_t count, const float* rotations, int64_t elements, char* error);

// With room for `capacity` tokens, 1 to 2^30, and for `encoder_rows` rows of an encoder's output, 0 to 2^30.
sparsecli_sequence* sparsecli_sequence_create(sparsecli_engine* engine, int64_t capacity, int64_t encoder_rows,
                                              char* error);
void sparsecli_sequence_destroy(sparsecli_sequence* sequence);
int64_t sparsecli_sequence_length(const sparsecli_sequence* sequence);
// Fails, and changes nothing, where layers with a window do not hold the positions before `length` any more.
int64_t sparsecli_sequence_truncate(sparsecli_engine* engine, sparsecli_sequence* sequence, int64_t length,
                                    char* error);
// Empties `to` and gives it the first `length` tokens of `from`, which must have the same capacity. Fails, and leaves `to`
// as it was, where layers do not hold those tokens any more, and for models with an encoder or LSH attention.
int64_t sparsecli_sequence_copy(sparsecli_engine* engine, const sparsecli_sequence* from, int64_t length,
                                sparsecli_sequence* to, char* error);
// INT64_MAX: more than can be counted, or a number out of range.
int64_t sparsecli_sequence_bytes(const sparsecli_engine* engine, int64_t capacity, int64_t encoder_rows);

// Empties a sequence and gives it an encoder's output: `rows` vectors of d_model for each stream. The second stream is
// read where there are two and the output is a prefix.
int64_t sparsecli_read_encoder(sparsecli_engine* engine, sparsecli_sequence* sequence, const float* first,
                               const float* second, int64_t rows, char* error);

// Empties a sequence and fills one attention layer's caches with what another implementation computed for the first
// `positions`: keys and values (positions, heads, head_width) and, where the layer has them,
//   conv_inputs         of the projection's convolutions (positions, d_model), or with values' second input beside
//                       them (positions, 2 d_model)
//   output_conv_inputs  of the output's convolution (positions, d_model)
//   recurrent_states    after each position (recurrent_layers, positions, recurrent_width), with a block's first layer
// Once all layers are imported, sparsecli_import_done sets the length and how many positions are an encoder's prefix.
int64_t sparsecli_import_kv(sparsecli_engine* engine, sparsecli_sequence* sequence, int64_t cache_idx,
                            const float* keys, const float* values, const float* conv_inputs,
                            const float* output_conv_inputs, const float* recurrent_states, int64_t positions,
                            char* error);
int64_t sparsecli_import_done(sparsecli_engine* engine, sparsecli_sequence* sequence, int64_t positions, int64_t prefix,
                              char* error);

// Adds ids[i] to sequences[i], `count` of them; tokens of one sequence (a prompt) follow one another.
// logits (rows, vocabulary): of every token where all_logits, else of each sequence's last. -2: no such token.
int64_t sparsecli_forward(sparsecli_engine* engine, sparsecli_sequence* const* sequences, const int64_t* ids,
                          int64_t count, int64_t all_logits, float* logits, char* error);

// Units of every layer that were computed in full since the last call, and the tokens that were added meanwhile, rows
// of a prefix among them.
void sparsecli_active_units(sparsecli_engine* engine, int64_t* units, int64_t* tokens);

// Nanoseconds that the blocks of the last sparsecli_forward took, and seconds by part since the last call.
int64_t sparsecli_block_stack_ns(const sparsecli_engine* engine);
void sparsecli_profile(sparsecli_engine* engine, double* seconds);
const char* sparsecli_profile_part(int64_t index);  // null after the last

// Rows of a GGUF file, of one of its types (ops.h), as panels, which were zero. -1: no such type, or broken blocks.
int64_t sparsecli_arrange_gguf(int64_t type, const uint8_t* raw, int64_t rows, int64_t cols, uint8_t* panels,
                               int64_t threads);

// The scales (rows, cols / group) of groups of `weights` (rows, cols), and where `minimum` is given their minima, with
// the least error for values from `lowest` to `highest`: whole numbers, or where `values` are given these `codes`
// ascending ones; errors count by the `importance` (cols,) of their columns.
int64_t sparsecli_fit_groups(const float* weights, const float* importance, int64_t rows, int64_t cols, int64_t group,
                             float lowest, float highest, const float* values, int64_t codes, const float* shares,
                             int64_t count, float* scale, float* minimum, int64_t threads);

// Rounds `columns` columns (columns, rows) to codes from `lowest` to `highest`, or to those of the nearest of `count`
// `values`, one after another; those behind take over the errors, by rows of `factor` that are `stride` apart. The
// errors, divided by its diagonal, are returned too.
int64_t sparsecli_round_columns(float* remaining, float* codes, float* errors, const float* scales,
                                const float* offsets, const int64_t* groups, const float* factor, int64_t columns,
                                int64_t rows, int64_t stride, float lowest, float highest, const float* values,
                                int64_t count, int64_t threads);
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
