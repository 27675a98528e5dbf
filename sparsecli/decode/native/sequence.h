// The caches of one sequence: keys and values, inputs of convolutions, states of recurrent units.
//
// A cache is numbered by `cache_idx` = layer_idx * attention_layers + attention layer of the block. Caches of
// cross-attention and states of recurrent units are numbered by `layer_idx`.
#pragma once
#include <cstdint>
#include <vector>

#include "memory.h"
#include "model.h"

namespace sparsecli {

// Keys and values of several attention layers, each head apart.
struct KeyValues {
    int64_t positions = 0, heads = 0, head_width = 0, value_stride = 0, type = FLOAT32;
    std::vector<int64_t> slots;   // of each cache: positions that it has room for, fewer with a window, then in a ring
    std::vector<int64_t> before;  // the sum of those of earlier caches
    bool by_rows = false;         // keys are laid out as values are, so that some of them can be read (LSH attention)
    Buffer<char> keys, values;
    Buffer<float> key_scales, value_scales;

    HeadCache of_head(int64_t cache_idx, int64_t head) const {
        const int64_t room = slots[size_t(cache_idx)], bytes = type_bytes(type);
        const int64_t at = before[size_t(cache_idx)] * heads + head * room;
        return {keys.data + at * (by_rows ? value_stride : head_width) * bytes,
                values.data + at * value_stride * bytes,
                key_scales.data ? key_scales.data + at : nullptr,
                value_scales.data ? value_scales.data + at : nullptr,
                by_rows,
                room};
    }
};

// Inputs of a convolution over positions, for several layers: `kernel` - 1 rows of zeros, then one row a position.
// A row begins and ends with zeros, where windows of the outer modules reach beyond it.
struct ConvState {
    int64_t padding = 0, rows = 0, row_bytes = 0, margin_bytes = 0, type = FLOAT32;
    Buffer<char> inputs;

    // Module 0 of a position, which may be as low as 1 - kernel.
    char* row(int64_t idx, int64_t position) const {
        return inputs.data + (idx * rows + padding + position) * row_bytes + margin_bytes;
    }

    // Elements [begin, end) of x become those of the row.
    void append(const Ops& ops, int64_t idx, int64_t position, const float* x, int64_t begin, int64_t end) const {
        ops.convert(x + begin, type, end - begin, row(idx, position) + begin * type_bytes(type));
    }
};

// How many keys of a head are hashed, from position 0 on, and into how many buckets.
struct Hashed {
    int64_t positions = 0, buckets = 0;
};

struct Sequence {
    int64_t capacity, length = 0;                      // positions, a prefix among them
    int64_t encoder_capacity = 0, encoder_length = 0;  // rows of an encoder's output
    int64_t prefix = 0;                                // positions that an encoder's output takes before the tokens
    int64_t newest = 0;                                // last position of the pass that is running
    int64_t stored = 0;                                // positions that rings have taken since the sequence was empty
    std::vector<int64_t> ids;       // of all positions, where rotary frequencies depend on the length (`rotary_switch`)
    bool long_frequencies = false;  // turned the keys that are held
    KeyValues self_attention, cross_attention;
    Buffer<int32_t> buckets;                                   // of keys: [cache][head][round][position]
    std::vector<Hashed> hashed;                                // [cache][head]
    ConvState projection_inputs, value_inputs, output_inputs;  // by cache_idx
    ConvState query_inputs;                                    // of cross-attention
    Buffer<float> recurrent_states;                            // [layer][cell][1 + position][recurrent_width]

    float* recurrent_state(const Model& model, int64_t layer_idx, int64_t cell, int64_t position) const {
        const sparsecli_shape& s = model.shape;
        return recurrent_states.data +
               ((layer_idx * s.recurrent_layers + cell) * (1 + capacity) + 1 + position) * s.recurrent_width;
    }
};

// Inputs of a value's convolution that reads x beside the shared projection m, both (d): module by module, or one
// after the other. Elements [begin, end) of either.
void append_concatenated(const Model& model, const Ops& ops, const ConvState& state, int64_t cache_idx,
                         int64_t position, const float* m, const float* x, int64_t begin, int64_t end);

// What another implementation computed for positions 0 to `count` - 1 of one attention layer, see sparsecli_import_kv.
struct ImportedLayer {
    const float *keys, *values, *conv_inputs, *output_conv_inputs, *recurrent_states;
    int64_t count;
};
void import_kv(Sequence& sequence, const Model& model, const Ops& ops, int64_t cache_idx, const ImportedLayer& layer);

// Positions of a sequence with room for so many tokens and rows of an encoder's output.
int64_t positions_of(const Model& model, int64_t tokens, int64_t encoder_rows);

// Whether a sequence can be that long: numbers in range, and bytes that 64 bits can count.
bool countable(const Model& model, int64_t tokens, int64_t encoder_rows);

// Bytes of all caches of a sequence.
int64_t cache_bytes(const Model& model, int64_t capacity, int64_t encoder_rows);

// Whether every layer holds what the token behind the first `length` positions sees.
bool can_truncate(const Sequence& sequence, const Model& model, int64_t length);

// The first `length` positions of `from` become those of `to`, a sequence of the same capacity. Neither has an encoder's
// output or hashed keys, and `from` can be truncated to them.
void copy(const Sequence& from, int64_t length, const Model& model, Sequence& to);

// Memory for a sequence whose capacities are given; throws std::bad_alloc.
void allocate(Sequence& sequence, const Model& model);

}  // namespace sparsecli
