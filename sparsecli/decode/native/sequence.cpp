#include "sequence.h"

#include <numeric>

namespace sparsecli {

namespace {

// Elements of a row of a ConvState, and of its margin.
struct ConvRow {
    int64_t margin, elements;
};

// Windows of three modules, the first of which begins one module before the row's.
ConvRow overlapping(int64_t d, int64_t module_width) {
    const int64_t margin = round_up(module_width, LANES);
    return {margin, round_up(margin + d + module_width + LANES, LANES)};
}

ConvRow projection_row(const Model& model) {
    const bool convolved = model.convolves() || model.shape.output == MULTIPLICATIVE_CONV_OUTPUT;
    return overlapping(model.shape.d_model, convolved ? model.module_width() : 0);
}

ConvRow value_row(const Model& model) { return {0, round_up(2 * model.shape.d_model + LANES, LANES)}; }
ConvRow query_row(const Model& model) { return overlapping(model.shape.d_model, model.query_module_width()); }

// Room of each cache. The tokens of a pass are all stored before the first of them attends: a ring has room for a window
// before each. Heads do not lie a power of two apart, or they would share a few sets of the processor's caches.
std::vector<int64_t> slots_of(const Model& model, int64_t positions) {
    std::vector<int64_t> slots;
    for (int64_t cache_idx = 0; cache_idx < model.caches(); ++cache_idx) {
        const int64_t window = model.windows[size_t(cache_idx / model.shape.attention_layers)];
        const int64_t room = round_up(window ? std::min(positions, window + CHUNK) : positions, LANES);
        slots.push_back(room % (8 * LANES) ? room : room + LANES);
    }
    return slots;
}

std::vector<int64_t> encoder_slots_of(const Model& model, int64_t rows) {
    return std::vector<int64_t>(size_t(model.crosses() ? model.shape.layers : 0), round_up(rows, LANES));
}

struct KeyValueBytes {
    int64_t keys, values, scales;  // scales of either, where the cache is int8

    KeyValueBytes(const Model& model, const std::vector<int64_t>& slots, int64_t heads, bool by_rows) {
        const sparsecli_shape& s = model.shape;
        const int64_t held = heads * std::accumulate(slots.begin(), slots.end(), int64_t(0));
        const int64_t value_stride = round_up(s.head_width, LANES);
        keys = held * (by_rows ? value_stride : s.head_width) * type_bytes(s.cache_type);
        values = held * value_stride * type_bytes(s.cache_type);
        scales = s.cache_type == INT8 ? held * int64_t(sizeof(float)) : 0;
    }

    int64_t all() const { return keys + values + 2 * scales; }
};

// Bytes of a sequence's caches; 0: the model does not have it.
struct CacheBytes {
    KeyValueBytes self_attention, cross_attention;
    int64_t projection_inputs, value_inputs, output_inputs, query_inputs, recurrent_states, buckets;

    CacheBytes(const Model& model, int64_t capacity, int64_t encoder_rows)
        : self_attention(model, slots_of(model, capacity), model.shape.key_value_heads, model.hashes()),
          cross_attention(model, encoder_slots_of(model, encoder_rows), model.shape.heads, false) {
        const sparsecli_shape& s = model.shape;
        const int64_t column = (s.kernel - 1 + capacity) * type_bytes(s.conv_type);  // of one element a row
        const auto inputs = [&](bool exists, int64_t layers, const ConvRow& row) {
            return exists ? layers * column * row.elements : 0;
        };
        const bool convolves = model.convolves();
        projection_inputs = inputs(convolves, model.caches(), projection_row(model));
        value_inputs = inputs(convolves && s.value_concat, model.caches(), value_row(model));
        output_inputs = inputs(s.output == MULTIPLICATIVE_CONV_OUTPUT, model.caches(), projection_row(model));
        query_inputs = inputs(s.query_modules, s.layers, query_row(model));
        recurrent_states = s.layers * s.recurrent_layers * (1 + capacity) * s.recurrent_width * int64_t(sizeof(float));
        buckets = model.caches() * s.heads * s.hash_rounds * round_up(capacity, LANES) * int64_t(sizeof(int32_t));
    }

    int64_t all() const {
        return self_attention.all() + cross_attention.all() + projection_inputs + value_inputs + output_inputs +
               query_inputs + recurrent_states + buckets;
    }
};

void allocate(KeyValues& cache, const KeyValueBytes& bytes, std::vector<int64_t> slots, int64_t heads,
              int64_t positions, bool by_rows, const sparsecli_shape& shape) {
    cache.before.resize(slots.size());
    std::exclusive_scan(slots.begin(), slots.end(), cache.before.begin(), int64_t(0));
    cache.slots = std::move(slots);
    cache.positions = round_up(positions, LANES);
    cache.heads = heads;
    cache.head_width = shape.head_width;
    cache.value_stride = round_up(shape.head_width, LANES);
    cache.type = shape.cache_type;
    cache.by_rows = by_rows;
    cache.keys.bytes(bytes.keys, shape.poison);
    cache.values.bytes(bytes.values, shape.poison);
    cache.key_scales.bytes(bytes.scales, shape.poison);
    cache.value_scales.bytes(bytes.scales, shape.poison);
}

void allocate(ConvState& state, int64_t bytes, int64_t capacity, const ConvRow& row, const sparsecli_shape& shape) {
    state.padding = shape.kernel - 1;
    state.rows = state.padding + capacity;
    state.type = shape.conv_type;
    state.row_bytes = row.elements * type_bytes(state.type);
    state.margin_bytes = row.margin * type_bytes(state.type);
    state.inputs.bytes(bytes, false);  // margins and what precedes the first position are zero
}

}  // namespace

int64_t positions_of(const Model& model, int64_t tokens, int64_t encoder_rows) {
    return tokens + (model.shape.encoder == PREFIX ? encoder_rows : 0);
}

int64_t cache_bytes(const Model& model, int64_t capacity, int64_t encoder_rows) {
    return CacheBytes(model, capacity, encoder_rows).all();
}

// Bytes for many positions are at most as many times those for one.
bool countable(const Model& model, int64_t tokens, int64_t encoder_rows) {
    constexpr int64_t MOST = int64_t(1) << 30;
    if (tokens < 1 || tokens > MOST || encoder_rows < 0 || encoder_rows > MOST) return false;
    return tokens + encoder_rows <= INT64_MAX / cache_bytes(model, 1, 1);
}

void allocate(Sequence& sequence, const Model& model) {
    const sparsecli_shape& s = model.shape;
    const int64_t capacity = sequence.capacity;
    const CacheBytes bytes(model, capacity, sequence.encoder_capacity);
    allocate(sequence.self_attention, bytes.self_attention, slots_of(model, capacity), s.key_value_heads, capacity,
             model.hashes(), s);
    allocate(sequence.cross_attention, bytes.cross_attention, encoder_slots_of(model, sequence.encoder_capacity),
             s.heads, sequence.encoder_capacity, false, s);
    sequence.buckets.bytes(bytes.buckets, s.poison);
    sequence.hashed.resize(size_t(model.hashes() ? model.caches() * s.heads : 0));
    allocate(sequence.projection_inputs, bytes.projection_inputs, capacity, projection_row(model), s);
    allocate(sequence.value_inputs, bytes.value_inputs, capacity, value_row(model), s);
    allocate(sequence.output_inputs, bytes.output_inputs, capacity, projection_row(model), s);
    allocate(sequence.query_inputs, bytes.query_inputs, capacity, query_row(model), s);
    sequence.recurrent_states.bytes(bytes.recurrent_states, false);  // zeros before the first position
}

bool can_truncate(const Sequence& sequence, const Model& model, int64_t length) {
    for (int64_t cache_idx = 0; length && cache_idx < model.caches(); ++cache_idx) {
        const int64_t window = model.windows[size_t(cache_idx / model.shape.attention_layers)];
        const int64_t first = sequence.stored - sequence.self_attention.slots[size_t(cache_idx)];
        if (window && std::max<int64_t>(length + 1 - window, 0) < first) return false;
    }
    return true;
}

void copy(const Sequence& from, int64_t length, const Model& model, Sequence& to) {
    const sparsecli_shape& s = model.shape;
    const KeyValues& cache = from.self_attention;
    const int64_t bytes = type_bytes(cache.type);
    for (int64_t cache_idx = 0; cache_idx < model.caches(); ++cache_idx) {
        const int64_t room = cache.slots[size_t(cache_idx)];
        // A ring is copied whole: its positions begin anywhere.
        const int64_t held = std::min(round_up(from.stored > room ? room : length, LANES), room);
        for (int64_t head = 0; head < s.key_value_heads; ++head) {
            const HeadCache source = cache.of_head(cache_idx, head);
            const HeadCache target = to.self_attention.of_head(cache_idx, head);
            std::memcpy((char*)target.keys, source.keys, size_t(held * cache.head_width * bytes));
            std::memcpy((char*)target.values, source.values, size_t(held * cache.value_stride * bytes));
            if (!source.key_scales) continue;
            std::memcpy((float*)target.key_scales, source.key_scales, size_t(held) * sizeof(float));
            std::memcpy((float*)target.value_scales, source.value_scales, size_t(held) * sizeof(float));
        }
        for (const auto inputs : {&Sequence::projection_inputs, &Sequence::value_inputs, &Sequence::output_inputs}) {
            const ConvState &source = from.*inputs, &target = to.*inputs;
            if (!source.inputs.data) continue;
            const int64_t at = (cache_idx * source.rows + source.padding) * source.row_bytes;
            std::memcpy(target.inputs.data + at, source.inputs.data + at, size_t(length * source.row_bytes));
        }
    }
    for (int64_t layer_idx = 0; layer_idx < s.layers; ++layer_idx)
        for (int64_t cell = 0; cell < s.recurrent_layers; ++cell)
            std::copy_n(from.recurrent_state(model, layer_idx, cell, 0), length * s.recurrent_width,
                        to.recurrent_state(model, layer_idx, cell, 0));
    if (s.rotary_switch) to.ids.assign(from.ids.begin(), from.ids.begin() + length);
    to.long_frequencies = from.long_frequencies;
    to.length = length;
    to.stored = length ? from.stored : 0;
}

void append_concatenated(const Model& model, const Ops& ops, const ConvState& state, int64_t cache_idx,
                         int64_t position, const float* m, const float* x, int64_t begin, int64_t end) {
    const int64_t width = model.module_width(), bytes = type_bytes(state.type);
    const bool whole = model.shape.value_concat == CONCAT_WHOLE;
    char* row = state.row(cache_idx, position);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t first = whole ? i : i / width * 2 * width + i % width;
        const int64_t second = first + (whole ? model.shape.d_model : width);
        ops.convert(m + i, state.type, 1, row + first * bytes);
        ops.convert(x + i, state.type, 1, row + second * bytes);
    }
}

void import_kv(Sequence& sequence, const Model& model, const Ops& ops, int64_t cache_idx, const ImportedLayer& layer) {
    const sparsecli_shape& s = model.shape;
    const int64_t d = s.d_model, width = model.key_width(), layer_idx = cache_idx / s.attention_layers;
    const KeyValues& cache = sequence.self_attention;
    for (int64_t position = 0; position < layer.count; ++position) {
        for (int64_t head = 0; head < s.key_value_heads; ++head) {
            const int64_t at = position * width + head * s.head_width;
            ops.append(layer.keys + at, layer.values + at, s.cache_type, s.head_width, position,
                       cache.of_head(cache_idx, head), cache.value_stride);
        }
        if (layer.conv_inputs) {
            const float* m = layer.conv_inputs + position * (s.value_concat ? 2 * d : d);
            sequence.projection_inputs.append(ops, cache_idx, position, m, 0, d);
            if (s.value_concat)
                append_concatenated(model, ops, sequence.value_inputs, cache_idx, position, m, m + d, 0, d);
        }
        if (layer.output_conv_inputs)
            sequence.output_inputs.append(ops, cache_idx, position, layer.output_conv_inputs + position * d, 0, d);
        for (int64_t cell = 0; layer.recurrent_states && cell < s.recurrent_layers; ++cell)
            std::memcpy(sequence.recurrent_state(model, layer_idx, cell, position),
                        layer.recurrent_states + (cell * layer.count + position) * s.recurrent_width,
                        size_t(s.recurrent_width) * sizeof(float));
    }
    for (int64_t head = 0; head < s.heads && model.hashes(); ++head)
        sequence.hashed[size_t(cache_idx * s.heads + head)] = {};
}

}  // namespace sparsecli
