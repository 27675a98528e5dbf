// One pass of some tokens through the blocks: what every thread does between the barriers.
//
// A row is one token of one sequence. With a single row the threads share each layer's outputs; with many they share
// rows where weights are small and outputs where weights are large. A row's result does not depend on either.
#pragma once
#include <chrono>
#include <cmath>
#include <utility>
#include <vector>

#include "model.h"
#include "pool.h"
#include "sequence.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sparsecli {

constexpr int64_t CHUNK = 512;              // rows of one pass
constexpr int64_t HEAD_LANES = 16;          // equal parts of the vocabulary, each with its own best candidates
constexpr int64_t CANDIDATES = 4;           // of each part, scored again with exact weights
constexpr int64_t FETCHED_POSITIONS = 128;  // of each head, before attention begins
constexpr int64_t MAX_HEAD_WIDTH = 1024;
constexpr int64_t MOST_AXES = 1 << 17;     // columns of an attention layer's, for all rounds
constexpr int64_t MOST_BUCKETS = 1 << 30;  // kept as 32-bit numbers
constexpr int64_t BLOCKS_AT_ONCE = 8;      // whose units many rows share while they are cached

constexpr double UNIT_EPSILON = 1e-6;  // added to the mean square of a shared query before it becomes a key

enum Part {
    OTHER,
    PROJECTION,
    MULTIPLY,
    CONVOLUTION,
    ATTENTION,
    CONTROLLER,
    UNIT_DOTS,
    UNIT_SUMS,
    DENSE_FF,
    RECURRENCE,
    HEAD,
    BARRIERS,
    PART_COUNT
};
constexpr const char* PART_NAMES[] = {"norms and residual", "projections", "multiplicative", "convolution",
                                      "attention",          "controller",  "unit rows in",   "unit rows out",
                                      "dense feed-forward", "recurrence",  "head",           "barriers"};

struct Range {
    int64_t begin, end;
};

// This worker's part of `total` things, in steps of `step`; parts differ by one step at most.
inline Range share(int64_t total, int64_t step, int64_t worker, int64_t workers) {
    const int64_t steps = (total + step - 1) / step;
    const int64_t end = steps * (worker + 1) / workers * step;
    return {steps * worker / workers * step, end < total ? end : total};
}

struct Row {
    Sequence* sequence;
    int64_t position, token;
    float* logits;                 // null: not wanted
    const float* vectors[2] = {};  // of a source, in place of a token: one for each stream
};

// How many of `rows` from `start` on go through the blocks together. Keys of a sequence that hash have one number of
// buckets in a pass.
inline int64_t pass_length(const std::vector<Row>& rows, int64_t start, const sparsecli_shape& shape) {
    const int64_t most = std::min(int64_t(rows.size()) - start, CHUNK);
    for (int64_t held = 1; held < most && shape.hash_rounds; ++held) {
        const Row &last = rows[size_t(start + held - 1)], &next = rows[size_t(start + held)];
        const bool hashed = next.sequence == last.sequence && next.position >= shape.most_keys;
        if (hashed && level_of(next.position) != level_of(last.position)) return held;
    }
    return most;
}

struct Worker {
    Buffer<float>*written, *read;  // the stream that layers add to, and the one that they read: the same, if it is one
    Buffer<float> normed, merged, aside, scores, line, recurrent, gates;
    Buffer<int16_t> integers;
    Buffer<int32_t> sums, chosen;
    Buffer<char> scratch;
    ReadAhead ahead;  // of a single token's next layers
    std::vector<const void*> taps;
    std::vector<int64_t> used;  // units of each layer that it computed in full
    float scale[1];
};

class Forward {
  public:
    Forward(const Model& model, const Ops& ops, Pool& pool)
        : model_(model), shape_(model.shape), k_(ops), pool_(pool), workers_(size_t(pool.threads())), sizes_(model) {
        const sparsecli_shape& s = shape_;
        const bool poison = s.poison;
        const int64_t wide = round_up(s.d_ff, PAD);
        d_stride_ = round_up(s.d_model, PAD);
        merged_stride_ = round_up(model.merged_width(), PAD);
        r_stride_ = round_up(s.recurrent_width, PAD);
        a_stride_ = round_up(model.attention_width(), PAD);
        z_stride_ = round_up(model.padded_rank(), PAD);
        h_stride_ = s.feed_forward == DENSE_UNITS || model.promotes() ? wide : 0;
        for (int64_t layer = 0; layer < s.layers; ++layer)
            h_stride_ = std::max(h_stride_, round_up(model.chosen_units(layer), PAD));
        pair_stride_ = model.padded_units() * model.inward();
        integer_stride_ = std::max({merged_stride_, a_stride_, z_stride_, h_stride_, r_stride_});
        for (Buffer<float>* buffer : {&x_, &normed_, &m_, &y_}) buffer->rows(CHUNK, s.d_model, d_stride_, poison);
        other_.rows(s.streams == 2 ? CHUNK : 0, s.d_model, d_stride_, poison);
        merged_.rows(CHUNK, model.merged_width(), merged_stride_, poison);
        recurrent_.rows(s.recurrent_layers ? CHUNK : 0, s.recurrent_width, r_stride_, poison);
        unit_.rows(1, s.head_width, s.head_width, false);
        std::fill_n(unit_.row(0), s.head_width, 1 / std::sqrt(float(s.head_width)));
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
        scales_.rows(1, CHUNK, CHUNK, false);
        angles_.rows(CHUNK, s.rotary_width, s.rotary_width, false);
        const int64_t scratch =
            std::max<int64_t>(1 << 19, CHUNK * z_stride_ * 2);  // products, or the controller's inputs
        for (Worker& worker : workers_) {
            worker.normed.rows(1, s.d_model, d_stride_, poison);
            worker.merged.rows(1, model.merged_width(), merged_stride_, poison);
            worker.recurrent.rows(1, s.recurrent_width, r_stride_, poison);
            worker.gates.rows(1, 3 * s.recurrent_width, 3 * s.recurrent_width, poison);
            worker.aside.rows(s.parallel ? 1 : 0, s.d_model, d_stride_, poison);
            worker.line.rows(1, z_stride_ + CHUNK + d_stride_, z_stride_ + CHUNK + d_stride_, false);
            worker.integers.rows(1, integer_stride_, integer_stride_, false);
            worker.sums.rows(1, integer_stride_ / LOW_BIT_GROUP, integer_stride_ / LOW_BIT_GROUP, false);
            worker.scratch.rows(1, scratch, scratch, false);
            worker.taps.resize(size_t(s.kernel));
            worker.used.resize(size_t(s.layers));
        }
    }

    // Room for attention scores over `positions`, and for a list of them; before the pass, by one thread.
    void reserve(int64_t positions) {
        if (positions <= score_stride_) return;
        const int64_t stride = round_up(2 * positions, PAD);
        score_stride_ = 0;  // until all of it is there: memory may not suffice
        for (Worker& worker : workers_) {
            worker.scores.rows(1, QUERIES * stride, QUERIES * stride, false);
            worker.chosen.rows(model_.hashes() ? 1 : 0, stride, stride, false);
        }
        score_stride_ = stride;
    }

    // Units that were computed in full since the last call, of every layer; returns the tokens, rows of a joined source
    // among them.
    int64_t take_counts(int64_t* units) {
        for (int64_t layer = 0; layer < shape_.layers; ++layer) {
            units[layer] = 0;
            for (Worker& worker : workers_) units[layer] += std::exchange(worker.used[size_t(layer)], 0);
        }
        return std::exchange(tokens_, 0);
    }

    // Keys and values of an encoder's output, whose rows have vectors.
    void remember_source(const std::vector<Row>& rows);

    // What another implementation remembers of the first `count` positions, see sparsecli_remember.
    void take_over(Sequence& sequence, int64_t place, const float* keys, const float* values, const float* inputs,
                   const float* output_inputs, const float* states, int64_t count);

    void run(const std::vector<Row>& rows, bool profile) {
        for (const Row& row : rows) row.sequence->newest = row.position;
        tokens_ += int64_t(rows.size());
        rows_ = &rows;
        wanted_.clear();
        for (size_t t = 0; t < rows.size(); ++t)
            if (rows[t].logits) wanted_.push_back(int64_t(t));
        profile_ = profile;
        pool_.run([this](int64_t worker) { pass(worker); }, rows.size() == 1);
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
    Range mine(int64_t total, int64_t step, int64_t worker) const { return share(total, step, worker, pool_.active()); }

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
    void swap_streams(int64_t worker) { std::swap(workers_[size_t(worker)].written, workers_[size_t(worker)].read); }
    float* residual(int64_t t, int64_t worker) const { return workers_[size_t(worker)].written->row(t); }
    void normalize(const Norm& norm, int64_t t, float* to, int64_t worker) const;
    Activations normalized(const Norm& norm, int64_t worker);
    void set_aside(const Block& block, int64_t worker);
    Activations readable(const Buffer<float>& source, int64_t stride, int64_t worker);
    Activations readable(const Buffer<float>& source, int64_t stride, int64_t worker, int64_t held);
    static Activations row_of(const Activations& x, int64_t t);
    Activations own_forms(const float* row, int64_t stride, int64_t worker);
    void dense(const Matrix& weight, const float* bias, Range rows, const Activations& x, int64_t tokens, float* out,
               int64_t out_stride) const;
    Range linear(const Map& map, const Activations& x, float* out, int64_t out_stride, int64_t worker) const;
    void multiply(const Map& map, const float* x, int64_t begin, int64_t end, float* out, int64_t worker);
    void add_to_residual(const Buffer<float>& y, Range columns, int64_t worker);
    const float* merged(int64_t t, float* line, int64_t worker) const;
    void logits(int64_t worker);
    void multiplicative_logits(const Activations& x, int64_t held, float* out, int64_t worker);
    void dense_logits(const Activations& x, int64_t held, float* out, int64_t worker);

    // -- attention (forward_attention.cpp) -------------------------------------------------------------------

    // What a sequence remembers for convolutions, from one row's position on.
    struct History {
        char* base;                     // the row of position 0, `kernel - 1` rows of zeros before it
        int64_t row, margin, position;  // bytes of a row, elements before module 0
    };

    // `place` counts attention layers, whose caches lie one after the other.
    void attention(const Block& block, int64_t index, int64_t layer, int64_t worker);
    void low_rank_projection(const AttentionLayer& layer, const Activations& x, int64_t worker);
    void share_projection(const AttentionLayer& layer, int64_t place, const Activations& x, int64_t worker);
    History history(int64_t place, int64_t t) const;
    History history_of(const Row& row, const Buffer<char>& buffer, int64_t place, int64_t elements,
                       int64_t margin) const;
    void remember(const History& to, const float* from, int64_t begin, int64_t end) const;
    void remember_joined(int64_t place, int64_t t, const float* x, int64_t begin, int64_t end) const;
    void convolve(const AttentionLayer& layer, int64_t place, int64_t t, int64_t begin, int64_t end, int64_t worker);
    void run_convolution(const Convolution& convolution, const History& from, int64_t stride, int64_t lead,
                         int64_t begin, int64_t end, float* out, int64_t worker);
    HeadCache head_cache(const KeyValues& held, int64_t place, int64_t head) const;
    void prepare_head(const Norm& norm, float* head, int64_t t) const;
    void prepare_key(const AttentionLayer& layer, int64_t t, int64_t head) const;
    void append(KeyValues Sequence::* to, int64_t place, int64_t t, int64_t head) const;
    void plan_ahead(const AttentionLayer& layer, const Block& block, int64_t index, int64_t worker);
    void fetch_cache(const KeyValues Sequence::* from, int64_t place, int64_t worker) const;
    int64_t seen(const Row& row, bool source) const;
    void attend(const AttentionLayer& layer, const KeyValues Sequence::* to, int64_t place, int64_t worker);
    void deliver(const float* y, int64_t t, int64_t head, bool added, int64_t worker);
    History output_history(int64_t place, int64_t t) const;
    void project_output(const Map& output, int64_t worker);
    void multiply_output(const AttentionLayer& layer, int64_t place, int64_t worker);

    // -- attention among keys that hash alike (forward_hashing.cpp) ---------------------------------------------

    void hash_key(int64_t place, int64_t t, int64_t head, int64_t worker);
    int64_t choose_keys(const Row& row, int64_t place, int64_t head, int32_t* chosen) const;
    void attend_alike(int64_t place, int64_t worker);

    // -- an encoder's output (forward_source.cpp) ------------------------------------------------------------

    void source_pass(int64_t worker);
    void cross_attention(const AttentionLayer& cross, int64_t layer, int64_t worker);
    void convolve_queries(const AttentionLayer& cross, int64_t layer, const Activations& x, int64_t worker);

    // -- recurrence (forward_recurrence.cpp) -----------------------------------------------------------------

    void enter_recurrence(const Recurrence& branch, int64_t worker);
    void leave_recurrence(const Recurrence& branch, int64_t layer, int64_t worker);
    void recur(const Recurrence& branch, int64_t layer, int64_t t, float* y, int64_t worker);

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
    const Ops& k_;
    Pool& pool_;
    std::vector<Worker> workers_;
    CacheSizes sizes_;
    const std::vector<Row>* rows_ = nullptr;
    std::vector<int64_t> wanted_;  // rows that want logits
    int64_t tokens_ = 0;           // and rows of joined sources, since they were last counted
    bool profile_ = false;
    Clock::time_point since_;
    int64_t d_stride_ = 0, merged_stride_ = 0, r_stride_ = 0, a_stride_ = 0, z_stride_ = 0, h_stride_ = 0,
            pair_stride_ = 0, integer_stride_ = 0, score_stride_ = 0;
    Buffer<float> x_, other_, merged_, recurrent_, unit_, normed_, aside_, q_, k_row_, v_, mixed_, query_first_,
        key_first_, m_, y_, z_, h_, gate_, pairs_, estimates_, probabilities_, scales_, angles_;
    Buffer<int32_t> chosen_, sums_;
    Buffer<int64_t> found_;  // units that each thread found, where their number is up to the token
    Buffer<int16_t> integers_;
};

}  // namespace sparsecli
