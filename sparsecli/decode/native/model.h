// The packed tensors of a model, by name: what `sparsecli_bind` fills in and the forward pass reads.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "engine.h"
#include "ops/ops.h"

namespace sparsecli {

enum FeedForward { DENSE_UNITS = 0, SPARSE_UNITS = 1, MIXTURE_UNITS = 2, SELECTOR_UNITS = 3, PRECISION_UNITS = 4 };
enum Projection { DENSE = 0, MULTIPLICATIVE = 1, DENSE_CONV = 2, MULTIPLICATIVE_CONV = 3 };
enum Output { NO_OUTPUT = 0, DENSE_OUTPUT = 1, MULTIPLICATIVE_OUTPUT = 2, MULTIPLICATIVE_CONV_OUTPUT = 3 };
enum Positions { LEARNED = 0, SINUSOIDAL = 1, ROTARY = 2 };
enum ValueConcat { NO_CONCAT = 0, CONCAT_MODULES = 1, CONCAT_WHOLE = 2 };
enum SharedQueryKey { OWN_KEYS = 0, ONE_PROJECTION = 1, MEAN_OF_TWO = 2 };
enum Source { NO_SOURCE = 0, CROSS_ATTENTION = 1, JOINED = 2 };
enum class Layout { VECTOR, ROWS, SPANS, PANELS, TAPS, BLOCKS, UNITS, LOW_BIT, RESIDUAL };

// A dense or a multiplicative map, whichever is bound.
struct Map {
    Matrix weight, D, E, bias;
};

struct Norm {
    Matrix weight, bias;
};

struct Convolution {
    Matrix kernel, bias;
};

struct AttentionLayer {
    Norm norm;
    Map query, key, value, shared, output;
    Map query_first, key_first;  // of two maps the first; the second is `query` or `key`
    Norm query_norm, key_norm;   // of every head
    Convolution query_convolution, key_convolution, value_convolution, output_convolution;
};

// Simple recurrent units on a narrow path beside the feed-forward layer.
struct Recurrence {
    Norm norm;
    Map enter, leave;
    std::vector<Map> cells;
};

struct Block {
    AttentionLayer attention[2];  // the second where a block has two
    AttentionLayer cross;         // to an encoder's output
    Recurrence recurrence;
    Norm feed_forward_norm;
    Map gate, up, down;  // dense feed-forward
    Matrix router, controller_first, controller_second, controller_bias, units, unit_bias, bias;
    Matrix copy;  // of gate and up in few bits: panels of either in turn
    Matrix importance, threshold, base_down, residual;
    Map bypass_first, bypass_second;
};

// What keys of an attention layer are hashed on in texts of some length.
struct Axes {
    std::vector<int64_t> factors;  // of the number of buckets
    int64_t buckets = 0, columns = 0;
    const float* data = nullptr;  // [head][width][columns]
};

// The number of buckets goes with the length of a text, rounded up to a power of two.
constexpr int64_t LEVELS = 32;
inline int64_t level_of(int64_t position) { return int64_t(std::bit_width(uint64_t(position))); }

struct Slot {
    std::string name;
    Matrix* matrix;
    Layout layout;
    int64_t rows, cols;
    bool optional = false;
};

inline const float* values(const Matrix& vector) { return (const float*)vector.data; }

struct Model {
    sparsecli_shape shape;
    Matrix embedding, positions, frequencies, exact_head;
    Norm norm;
    Map head;
    std::vector<Block> blocks;
    std::vector<int64_t> chosen_in_blocks;
    std::vector<Axes> axes;                    // [cache][level], null where no sequence needs them
    bool quantised = false, few_bits = false;  // what some weights that meet activations are
    std::vector<std::vector<Slot>> slots;      // the model's own first, then each block's

    int64_t attention_width() const { return shape.head_width * shape.heads; }
    int64_t key_width() const { return shape.head_width * shape.key_value_heads; }
    int64_t merged_width() const { return shape.concatenate ? 2 * shape.d_model : shape.d_model; }
    int64_t caches() const { return shape.layers * shape.attention_layers; }  // of keys and values, one after the other
    bool hashes() const { return shape.hash_rounds > 0; }
    // Of the text whose last position is given.
    const Axes& axes_of(int64_t place, int64_t last) const { return axes[size_t(place * LEVELS + level_of(last))]; }
    bool crosses() const { return shape.source == CROSS_ATTENTION; }
    int64_t query_module_width() const { return shape.query_modules ? shape.d_model / shape.query_modules : 0; }
    int64_t parts() const { return shape.gated ? 3 : 2; }
    int64_t module_width() const { return shape.d_model / shape.modules; }
    int64_t padded_block() const { return round_up(shape.block_size, LANES); }
    int64_t padded_rank() const { return round_up(shape.rank, 2); }
    // Whether a tensor of such a layout may be of such a type.
    bool takes(Layout layout, int64_t type) const {
        const bool few = type == INT4 || type == INT3;
        switch (layout) {
            case Layout::VECTOR:
                return type == FLOAT32;
            case Layout::TAPS:
                return type == shape.history_type;
            case Layout::LOW_BIT:
                return few;
            case Layout::RESIDUAL:
                return type == INT4;
            case Layout::SPANS:
                return true;
            default:
                return !few;
        }
    }
    bool low_rank() const { return shape.query_rank > 0; }
    bool convolves() const { return shape.projection == DENSE_CONV || shape.projection == MULTIPLICATIVE_CONV; }

    int64_t inward() const { return parts() - 1; }  // rows of a unit that meet its input
    int64_t padded_units() const { return round_up(shape.d_ff, LANES); }
    // Units of whole blocks that fill panels.
    int64_t whole_blocks() const {
        int64_t units = shape.block_size;
        while (units % LANES) units += shape.block_size;
        return units;
    }
    bool selects() const { return shape.feed_forward == SELECTOR_UNITS; }
    bool promotes() const { return shape.feed_forward == PRECISION_UNITS; }

    // k of a layer: units of a block, or experts a token.
    int64_t chosen_in_block(int64_t layer) const { return chosen_in_blocks[size_t(layer)]; }

    // Whether a layer with blocks has to choose: where all units are used, nothing is computed for it.
    bool chooses(int64_t layer) const {
        return shape.positive || shape.probability_gate || chosen_in_block(layer) < shape.block_size;
    }

    // Units of a layer that a token uses, as the layer lists them: at most, where it is up to the token.
    int64_t chosen_units(int64_t layer) const {
        if (shape.feed_forward == DENSE_UNITS || shape.positive) return shape.d_ff;
        if (shape.feed_forward == MIXTURE_UNITS) return shape.block_size * chosen_in_block(layer);
        return shape.d_ff / shape.block_size * chosen_in_block(layer);
    }

    explicit Model(const sparsecli_shape& given)
        : shape(given),
          blocks(size_t(given.layers)),
          chosen_in_blocks(given.units_per_block, given.units_per_block + given.layers) {
        shape.units_per_block = chosen_in_blocks.data();
        axes.resize(size_t(hashes() ? caches() * LEVELS : 0));
        std::vector<Slot> own;
        const int64_t d = shape.d_model, vocabulary = shape.vocabulary;
        own.push_back({"embedding", &embedding, Layout::ROWS, vocabulary, d});
        if (shape.positions == LEARNED)
            own.push_back({"positions", &positions, Layout::ROWS, shape.max_positions, d});
        else
            own.push_back({"frequencies", &frequencies, Layout::VECTOR, 1,
                           (shape.positions == ROTARY ? shape.rotary_width : d) / 2});
        add_norm(own, "norm", norm, merged_width(), shape.rms);
        add_map(own, "head", head, !shape.head_modules, vocabulary, merged_width(), shape.head_modules);
        own.push_back({"head.exact", &exact_head, Layout::SPANS, vocabulary, merged_width(), true});
        slots.push_back(own);
        for (int64_t layer = 0; layer < shape.layers; ++layer) slots.push_back(block_slots(layer));
    }

    static void add_norm(std::vector<Slot>& to, const std::string& name, Norm& norm_slots, int64_t d, bool rms) {
        to.push_back({name + ".weight", &norm_slots.weight, Layout::VECTOR, 1, d});
        if (!rms) to.push_back({name + ".bias", &norm_slots.bias, Layout::VECTOR, 1, d});
    }

    static void add_map(std::vector<Slot>& to, const std::string& name, Map& map, bool dense, int64_t rows,
                        int64_t cols, int64_t modules) {
        if (dense) {
            to.push_back({name + ".weight", &map.weight, Layout::SPANS, rows, cols});
        } else {
            to.push_back({name + ".D", &map.D, Layout::ROWS, modules, cols});
            to.push_back({name + ".E", &map.E, Layout::PANELS, rows / modules, cols});
        }
        to.push_back({name + ".bias", &map.bias, Layout::VECTOR, 1, rows, true});
    }

    static void add_convolution(std::vector<Slot>& to, const std::string& name, Convolution& convolution, int64_t width,
                                int64_t inputs, int64_t taps) {
        to.push_back({name + ".weight", &convolution.kernel, Layout::TAPS, width, inputs * taps});
        to.push_back({name + ".bias", &convolution.bias, Layout::VECTOR, 1, width});
    }

    std::vector<Slot> block_slots(int64_t layer) {
        Block& block = blocks[size_t(layer)];
        std::vector<Slot> to;
        add_attention(to, "", block.attention[0]);
        if (shape.attention_layers == 2) add_attention(to, "second.", block.attention[1]);
        if (crosses()) add_cross_attention(to, block.cross);
        add_norm(to, "feed_forward_norm", block.feed_forward_norm, shape.d_model, shape.rms);
        add_feed_forward(to, block, layer);
        if (shape.recurrent_layers) add_recurrence(to, block.recurrence);
        return to;
    }

    void add_attention(std::vector<Slot>& to, const std::string& prefix, AttentionLayer& layer) const {
        const int64_t d = shape.d_model, modules = shape.modules;
        const bool dense = shape.projection == DENSE || shape.projection == DENSE_CONV;
        const bool keys = shape.shared_query_key != ONE_PROJECTION;
        add_norm(to, prefix + "attention_norm", layer.norm, d, shape.rms);
        if (convolves()) {
            const int64_t width = module_width(), taps = shape.kernel;
            add_map(to, prefix + "shared", layer.shared, dense, d, d, modules);
            add_convolution(to, prefix + "query", layer.query_convolution, width, 3 * width, taps);
            if (keys) add_convolution(to, prefix + "key", layer.key_convolution, width, 3 * width, taps);
            add_convolution(to, prefix + "value", layer.value_convolution, width,
                            shape.value_concat ? 2 * width : width, taps);
        } else {
            if (low_rank()) {
                add_map(to, prefix + "query.first", layer.query_first, true, shape.query_rank, d, 0);
                add_map(to, prefix + "query.second", layer.query, true, attention_width(), shape.query_rank, 0);
                add_map(to, prefix + "key.first", layer.key_first, true, shape.key_rank, d, 0);
                add_map(to, prefix + "key.second", layer.key, true, key_width(), shape.key_rank, 0);
            } else {
                add_map(to, prefix + "query", layer.query, dense, attention_width(), d, modules);
                if (keys) add_map(to, prefix + "key", layer.key, dense, key_width(), d, modules);
            }
            add_map(to, prefix + "value", layer.value, dense, key_width(), d, modules);
        }
        if (shape.query_key_norm) {
            add_norm(to, prefix + "query_norm", layer.query_norm, shape.head_width, true);
            add_norm(to, prefix + "key_norm", layer.key_norm, shape.head_width, true);
        }
        if (shape.output != NO_OUTPUT)
            add_map(to, prefix + "output", layer.output, shape.output == DENSE_OUTPUT, d, attention_width(), modules);
        if (shape.output == MULTIPLICATIVE_CONV_OUTPUT)
            add_convolution(to, prefix + "output_convolution", layer.output_convolution, module_width(),
                            3 * module_width(), shape.kernel);
    }

    void add_cross_attention(std::vector<Slot>& to, AttentionLayer& cross) const {
        const int64_t d = shape.d_model, width = query_module_width();
        add_norm(to, "cross.attention_norm", cross.norm, d, shape.rms);
        add_map(to, "cross.key", cross.key, true, attention_width(), d, 0);
        add_map(to, "cross.value", cross.value, true, attention_width(), d, 0);
        if (shape.query_modules) {
            add_map(to, "cross.shared", cross.shared, false, d, d, shape.query_modules);
            add_convolution(to, "cross.query", cross.query_convolution, width, 3 * width, shape.kernel);
            return;
        }
        add_map(to, "cross.query", cross.query, true, attention_width(), d, 0);
        add_map(to, "cross.output", cross.output, true, d, attention_width(), 0);
    }

    void add_recurrence(std::vector<Slot>& to, Recurrence& branch) const {
        const int64_t d = shape.d_model, width = shape.recurrent_width;
        branch.cells.resize(size_t(shape.recurrent_layers));
        add_norm(to, "sru.norm", branch.norm, d, shape.rms);
        add_map(to, "sru.enter", branch.enter, true, width, d, 0);
        for (size_t cell = 0; cell < branch.cells.size(); ++cell)
            add_map(to, "sru.cells." + std::to_string(cell), branch.cells[cell], true, 3 * width, width, 0);
        add_map(to, "sru.leave", branch.leave, true, d, width, 0);
    }

    void add_feed_forward(std::vector<Slot>& to, Block& block, int64_t layer) const {
        const int64_t d = shape.d_model;
        const int64_t units = shape.d_ff;
        if (shape.feed_forward == DENSE_UNITS) {
            if (shape.gated) add_map(to, "gate", block.gate, true, units, d, 0);
            add_map(to, "up", block.up, true, units, d, 0);
            add_map(to, "down", block.down, true, d, units, 0);
            return;
        }
        if (shape.feed_forward != MIXTURE_UNITS)
            to.push_back({"unit_bias", &block.unit_bias, Layout::VECTOR, 1, units, true});
        const bool copied = promotes() || (selects() && chooses(layer));
        if (copied) to.push_back({"copy", &block.copy, Layout::LOW_BIT, padded_units() * inward(), d});
        if (copied && chooses(layer)) to.push_back({"importance", &block.importance, Layout::VECTOR, 1, units});
        if (promotes()) {
            to.push_back({"base.down", &block.base_down, Layout::LOW_BIT, d, units});
            if (chosen_in_block(layer)) to.push_back({"residual", &block.residual, Layout::RESIDUAL, units, d});
        } else if (selects()) {
            if (shape.positive) to.push_back({"threshold", &block.threshold, Layout::VECTOR, 1, units});
            if (shape.rank) add_map(to, "bypass.first", block.bypass_first, true, shape.rank, d, 0);
            if (shape.rank) add_map(to, "bypass.second", block.bypass_second, true, d, shape.rank, 0);
        } else if (shape.feed_forward == MIXTURE_UNITS) {
            to.push_back({"router", &block.router, Layout::SPANS, shape.rank, d});
        } else if (chooses(layer)) {
            to.push_back({"controller.first", &block.controller_first, Layout::SPANS, shape.rank, d});
            to.push_back({"controller.second", &block.controller_second, Layout::BLOCKS, units, shape.rank});
            to.push_back({"controller.bias", &block.controller_bias, Layout::VECTOR, 1,
                          units / shape.block_size * padded_block()});
        }
        if (!promotes()) to.push_back({"units", &block.units, Layout::UNITS, units * parts(), d});
        to.push_back({"bias", &block.bias, Layout::VECTOR, 1, d});
    }

    // Bytes that a slot's tensor has in memory, padding included, and its scales when it is int8.
    int64_t bytes(const Slot& slot, int64_t type) const {
        if (slot.layout == Layout::RESIDUAL) return slot.rows * residual_unit(slot.cols, parts());
        if (type != INT4 && type != INT3) return elements(slot) * type_bytes(type);
        return round_up(slot.rows, LANES) / LANES * low_bit_panel(slot.cols, type == INT4 ? 4 : 3);
    }

    int64_t elements(const Slot& slot) const {
        const int64_t rows = slot.rows, cols = slot.cols;
        switch (slot.layout) {
            case Layout::VECTOR:
                return round_up(cols, PAD);
            case Layout::PANELS:
                return round_up(rows, LANES) * round_up(cols, PAD);
            case Layout::TAPS:
                return round_up(rows, LANES) * round_up(cols / shape.kernel, 4) * shape.kernel;
            case Layout::BLOCKS:
                return rows / shape.block_size * padded_block() * padded_rank();
            default:
                return rows * round_up(cols, PAD);
        }
    }

    int64_t scales(const Slot& slot) const {
        if (slot.layout == Layout::PANELS) return round_up(slot.rows, LANES);
        if (slot.layout == Layout::BLOCKS) return slot.rows / shape.block_size * padded_block();
        return slot.rows;
    }
};

}  // namespace sparsecli
