// What is remembered of one sequence, and how much memory that takes.
#pragma once
#include <cstdint>
#include <vector>

#include "memory.h"
#include "model.h"

namespace sparsecli {

// Keys and values of several attention layers, every head's on its own, `positions` each.
struct KeyValues {
    int64_t positions = 0, heads = 0;
    bool by_rows = false;  // a key's numbers lie side by side, as a value's do: some of the keys are read
    Buffer<char> keys, values;
    Buffer<float> key_scales, value_scales;
};

// Keys of a head that have buckets: so many from the first, each in one of so many.
struct Hashed {
    int64_t positions = 0, buckets = 0;
};

struct Sequence {
    int64_t capacity, length = 0;                    // positions; where a source is joined it takes the first ones
    int64_t source_capacity = 0, source_length = 0;  // rows of an encoder's output
    int64_t first = 0;                               // position of the first token
    int64_t newest = 0;                              // position of the pass that is running
    KeyValues own, source;
    Buffer<int32_t> buckets;                                             // of keys: [cache][head][round][position]
    std::vector<Hashed> hashed;                                          // [cache][head]
    Buffer<char> history, value_history, output_history, query_history;  // inputs of convolutions, all positions
    Buffer<float> states;                                                // of recurrent units after every position
};

// Strides of a sequence's buffers, in elements.
struct CacheSizes {
    int64_t value_stride, history_margin, history_row, value_history_row, query_margin, query_history_row;

    explicit CacheSizes(const Model& model) {
        const sparsecli_shape& s = model.shape;
        const bool convolved = model.convolves() || s.output == MULTIPLICATIVE_CONV_OUTPUT;
        const int64_t width = convolved ? model.module_width() : 0, query_width = model.query_module_width();
        value_stride = round_up(s.head_width, LANES);
        history_margin = round_up(width, LANES);
        history_row = round_up(history_margin + s.d_model + width + LANES, LANES);
        value_history_row = round_up(2 * s.d_model + LANES, LANES);
        query_margin = round_up(query_width, LANES);
        query_history_row = round_up(query_margin + s.d_model + query_width + LANES, LANES);
    }
};

// Bytes of keys, of values, and of the scales of either where they are int8.
struct KeyValueBytes {
    int64_t keys, values, scales;

    KeyValueBytes(const Model& model, int64_t caches, int64_t heads, int64_t positions, bool by_rows) {
        const sparsecli_shape& s = model.shape;
        const int64_t held = caches * heads * round_up(positions, LANES);
        const int64_t row = CacheSizes(model).value_stride;
        keys = held * (by_rows ? row : s.head_width) * type_bytes(s.cache_type);
        values = held * row * type_bytes(s.cache_type);
        scales = s.cache_type == INT8 ? held * int64_t(sizeof(float)) : 0;
    }

    int64_t all() const { return keys + values + 2 * scales; }
};

// Bytes of a sequence's buffers; 0: the model does not have it.
struct CacheBytes {
    KeyValueBytes own, source;
    int64_t history, value_history, output_history, query_history, states, buckets;

    CacheBytes(const Model& model, int64_t capacity, int64_t source_rows)
        : own(model, model.caches(), model.shape.key_value_heads, capacity, model.hashes()),
          source(model, model.crosses() ? model.shape.layers : 0, model.shape.heads, source_rows, false) {
        const sparsecli_shape& s = model.shape;
        const CacheSizes sizes(model);
        const int64_t rows = (s.kernel - 1 + capacity) * type_bytes(s.history_type);
        const bool convolves = model.convolves();
        history = convolves ? model.caches() * rows * sizes.history_row : 0;
        value_history = convolves && s.value_concat ? model.caches() * rows * sizes.value_history_row : 0;
        output_history = s.output == MULTIPLICATIVE_CONV_OUTPUT ? model.caches() * rows * sizes.history_row : 0;
        query_history = s.query_modules ? s.layers * rows * sizes.query_history_row : 0;
        states = s.layers * s.recurrent_layers * (1 + capacity) * s.recurrent_width * int64_t(sizeof(float));
        buckets = model.caches() * s.heads * s.hash_rounds * round_up(capacity, LANES) * int64_t(sizeof(int32_t));
    }

    int64_t all() const {
        return own.all() + source.all() + history + value_history + output_history + query_history + states + buckets;
    }
};

// Positions of a sequence for so many tokens and source rows.
inline int64_t positions_of(const Model& model, int64_t tokens, int64_t source_rows) {
    return tokens + (model.shape.source == JOINED ? source_rows : 0);
}

// Whether a sequence may be asked for: numbers in range, and bytes that 64 bits can count. Those of many positions are
// no more than as many times those of one.
inline bool countable(const Model& model, int64_t tokens, int64_t source_rows) {
    constexpr int64_t MOST = int64_t(1) << 30;
    if (tokens < 1 || tokens > MOST || source_rows < 0 || source_rows > MOST) return false;
    return tokens + source_rows <= INT64_MAX / CacheBytes(model, 1, 1).all();
}

inline void allocate(KeyValues& held, const KeyValueBytes& bytes, int64_t heads, int64_t positions, bool poison) {
    held.heads = heads;
    held.positions = round_up(positions, LANES);
    held.keys.bytes(bytes.keys, poison);
    held.values.bytes(bytes.values, poison);
    held.key_scales.bytes(bytes.scales, poison);
    held.value_scales.bytes(bytes.scales, poison);
}

// Memory for one sequence, whose capacities are given; throws std::bad_alloc.
inline void allocate(Sequence& sequence, const Model& model) {
    const sparsecli_shape& s = model.shape;
    const CacheBytes b(model, sequence.capacity, sequence.source_capacity);
    allocate(sequence.own, b.own, s.key_value_heads, sequence.capacity, s.poison);
    sequence.own.by_rows = model.hashes();
    sequence.buckets.bytes(b.buckets, s.poison);
    sequence.hashed.resize(size_t(model.hashes() ? model.caches() * s.heads : 0));
    allocate(sequence.source, b.source, s.heads, sequence.source_capacity, s.poison);
    sequence.history.bytes(b.history, false);  // margins and what precedes the first position are zero
    sequence.value_history.bytes(b.value_history, false);
    sequence.output_history.bytes(b.output_history, false);
    sequence.query_history.bytes(b.query_history, false);
    sequence.states.bytes(b.states, false);  // zeros before the first position
}

}  // namespace sparsecli
