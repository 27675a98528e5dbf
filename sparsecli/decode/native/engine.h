// The C interface of the decode engine: pointers and 64-bit sizes, no exceptions, no global state but the chosen
// instruction set. Functions that can fail return null or a negative number and leave one line in `error`
// (SPARSECLI_ERROR_BYTES). `native.py` is the only caller and mirrors the structures below.
#pragma once
#include <cstdint>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {

enum { SPARSECLI_ERROR_BYTES = 256 };

struct sparsecli_shape {
    int64_t d_model, layers, heads, head_width, key_value_heads, max_positions, vocabulary;
    int64_t feed_forward;  // 0 dense, 1 sparse, 2 mixture, 3 selector, 4 precision
    int64_t d_ff, activation, gated;
    int64_t block_size, rank;  // mixture: units of an expert, and experts; selector: rank of the bypass
    int64_t positive;          // selector: units above their threshold, not the best of a block
    int64_t probability_gate;
    int64_t projection;  // 0 dense, 1 multiplicative, 2 dense_conv, 3 multiplicative_conv
    int64_t output;      // 0 none, 1 dense, 2 multiplicative, 3 multiplicative_conv
    int64_t modules, kernel;
    int64_t value_concat;          // 0 none, 1 modules, 2 whole
    int64_t query_key_norm;        // over every head, before rotary positions
    int64_t query_rank, key_rank;  // numbers between the two maps that make them; 0: one map each
    int64_t rms;
    int64_t positions;         // 0 learned, 1 sinusoidal, 2 rotary
    int64_t rotary_width;      // elements of a head that are turned, from its start
    int64_t parallel;          // attention and feed-forward of a block read the same stream
    int64_t streams;           // 2: blocks read one and add to the other, in turn
    int64_t concatenate;       // the two streams are put side by side in the end, not averaged
    int64_t attention_layers;  // of a block with two streams
    int64_t shared_query_key;  // keys are unit queries: 1 of one projection, 2 the mean of two
    int64_t hash_rounds;       // of attention among keys that hash alike; 0: to all keys
    int64_t most_keys;         // that a token attends to then, itself among them
    int64_t source;            // what an encoder made: 0 none, 1 attended to, 2 comes before the tokens
    int64_t query_modules;     // of queries to the source; 0: dense
    int64_t recurrent_layers, recurrent_width;  // of the branch beside the feed-forward layer
    int64_t head_modules;                       // 0: dense
    int64_t cache_type;                         // of keys and values
    int64_t history_type;                       // of the convolutions' inputs: that of their ops
    int64_t units_on_disk;                      // units are mapped from a file: ask for a layer's chosen rows at once
    int64_t poison;                             // fill working memory with NaN first, for tests
    double epsilon, embedding_scale;
    const int64_t* units_per_block;  // of every layer, read once; mixture: experts a token
};

int64_t sparsecli_interface(void);  // a version, and the size of the structure above: the caller compares

const char* sparsecli_instruction_set(const char* wanted, char* error);  // null: not available; "auto": the best

struct sparsecli_engine;
struct sparsecli_sequence;

sparsecli_engine* sparsecli_create(const sparsecli_shape* shape, int64_t threads, int64_t pin, char* error);
void sparsecli_destroy(sparsecli_engine* engine);

// Hands over packed tensors, of which the caller has made sure that they are those of the shape, of types that their ops
// compute with, and as long as their layout says (decode/packed/). Their memory stays the caller's.
struct sparsecli_tensor {
    const char* name;  // within its layer
    const void* data;
    const float* scale;  // of each row, int8 only
    int64_t layer;       // -1: the model's own
    int64_t type, rows, cols;
};
int64_t sparsecli_bind(sparsecli_engine* engine, const sparsecli_tensor* tensors, int64_t count, char* error);

// The axes that an attention layer hashes keys on, layers counted in the order of their caches, in a text of
// 2^(level - 1) + 1 to 2^level positions: (heads, head_width, columns), those of a round side by side, of its first
// factor first, with as many of each factor as half of it; what fills columns up to a multiple of 16 is zero. They are
// there before sequences that grow so long are made. The memory stays the caller's.
int64_t sparsecli_bind_axes(sparsecli_engine* engine, int64_t place, int64_t level, const int64_t* factors,
                            int64_t count, const float* axes, int64_t elements, char* error);

// With room for `capacity` tokens, 1 to 2^30, after a source of at most `source` rows, 0 to 2^30.
sparsecli_sequence* sparsecli_sequence_create(sparsecli_engine* engine, int64_t capacity, int64_t source, char* error);
void sparsecli_sequence_destroy(sparsecli_sequence* sequence);
int64_t sparsecli_sequence_length(const sparsecli_sequence* sequence);
void sparsecli_sequence_truncate(sparsecli_sequence* sequence, int64_t length);
// INT64_MAX: more than can be counted, or a number out of range.
int64_t sparsecli_sequence_bytes(const sparsecli_engine* engine, int64_t capacity, int64_t source);

// Begins a sequence anew with what an encoder made of a source: `rows` vectors of d_model for each stream; the second is
// read where there are two and the source is joined.
int64_t sparsecli_read_source(sparsecli_engine* engine, sparsecli_sequence* sequence, const float* first,
                              const float* second, int64_t rows, char* error);

// What another implementation remembers of the first `rows` positions, for a sequence that goes on from there: of one
// attention layer after the other keys and values (rows, heads, head_width) and, where the layer has them, inputs of
// its convolutions (rows, d_model; with what values read beside them 2 d_model), inputs of that of its output (rows,
// d_model), and states of the recurrent units (recurrent_layers, rows, recurrent_width), of a block with its first
// layer. The sequence is empty until `sparsecli_go_on` says that all are there, and how many rows were a joined source.
int64_t sparsecli_remember(sparsecli_engine* engine, sparsecli_sequence* sequence, int64_t place, const float* keys,
                           const float* values, const float* inputs, const float* output_inputs, const float* states,
                           int64_t rows, char* error);
int64_t sparsecli_go_on(sparsecli_engine* engine, sparsecli_sequence* sequence, int64_t rows, int64_t source,
                        char* error);

// Adds tokens[i] to sequences[i], `count` of them; the same sequence may come several times, but in a row (a prompt).
// logits (rows, vocabulary) of every token where all_logits, else of each sequence's last. -2: no such token.
int64_t sparsecli_forward(sparsecli_engine* engine, sparsecli_sequence* const* sequences, const int64_t* tokens,
                          int64_t count, int64_t all_logits, float* logits, char* error);

// Units that were computed in full since the last call, of every layer, and tokens that were added, for which the rows
// of a joined source count too: blocks compute them like tokens.
void sparsecli_counts(sparsecli_engine* engine, int64_t* units, int64_t* tokens);

// Nanoseconds that the blocks of the last sparsecli_forward took, and seconds by part since the last call.
int64_t sparsecli_block_stack_ns(const sparsecli_engine* engine);
void sparsecli_profile(sparsecli_engine* engine, double* seconds);
const char* sparsecli_profile_part(int64_t index);  // null after the last
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
