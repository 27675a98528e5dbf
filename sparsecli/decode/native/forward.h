// One pass of some tokens through the blocks: what every thread does between the barriers.
//
// A row is one token of one sequence. With a single row the threads share each layer's outputs; with many they share
// rows where weights are small and outputs where weights are large. A row's result does not depend on either.
#pragma once
#include <chrono>
#include <cmath>
#include <utility>
#include <vector>

#include "memory.h"
#include "model.h"
#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sparsecli {

constexpr int64_t CHUNK = 512;           // rows of one pass
constexpr int64_t HEAD_LANES = 16;      // equal parts of the vocabulary, each with its own best candidates
constexpr int64_t CANDIDATES = 4;       // of each part, scored again with exact weights
constexpr int64_t FETCHED_POSITIONS = 128;  // of each head, before attention begins
constexpr int64_t MAX_HEAD_WIDTH = 1024;
constexpr int64_t BLOCKS_AT_ONCE = 8;   // whose units many rows share while they are cached

enum Part { OTHER, PROJECTION, MULTIPLY, CONVOLUTION, ATTENTION, CONTROLLER, UNIT_DOTS, UNIT_SUMS, DENSE_FF, HEAD,
            BARRIERS, PART_COUNT };
constexpr const char* PART_NAMES[] = {"norms and residual", "projections", "multiplicative", "convolution",
                                      "attention", "controller", "unit rows in", "unit rows out", "dense feed-forward",
                                      "head", "barriers"};

struct Range {
    int64_t begin, end;
};

// This worker's part of `total` things, in steps of `step`; parts differ by one step at most.
inline Range share(int64_t total, int64_t step, int64_t worker, int64_t workers) {
    const int64_t steps = (total + step - 1) / step;
    const int64_t end = steps * (worker + 1) / workers * step;
    return {steps * worker / workers * step, end < total ? end : total};
}

// A sequence's keys, values and convolution inputs, all layers, `capacity` positions.
struct Sequence {
    int64_t capacity, length = 0;
    Buffer<char> keys, values, history, value_history, output_history;
    Buffer<float> key_scales, value_scales;
};

struct Row {
    Sequence* sequence;
    int64_t position, token;
    float* logits;  // null: not wanted
};

// Strides of a sequence's buffers, in elements.
struct CacheSizes {
    int64_t value_stride, history_margin, history_row, value_history_row;
};

// Bytes of a sequence's buffers; 0: the model does not have it.
struct CacheBytes {
    int64_t keys, values, scales, history, value_history, output_history;  // `scales` of keys, and as many of values
};

struct Worker {
    Buffer<float> normed, aside, scores, line;
    Buffer<int16_t> integers;
    Buffer<int32_t> sums;
    Buffer<uint16_t> halves;
    Buffer<char> scratch;
    std::vector<const void*> taps;
    std::vector<int64_t> used;  // units of each layer that it computed in full
    float scale[1];
};

class Forward {
  public:
    Forward(const Model& model, const Kernels& kernels, Pool& pool)
        : model_(model), shape_(model.shape), k_(kernels), pool_(pool), workers_(size_t(pool.threads())) {
        const sparsecli_shape& s = shape_;
        const bool poison = s.poison;
        const int64_t wide = round_up(s.d_ff, PAD);
        d_stride_ = round_up(s.d_model, PAD);
        a_stride_ = round_up(model.attention_width(), PAD);
        z_stride_ = round_up(model.padded_rank(), PAD);
        h_stride_ = s.feed_forward == DENSE_UNITS || model.promotes() ? wide : 0;
        for (int64_t layer = 0; layer < s.layers; ++layer)
            h_stride_ = std::max(h_stride_, round_up(model.chosen_units(layer), PAD));
        pair_stride_ = model.padded_units() * model.inward();
        integer_stride_ = std::max({d_stride_, a_stride_, z_stride_, h_stride_});
        for (Buffer<float>* buffer : {&x_, &normed_, &m_, &y_}) buffer->rows(CHUNK, s.d_model, d_stride_, poison);
        for (Buffer<float>* buffer : {&q_, &k_row_, &v_, &mixed_})
            buffer->rows(CHUNK, model.attention_width(), a_stride_, poison);
        const int64_t query_stride = round_up(s.query_rank, PAD), key_stride = round_up(s.key_rank, PAD);
        query_first_.rows(model.low_rank() ? CHUNK : 0, s.query_rank, query_stride, poison);
        key_first_.rows(model.low_rank() ? CHUNK : 0, s.key_rank, key_stride, poison);
        aside_.rows(s.parallel ? CHUNK : 0, s.d_model, d_stride_, poison);
        z_.rows(CHUNK, model.padded_rank(), z_stride_, false);
        h_.rows(CHUNK, h_stride_, h_stride_, false);
        gate_.rows(s.gated && s.feed_forward == DENSE_UNITS ? CHUNK : 0, h_stride_, h_stride_, false);
        const int64_t copied = model.promotes() || model.selects() ? CHUNK : 0;
        pairs_.rows(copied, pair_stride_, pair_stride_, poison);
        estimates_.rows(model.selects() ? CHUNK : 0, wide, wide, poison);
        found_.rows(CHUNK, pool.threads(), pool.threads(), false);
        probabilities_.rows(CHUNK, h_stride_, h_stride_, false);
        chosen_.rows(CHUNK, h_stride_, h_stride_, false);
        integers_.rows(CHUNK, integer_stride_, integer_stride_, false);
        sums_.rows(CHUNK, integer_stride_ / LOW_BIT_GROUP, integer_stride_ / LOW_BIT_GROUP, false);
        halves_.rows(CHUNK, 2 * integer_stride_, 2 * integer_stride_, false);
        scales_.rows(1, CHUNK, CHUNK, false);
        angles_.rows(CHUNK, s.rotary_width, s.rotary_width, false);
        const int64_t scratch = std::max<int64_t>(1 << 19, CHUNK * z_stride_ * 2);  // products, or the controller's inputs
        for (Worker& worker : workers_) {
            worker.normed.rows(1, s.d_model, d_stride_, poison);
            worker.aside.rows(s.parallel ? 1 : 0, s.d_model, d_stride_, poison);
            worker.line.rows(1, z_stride_ + CHUNK + d_stride_, z_stride_ + CHUNK + d_stride_, false);
            worker.integers.rows(1, integer_stride_, integer_stride_, false);
            worker.sums.rows(1, integer_stride_ / LOW_BIT_GROUP, integer_stride_ / LOW_BIT_GROUP, false);
            worker.halves.rows(1, 2 * integer_stride_, 2 * integer_stride_, false);
            worker.scratch.rows(1, scratch, scratch, false);
            worker.taps.resize(size_t(s.kernel));
            worker.used.resize(size_t(s.layers));
        }
        sizes_ = cache_sizes(model);
    }

    static CacheSizes cache_sizes(const Model& model) {
        CacheSizes sizes{};
        const int64_t width = model.shape.head_width, margin = model.convolves() ||
            model.shape.output == MULTIPLICATIVE_CONV_OUTPUT ? model.module_width() : 0;
        sizes.value_stride = round_up(width, LANES);
        sizes.history_margin = round_up(margin, LANES);
        sizes.history_row = round_up(sizes.history_margin + model.shape.d_model + margin + LANES, LANES);
        sizes.value_history_row = round_up(2 * model.shape.d_model + LANES, LANES);
        return sizes;
    }

    static CacheBytes cache_bytes(const Model& model, int64_t capacity) {
        const sparsecli_shape& s = model.shape;
        const CacheSizes sizes = cache_sizes(model);
        const int64_t positions = s.layers * s.key_value_heads * round_up(capacity, LANES);  // of all heads
        const int64_t rows = s.layers * (s.kernel - 1 + capacity) * type_bytes(s.history_type);
        const bool convolves = model.convolves();
        return {positions * s.head_width * type_bytes(s.cache_type),
                positions * sizes.value_stride * type_bytes(s.cache_type),
                s.cache_type == INT8 ? positions * int64_t(sizeof(float)) : 0,
                convolves ? rows * sizes.history_row : 0,
                convolves && s.value_concat ? rows * sizes.value_history_row : 0,
                s.output == MULTIPLICATIVE_CONV_OUTPUT ? rows * sizes.history_row : 0};
    }

    static int64_t sequence_bytes(const Model& model, int64_t capacity) {
        const CacheBytes b = cache_bytes(model, capacity);
        return b.keys + b.values + 2 * b.scales + b.history + b.value_history + b.output_history;
    }

    // Memory for one sequence; throws std::bad_alloc.
    void allocate(Sequence& sequence) const {
        const CacheBytes b = cache_bytes(model_, sequence.capacity);
        const bool poison = shape_.poison;
        sequence.keys.bytes(b.keys, poison);
        sequence.values.bytes(b.values, poison);
        sequence.key_scales.bytes(b.scales, poison);
        sequence.value_scales.bytes(b.scales, poison);
        sequence.history.bytes(b.history, false);  // margins and what precedes the first position are zero
        sequence.value_history.bytes(b.value_history, false);
        sequence.output_history.bytes(b.output_history, false);
    }

    // Room for attention scores over `positions`; before the pass, by one thread.
    void reserve(int64_t positions) {
        if (positions <= score_stride_) return;
        const int64_t stride = round_up(2 * positions, PAD);
        score_stride_ = 0;  // until all of it is there: memory may not suffice
        for (Worker& worker : workers_) worker.scores.rows(1, QUERIES * stride, QUERIES * stride, false);
        score_stride_ = stride;
    }

    // Units that were computed in full since the last call, of every layer; returns the tokens.
    int64_t take_counts(int64_t* units) {
        for (int64_t layer = 0; layer < shape_.layers; ++layer) {
            units[layer] = 0;
            for (Worker& worker : workers_) units[layer] += std::exchange(worker.used[size_t(layer)], 0);
        }
        return std::exchange(tokens_, 0);
    }

    void run(const std::vector<Row>& rows, bool profile) {
        tokens_ += int64_t(rows.size());
        rows_ = &rows;
        wanted_.clear();
        for (size_t t = 0; t < rows.size(); ++t)
            if (rows[t].logits) wanted_.push_back(int64_t(t));
        profile_ = profile;
        pool_.run([this](int64_t worker) { pass(worker); });
    }

    int64_t block_stack_ns = 0;
    double seconds[PART_COUNT] = {};

  private:
    using Clock = std::chrono::steady_clock;

    // -- time and threads ------------------------------------------------------------------------------------

    void mark(int64_t worker, Part part) {
        if (!profile_ || worker) return;
        const Clock::time_point now = Clock::now();
        seconds[part] += std::chrono::duration<double>(now - since_).count();
        since_ = now;
    }

    void barrier(int64_t worker, Part part) {
        mark(worker, part);
        pool_.barrier();
        mark(worker, BARRIERS);
    }

    int64_t count() const { return int64_t(rows_->size()); }
    Range mine(int64_t total, int64_t step, int64_t worker) const {
        return share(total, step, worker, pool_.active());
    }

    // Calls body(row, begin, end) for this worker's part of `width` things of every row.
    template <class F>
    void each(int64_t width, int64_t worker, const F& body) const {
        const Range range = mine(count() * width, 1, worker);
        for (int64_t at = range.begin; at < range.end;) {
            const int64_t row = at / width, end = std::min(range.end, (row + 1) * width);
            body(row, at - row * width, end - row * width);
            at = end;
        }
    }

    // -- the pass (forward.cpp) ------------------------------------------------------------------------------

    void pass(int64_t worker);
    void embed(int64_t t);
    void widen_row(const Matrix& table, int64_t row, float* out) const;
    void normalize(const Norm& norm, int64_t t, float* to) const;
    Activations normalized(const Norm& norm, int64_t worker);
    void set_aside(const Norm& norm, int64_t worker);
    Activations readable(const Buffer<float>& source, int64_t stride, int64_t worker);
    Activations readable(const Buffer<float>& source, int64_t stride, int64_t worker, int64_t held);
    static Activations row_of(const Activations& x, int64_t t);
    Activations own_forms(const float* row, int64_t stride, int64_t worker);
    void dense(const Matrix& weight, const float* bias, Range rows, const Activations& x, int64_t tokens, float* out,
               int64_t out_stride) const;
    Range linear(const Map& map, const Activations& x, float* out, int64_t out_stride, int64_t worker) const;
    void multiply(const Map& map, const float* x, int64_t begin, int64_t end, float* out, int64_t worker);
    void add_to_residual(const Buffer<float>& y, Range columns);
    void logits(int64_t worker);
    void multiplicative_logits(const Activations& x, int64_t held, float* out, int64_t worker);
    void dense_logits(const Activations& x, int64_t held, float* out, int64_t worker);

    // -- attention (forward_attention.cpp) -------------------------------------------------------------------

    // What a sequence remembers for convolutions, from one row's position on.
    struct History {
        char* base;                     // the row of position 0, `kernel - 1` rows of zeros before it
        int64_t row, margin, position;  // bytes of a row, elements before module 0
    };

    void attention(const Block& block, int64_t layer, int64_t worker);
    void low_rank_projection(const Block& block, const Activations& x, int64_t worker);
    void share_projection(const Block& block, int64_t layer, const Activations& x, int64_t worker);
    History history(int64_t layer, int64_t t) const;
    History history_of(const Row& row, const Buffer<char>& buffer, int64_t layer, int64_t elements,
                       int64_t margin) const;
    void remember(const History& to, const float* from, int64_t begin, int64_t end) const;
    void remember_joined(int64_t layer, int64_t t, const float* x, int64_t begin, int64_t end) const;
    void convolve(const Block& block, int64_t layer, int64_t t, int64_t begin, int64_t end, int64_t worker);
    void run_convolution(const Convolution& convolution, const History& from, int64_t stride, int64_t lead,
                         int64_t begin, int64_t end, float* out, int64_t worker);
        HeadCache head_cache(const Sequence& sequence, int64_t layer, int64_t head) const;
    void prepare_head(const Norm& norm, float* head, int64_t t) const;
    void append(const Block& block, int64_t layer, int64_t t, int64_t head);
    void fetch_cache(int64_t layer, int64_t worker) const;
    void attend(const Block& block, int64_t layer, int64_t worker);
    void project_output(const Block& block, int64_t layer, int64_t worker);

    // -- feed-forward (forward_feed_forward.cpp) -------------------------------------------------------------

    void feed_forward(const Block& block, int64_t layer, int64_t worker);
    void dense_feed_forward(const Block& block, int64_t layer, const Activations& x, int64_t worker);
    void controlled_units(const Block& block, int64_t layer, const Activations& x, int64_t worker);
    void choose_units(const Block& block, Range blocks, int64_t each_block, const Activations& x, int64_t worker);
    void use_units(const Block& block, int64_t begin, int64_t end, const Activations& x, int64_t t);
    void read_ahead(const Block& block, int64_t t, int64_t begin, int64_t end) const;
    void route(const Block& block, int64_t layer, const Activations& x, int64_t worker);
    void expert_dots(const Block& block, const Activations& x, float weight, int64_t t, int64_t begin, int64_t end,
                     int64_t worker);
    void sum_units(const Block& block, int64_t layer, int64_t worker);

    // -- units in few bits (forward_low_bit.cpp) -------------------------------------------------------------

    Range copied_units(int64_t worker) const;
    template <class F>
    void each_piece(Range units, const F& body) const;
    void read_copy(const Block& block, int64_t first, int64_t last, const Activations& x, Buffer<float>& h);
    void choose_best(const Block& block, int64_t layer, int64_t first, int64_t last, const float* h,
                     int32_t* chosen) const;
    void selected_units(const Block& block, int64_t layer, const Activations& x, int64_t worker);
    void positive_units(const Block& block, int64_t layer, const Activations& x, Range units, int64_t worker);
    void fetch_units(const Block& block, int64_t t, int64_t begin, int64_t end) const;
    void add_bypass(const Block& block, int64_t worker);
    void precise_feed_forward(const Block& block, int64_t layer, const Activations& x, int64_t worker);
    void promote(const Block& block, int64_t begin, int64_t end, const Activations& x, int64_t t);

    const Model& model_;
    const sparsecli_shape& shape_;
    const Kernels& k_;
    Pool& pool_;
    std::vector<Worker> workers_;
    CacheSizes sizes_{};
    const std::vector<Row>* rows_ = nullptr;
    std::vector<int64_t> wanted_;  // rows that want logits
    int64_t tokens_ = 0;  // since they were last counted
    bool profile_ = false;
    Clock::time_point since_;
    int64_t d_stride_ = 0, a_stride_ = 0, z_stride_ = 0, h_stride_ = 0, pair_stride_ = 0, integer_stride_ = 0, score_stride_ = 0;
    Buffer<float> x_, normed_, aside_, q_, k_row_, v_, mixed_, query_first_, key_first_, m_, y_, z_, h_, gate_, pairs_, estimates_, probabilities_, scales_, angles_;
    Buffer<int32_t> chosen_, sums_;
    Buffer<int64_t> found_;  // units that each thread found, where their number is up to the token
    Buffer<int16_t> integers_;
    Buffer<uint16_t> halves_;
};

}  // namespace sparsecli
