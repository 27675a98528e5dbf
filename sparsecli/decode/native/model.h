// The packed tensors of a model, by name: what `sparsecli_bind` fills in and the forward pass reads.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "ops/ops.h"

namespace sparsecli {

constexpr int64_t CHUNK = 512;  // tokens of one pass

enum FeedForwardKind {
    DENSE_UNITS = 0,
    SPARSE_UNITS = 1,
    MIXTURE_UNITS = 2,
    SELECTOR_UNITS = 3,
    PRECISION_UNITS = 4,
    SPARK_UNITS = 5
};
enum Projection { DENSE = 0, MULTIPLICATIVE = 1, DENSE_CONV = 2, MULTIPLICATIVE_CONV = 3 };
enum Output { NO_OUTPUT = 0, DENSE_OUTPUT = 1, MULTIPLICATIVE_OUTPUT = 2, MULTIPLICATIVE_CONV_OUTPUT = 3 };
enum Positions { LEARNED = 0, SINUSOIDAL = 1, ROTARY = 2 };
enum ValueConcat { NO_CONCAT = 0, CONCAT_MODULES = 1, CONCAT_WHOLE = 2 };
enum SharedQueryKey { OWN_KEYS = 0, ONE_PROJECTION = 1, MEAN_OF_TWO = 2 };
enum QueryKeyNorm { NO_NORM = 0, HEAD_NORM = 1, PROJECTION_NORM = 2 };
enum RotaryTable { NO_ROTARY = 0, FULL_ROTARY = 1, SLIDING_ROTARY = 2 };
enum ProbabilityGate { NO_GATE = 0, GATE_INPUT = 1, GATE_OUTPUT = 2 };
enum EncoderUse { NO_ENCODER = 0, CROSS_ATTENTION = 1, PREFIX = 2 };

// A linear map, dense or multiplicative (D and E), whichever is bound.
struct Linear {
    Matrix weight, D, E, bias;
};

struct Norm {
    Matrix weight, bias;
};

struct Convolution {
    Matrix kernel, bias;
};

struct AttentionLayer {
    Norm norm, post_norm;
    Linear query, key, value, shared, output;
    Linear query_first, key_first;  // low rank: the first of two maps; the second is `query` or `key`
    Norm query_norm, key_norm;      // over each head, or all together
    Convolution query_convolution, key_convolution, value_convolution, output_convolution;
};

// Simple recurrent units on a narrow branch beside the feed-forward layer.
struct Recurrence {
    Norm norm;
    Linear enter, leave;
    std::vector<Linear> cells;
};

struct Block {
    AttentionLayer attention[2];  // the second where a block has two
    AttentionLayer cross;         // to an encoder's output
    Recurrence recurrence;
    Norm feed_forward_norm, feed_forward_post_norm;
    Linear gate, up, down;  // dense feed-forward
    Matrix router, controller_first, controller_second, controller_bias, units, unit_bias, bias;
    Matrix sketch;  // quantized gate and up rows of all units: panels of either in turn
    Matrix importance, threshold, base_down, residual;
    Matrix predictor, unit_inputs;  // spark: all units' scores; the rows that meet the input, `units` has the others
    Linear bypass_first, bypass_second;
};

// The random rotations that an attention layer hashes keys with, in texts of some length.
struct LshRotations {
    std::vector<int64_t> factors;  // their product is the number of buckets
    int64_t buckets = 0, columns = 0;
    const float* data = nullptr;  // [head][width][columns]
};

// The number of buckets depends on the length of a text, rounded up to a power of two.
constexpr int64_t LEVELS = 32;
inline int64_t level_of(int64_t position) { return int64_t(std::bit_width(uint64_t(position))); }

inline const float* values(const Matrix& vector) { return (const float*)vector.data; }

struct Model {
    sparsecli_shape shape;
    Matrix embedding, positions, frequencies, long_frequencies, sliding_frequencies, exact_head;
    Norm norm;
    Linear head;
    std::vector<Block> blocks;
    std::vector<int64_t> chosen_in_blocks, windows, rotary_tables;  // by layer
    std::vector<LshRotations> rotations;                            // [cache][level], null where no sequence needs them
    bool quantized = false;   // some weights are multiplied with integer activations
    bool group_sums = false;  // some of them need sums of these, see Activations
    bool bytes = false;       // some weights are multiplied with activations in bytes

    int64_t attention_width() const { return shape.head_width * shape.heads; }
    int64_t key_width() const { return shape.head_width * shape.key_value_heads; }
    int64_t merged_width() const { return shape.concatenate ? 2 * shape.d_model : shape.d_model; }
    int64_t caches() const { return shape.layers * shape.attention_layers; }  // of keys and values, one after the other
    bool hashes() const { return shape.hash_rounds > 0; }
    // For a text whose last position is given.
    const LshRotations& rotations_of(int64_t cache_idx, int64_t last) const {
        return rotations[size_t(cache_idx * LEVELS + level_of(last))];
    }
    bool has_sliding_rotary() const {
        return std::find(rotary_tables.begin(), rotary_tables.end(), SLIDING_ROTARY) != rotary_tables.end();
    }
    // Whether what a layer computes is changed before it is added to the residual stream.
    bool changes_branches() const { return shape.post_norms || shape.residual_scale != 1; }
    bool crosses() const { return shape.encoder == CROSS_ATTENTION; }
    int64_t query_module_width() const { return shape.query_modules ? shape.d_model / shape.query_modules : 0; }
    // Rows of a unit in `units`.
    int64_t parts() const { return shape.feed_forward == SPARK_UNITS ? 1 : shape.gated ? 3 : 2; }
    int64_t module_width() const { return shape.d_model / shape.modules; }
    int64_t padded_block() const { return round_up(shape.block_size, LANES); }
    int64_t padded_rank() const { return round_up(shape.rank, 2); }
    bool low_rank() const { return shape.query_rank > 0; }
    bool convolves() const { return shape.projection == DENSE_CONV || shape.projection == MULTIPLICATIVE_CONV; }

    int64_t inward() const { return parts() - 1; }  // rows of a unit that meet its input
    int64_t padded_units() const { return round_up(shape.d_ff, LANES); }
    // The smallest number of units that is whole blocks and whole panels.
    int64_t whole_blocks() const {
        int64_t units = shape.block_size;
        while (units % LANES) units += shape.block_size;
        return units;
    }
    // Whether the number of units depends on the token.
    bool thresholds() const { return shape.feed_forward == SPARK_UNITS || shape.positive; }
    bool selects() const { return shape.feed_forward == SELECTOR_UNITS; }
    bool refines() const { return shape.feed_forward == PRECISION_UNITS; }

    // k of a layer: units of a block, or experts a token.
    int64_t chosen_in_block(int64_t layer) const { return chosen_in_blocks[size_t(layer)]; }

    // Whether a layer with blocks has to choose units; not where it uses all of them.
    bool chooses(int64_t layer) const {
        return shape.positive || shape.probability_gate || chosen_in_block(layer) < shape.block_size;
    }

    // Units of a layer that a token uses; at most, where their number depends on the token.
    int64_t chosen_units(int64_t layer) const {
        if (shape.feed_forward == DENSE_UNITS || thresholds()) return shape.d_ff;
        if (shape.feed_forward == MIXTURE_UNITS) return shape.block_size * chosen_in_block(layer);
        return shape.d_ff / shape.block_size * chosen_in_block(layer);
    }

    explicit Model(const sparsecli_shape& given)
        : shape(given),
          blocks(size_t(given.layers)),
          chosen_in_blocks(given.units_per_block, given.units_per_block + given.layers),
          windows(given.windows, given.windows + given.layers),
          rotary_tables(given.rotary_tables, given.rotary_tables + given.layers) {
        shape.units_per_block = chosen_in_blocks.data();
        shape.windows = windows.data();
        shape.rotary_tables = rotary_tables.data();
        rotations.resize(size_t(hashes() ? caches() * LEVELS : 0));
        for (Block& block : blocks) block.recurrence.cells.resize(size_t(shape.recurrent_layers));
    }

    // The matrix of a tensor that sparsecli_bind names; null: there is none of that name.
    Matrix* find(int64_t layer, const std::string& name) {
        std::unordered_map<std::string, Matrix*>& known = names_[layer];
        if (known.empty()) layer < 0 ? list(known) : list(known, blocks[size_t(layer)]);
        const auto found = known.find(name);
        return found == known.end() ? nullptr : found->second;
    }

  private:
    using Names = std::unordered_map<std::string, Matrix*>;

    void list(Names& to) {
        to = {{"embedding", &embedding}, {"positions", &positions}, {"frequencies", &frequencies}};
        to["long_frequencies"] = &long_frequencies;
        to["sliding_frequencies"] = &sliding_frequencies;
        to["head.exact"] = &exact_head;
        list(to, "norm", norm);
        list(to, "head", head);
    }

    static void list(Names& to, Block& block) {
        list(to, "", block.attention[0]);
        list(to, "second.", block.attention[1]);
        list(to, "cross.", block.cross);
        list(to, "feed_forward_norm", block.feed_forward_norm);
        list(to, "feed_forward_post_norm", block.feed_forward_post_norm);
        list(to, "gate", block.gate);
        list(to, "up", block.up);
        list(to, "down", block.down);
        list(to, "bypass.first", block.bypass_first);
        list(to, "bypass.second", block.bypass_second);
        to.insert({{"router", &block.router},
                   {"controller.first", &block.controller_first},
                   {"controller.second", &block.controller_second},
                   {"controller.bias", &block.controller_bias},
                   {"units", &block.units},
                   {"unit_bias", &block.unit_bias},
                   {"bias", &block.bias},
                   {"sketch", &block.sketch},
                   {"importance", &block.importance},
                   {"threshold", &block.threshold},
                   {"base.down", &block.base_down},
                   {"residual", &block.residual},
                   {"predictor", &block.predictor},
                   {"unit_inputs", &block.unit_inputs}});
        list(to, "sru.norm", block.recurrence.norm);
        list(to, "sru.enter", block.recurrence.enter);
        list(to, "sru.leave", block.recurrence.leave);
        for (size_t cell = 0; cell < block.recurrence.cells.size(); ++cell)
            list(to, "sru.cells." + std::to_string(cell), block.recurrence.cells[cell]);
    }

    // A projection is a linear map, two of them, or a convolution of the shared one.
    static void list(Names& to, const std::string& prefix, AttentionLayer& layer) {
        list(to, prefix + "attention_norm", layer.norm);
        list(to, prefix + "attention_post_norm", layer.post_norm);
        list(to, prefix + "shared", layer.shared);
        list(to, prefix + "query", layer.query);
        list(to, prefix + "key", layer.key);
        list(to, prefix + "value", layer.value);
        list(to, prefix + "query.first", layer.query_first);
        list(to, prefix + "query.second", layer.query);
        list(to, prefix + "key.first", layer.key_first);
        list(to, prefix + "key.second", layer.key);
        list(to, prefix + "query_norm", layer.query_norm);
        list(to, prefix + "key_norm", layer.key_norm);
        list(to, prefix + "output", layer.output);
        list(to, prefix + "query_convolution", layer.query_convolution);
        list(to, prefix + "key_convolution", layer.key_convolution);
        list(to, prefix + "value_convolution", layer.value_convolution);
        list(to, prefix + "output_convolution", layer.output_convolution);
    }

    static void list(Names& to, const std::string& name, Norm& norm) {
        to[name + ".weight"] = &norm.weight;
        to[name + ".bias"] = &norm.bias;
    }

    static void list(Names& to, const std::string& name, Linear& map) {
        to[name + ".weight"] = &map.weight;
        to[name + ".D"] = &map.D;
        to[name + ".E"] = &map.E;
        to[name + ".bias"] = &map.bias;
    }

    static void list(Names& to, const std::string& name, Convolution& convolution) {
        to[name + ".weight"] = &convolution.kernel;
        to[name + ".bias"] = &convolution.bias;
    }

    std::unordered_map<int64_t, Names> names_;  // by layer
};

}  // namespace sparsecli
