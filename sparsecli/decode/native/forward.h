// One pass of some tokens through the blocks: what every thread does between the barriers.
//
// A row is one token of one sequence. With a single row the threads share each layer's outputs; with many they share
// rows where weights are small and outputs where weights are large. A row's result does not depend on either.
#pragma once
#include <chrono>
#include <cmath>
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

// Sizes of a sequence's buffers, in bytes of one layer.
struct CacheSizes {
    int64_t value_stride, key_head, value_head, scale_head;  // elements of one head
    int64_t history_margin, history_row, value_history_row;  // elements
};

struct Worker {
    Buffer<float> normed, scores, line;
    Buffer<int16_t> integers;
    Buffer<uint16_t> halves;
    Buffer<char> scratch;
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
        z_stride_ = round_up(model.padded_rank(), PAD);
        h_stride_ = s.feed_forward == DENSE_UNITS ? wide : round_up(model.chosen_units(), PAD);
        integer_stride_ = std::max({d_stride_, z_stride_, h_stride_});
        for (Buffer<float>* buffer : {&x_, &normed_, &q_, &k_row_, &v_, &m_, &y_})
            buffer->rows(CHUNK, s.d_model, d_stride_, poison);
        z_.rows(CHUNK, model.padded_rank(), z_stride_, false);
        h_.rows(CHUNK, h_stride_, h_stride_, false);
        gate_.rows(s.gated && s.feed_forward == DENSE_UNITS ? CHUNK : 0, h_stride_, h_stride_, false);
        probabilities_.rows(CHUNK, h_stride_, h_stride_, false);
        chosen_.rows(CHUNK, h_stride_, h_stride_, false);
        integers_.rows(CHUNK, integer_stride_, integer_stride_, false);
        halves_.rows(CHUNK, 2 * integer_stride_, 2 * integer_stride_, false);
        scales_.rows(1, CHUNK, CHUNK, false);
        angles_.rows(CHUNK, model.head_width(), model.head_width(), false);
        const int64_t scratch = std::max<int64_t>(1 << 19, CHUNK * z_stride_ * 2);  // products, or the controller's inputs
        for (Worker& worker : workers_) {
            worker.normed.rows(1, s.d_model, d_stride_, poison);
            worker.line.rows(1, z_stride_ + CHUNK + d_stride_, z_stride_ + CHUNK + d_stride_, false);
            worker.integers.rows(1, integer_stride_, integer_stride_, false);
            worker.halves.rows(1, 2 * integer_stride_, 2 * integer_stride_, false);
            worker.scratch.rows(1, scratch, scratch, false);
        }
        sizes_ = cache_sizes(model);
    }

    static CacheSizes cache_sizes(const Model& model) {
        CacheSizes sizes{};
        const int64_t width = model.head_width(), margin = model.convolves() ||
            model.shape.output == MULTIPLICATIVE_CONV_OUTPUT ? model.module_width() : 0;
        sizes.value_stride = round_up(width, LANES);
        sizes.history_margin = round_up(margin, LANES);
        sizes.history_row = round_up(sizes.history_margin + model.shape.d_model + margin + LANES, LANES);
        sizes.value_history_row = round_up(2 * model.shape.d_model + LANES, LANES);
        return sizes;
    }

    // Memory for one sequence; throws std::bad_alloc.
    void allocate(Sequence& sequence) const {
        const sparsecli_shape& s = shape_;
        const int64_t positions = round_up(sequence.capacity, LANES);
        const int64_t bytes = type_bytes(s.cache_type), remembered = type_bytes(s.history_type);
        const int64_t all_heads = s.layers * s.key_value_heads, rows = s.kernel - 1 + sequence.capacity;
        sequence.keys.bytes(all_heads * positions * model_.head_width() * bytes, s.poison);
        sequence.values.bytes(all_heads * positions * sizes_.value_stride * bytes, s.poison);
        if (s.cache_type == INT8) {
            sequence.key_scales.bytes(all_heads * positions * 4, s.poison);
            sequence.value_scales.bytes(all_heads * positions * 4, s.poison);
        }
        if (model_.convolves()) sequence.history.bytes(s.layers * rows * sizes_.history_row * remembered, false);
        if (model_.convolves() && s.value_concat)
            sequence.value_history.bytes(s.layers * rows * sizes_.value_history_row * remembered, false);
        if (s.output == MULTIPLICATIVE_CONV_OUTPUT)
            sequence.output_history.bytes(s.layers * rows * sizes_.history_row * remembered, false);
    }

    static int64_t sequence_bytes(const Model& model, int64_t capacity) {
        const sparsecli_shape& s = model.shape;
        const CacheSizes sizes = cache_sizes(model);
        const int64_t positions = round_up(capacity, LANES), all_heads = s.layers * s.key_value_heads;
        int64_t total = all_heads * positions * (model.head_width() + sizes.value_stride) * type_bytes(s.cache_type);
        if (s.cache_type == INT8) total += all_heads * positions * 8;
        const int64_t rows = s.layers * (s.kernel - 1 + capacity) * type_bytes(s.history_type);
        if (model.convolves()) total += rows * (sizes.history_row + (s.value_concat ? sizes.value_history_row : 0));
        if (s.output == MULTIPLICATIVE_CONV_OUTPUT) total += rows * sizes.history_row;
        return total;
    }

    // Room for attention scores over `positions`; before the pass, by one thread.
    void reserve(int64_t positions) {
        if (positions <= score_stride_) return;
        score_stride_ = round_up(2 * positions, PAD);
        for (Worker& worker : workers_) worker.scores.rows(1, QUERIES * score_stride_, QUERIES * score_stride_, false);
    }

    void run(const std::vector<Row>& rows, bool profile) {
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
        return share(total, step, worker, pool_.threads());
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

    // -- the pass --------------------------------------------------------------------------------------------

    void pass(int64_t worker) {
        if (!worker) since_ = Clock::now();
        const Range rows = mine(count(), 1, worker);
        for (int64_t t = rows.begin; t < rows.end; ++t) embed(t);
        barrier(worker, OTHER);
        const Clock::time_point start = Clock::now();
        for (int64_t layer = 0; layer < shape_.layers; ++layer) {
            const Block& block = model_.blocks[size_t(layer)];
            attention(block, layer, worker);
            feed_forward(block, worker);
        }
        if (!worker)
            block_stack_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
        logits(worker);
        mark(worker, HEAD);
    }

    void embed(int64_t t) {
        const Row& row = (*rows_)[size_t(t)];
        float* x = x_.row(t);
        const int64_t d = shape_.d_model;
        widen_row(model_.embedding, row.token, x);
        if (shape_.positions == LEARNED) {
            float* line = y_.row(t);
            widen_row(model_.positions, row.position, line);
            for (int64_t i = 0; i < d; ++i) x[i] += line[i];
        } else {
            const float* frequency = values(model_.frequencies);
            const int64_t half = model_.frequencies.cols;
            float* angles = angles_.row(t);
            for (int64_t i = 0; i < half; ++i) {
                const float angle = float(row.position) * frequency[i];
                if (shape_.positions == ROTARY) {
                    angles[i] = std::cos(angle);
                    angles[half + i] = std::sin(angle);
                } else {  // all sines, then all cosines
                    x[i] += std::sin(angle);
                    x[half + i] += std::cos(angle);
                }
            }
        }
    }

    void widen_row(const Matrix& table, int64_t row, float* out) const {
        const int64_t stride = round_up(table.cols, PAD) * type_bytes(table.type);
        k_.widen((const char*)table.data + row * stride, table.scale ? table.scale + row : nullptr, table.type,
                 table.cols, out);
    }

    // Normalised residual rows for layers to read. A single row is computed by every thread for itself, which is
    // cheaper than waiting for one another.
    Activations normalized(const Norm& norm, int64_t worker) {
        Worker& own = workers_[size_t(worker)];
        const auto apply = [&](int64_t t, float* to) {
            k_.normalize(x_.row(t), values(norm.weight), shape_.rms ? nullptr : values(norm.bias), shape_.d_model,
                         shape_.rms, shape_.epsilon, to);
        };
        if (count() == 1) {
            apply(0, own.normed.row(0));
            return readable(own.normed, d_stride_, worker);
        }
        const Range rows = mine(count(), 1, worker);
        for (int64_t t = rows.begin; t < rows.end; ++t) apply(t, normed_.row(t));
        return readable(normed_, d_stride_, worker);
    }

    // Rows as layers read them, in every form that the model's weights need. With many rows a barrier follows.
    Activations readable(const Buffer<float>& source, int64_t stride, int64_t worker) {
        return readable(source, stride, worker, count());
    }

    Activations readable(const Buffer<float>& source, int64_t stride, int64_t worker, int64_t held) {
        if (held == 1) return own_forms(source.row(0), stride, worker);
        const Range rows = mine(held, 1, worker);
        for (int64_t t = rows.begin; t < rows.end; ++t) {
            if (model_.quantised) scales_.row(0)[t] = k_.quantise(source.row(t), stride, integers_.data + t * stride);
            if (model_.rounded && k_.splits) k_.split(source.row(t), stride, halves_.data + 2 * t * stride);
        }
        barrier(worker, OTHER);
        return {source.row(0), integers_.data, scales_.row(0), halves_.data, stride};
    }

    // One row, in this worker's own memory.
    Activations own_forms(const float* row, int64_t stride, int64_t worker) {
        Worker& own = workers_[size_t(worker)];
        if (model_.quantised) own.scale[0] = k_.quantise(row, stride, own.integers.row(0));
        if (model_.rounded && k_.splits) k_.split(row, stride, own.halves.row(0));
        return {row, own.integers.row(0), own.scale, own.halves.row(0), stride};
    }

    // -- maps ------------------------------------------------------------------------------------------------

    // out = w x (+ bias) for this worker's outputs; returns them.
    Range linear(const Map& map, const Activations& x, float* out, int64_t out_stride, int64_t worker) const {
        const Range rows = mine(map.weight.rows, LANES, worker);
        k_.dots(map.weight, rows.begin, rows.end, x, count(), out, out_stride);
        if (const float* bias = values(map.bias))
            for (int64_t t = 0; t < count(); ++t)
                for (int64_t r = rows.begin; r < rows.end; ++r) out[t * out_stride + r] += bias[r];
        return rows;
    }

    void multiply(const Map& map, const float* x, int64_t begin, int64_t end, float* out, int64_t worker) {
        const int64_t panels = (map.E.rows + PANEL - 1) / PANEL;
        k_.multiplicative(map.D, map.E, values(map.bias), x, begin, end, 0, panels, out,
                          workers_[size_t(worker)].scratch.row(0));
    }

    void add_to_residual(const Buffer<float>& y, Range columns) {
        for (int64_t t = 0; t < count(); ++t)
            for (int64_t c = columns.begin; c < columns.end; ++c) x_.row(t)[c] += y.row(t)[c];
    }

    // -- attention -------------------------------------------------------------------------------------------

    void attention(const Block& block, int64_t layer, int64_t worker) {
        const Activations x = normalized(block.attention_norm, worker);
        mark(worker, OTHER);
        const sparsecli_shape& s = shape_;
        // A head's projections, cache and attention fall to one thread where the parts coincide: no waiting then.
        const bool aligned = count() == 1 && s.key_value_heads % pool_.threads() == 0;
        bool ready = false;
        if (model_.convolves()) {
            share_projection(block, layer, x, worker);
            barrier(worker, s.projection == DENSE_CONV ? PROJECTION : MULTIPLY);
            each(s.modules, worker, [&](int64_t t, int64_t begin, int64_t end) { convolve(block, layer, t, begin, end); });
            mark(worker, CONVOLUTION);
            ready = aligned && s.modules == s.key_value_heads;
        } else if (s.projection == DENSE) {
            linear(block.query, x, q_.row(0), d_stride_, worker);
            linear(block.key, x, k_row_.row(0), d_stride_, worker);
            linear(block.value, x, v_.row(0), d_stride_, worker);
            mark(worker, PROJECTION);
        } else {
            each(s.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
                const float* row = x.values + t * x.stride;
                multiply(block.query, row, begin, end, q_.row(t), worker);
                multiply(block.key, row, begin, end, k_row_.row(t), worker);
                multiply(block.value, row, begin, end, v_.row(t), worker);
            });
            mark(worker, MULTIPLY);
        }
        if (count() == 1) fetch_cache(layer, worker);
        if (!ready) barrier(worker, OTHER);
        each(s.key_value_heads, worker, [&](int64_t t, int64_t begin, int64_t end) {
            for (int64_t head = begin; head < end; ++head) append(layer, t, head);
        });
        if (!aligned) barrier(worker, ATTENTION);
        attend(layer, worker);
        barrier(worker, ATTENTION);
        if (s.output != NO_OUTPUT) project_output(block, layer, worker);
    }

    // The projection that convolutions share, kept for the positions to come.
    void share_projection(const Block& block, int64_t layer, const Activations& x, int64_t worker) {
        const auto keep = [&](int64_t t, int64_t begin, int64_t end) {
            remember(history(layer, t), m_.row(t), begin, end);
            if (shape_.value_concat) remember_joined(layer, t, x.values + t * x.stride, begin, end);
        };
        if (shape_.projection == DENSE_CONV) {
            const Range columns = linear(block.shared, x, m_.row(0), d_stride_, worker);
            for (int64_t t = 0; t < count(); ++t) keep(t, columns.begin, columns.end);
            return;
        }
        each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
            multiply(block.shared, x.values + t * x.stride, begin, end, m_.row(t), worker);
            keep(t, begin * model_.module_width(), end * model_.module_width());
        });
    }

    struct History {
        char* base;        // the row of position 0, `kernel - 1` rows of zeros before it
        int64_t row, margin, position;
    };

    History history(int64_t layer, int64_t t) const {
        return history_of((*rows_)[size_t(t)], (*rows_)[size_t(t)].sequence->history, layer, sizes_.history_row,
                          sizes_.history_margin);
    }

    History history_of(const Row& row, const Buffer<char>& buffer, int64_t layer, int64_t elements,
                       int64_t margin) const {
        const int64_t bytes = elements * type_bytes(shape_.history_type);
        const int64_t rows = shape_.kernel - 1 + row.sequence->capacity;
        return {buffer.data + (layer * rows + shape_.kernel - 1) * bytes, bytes, margin, row.position};
    }

    void remember(const History& to, const float* from, int64_t begin, int64_t end) const {
        const int64_t type = shape_.history_type;
        char* row = to.base + to.position * to.row + (to.margin + begin) * type_bytes(type);
        k_.convert(from + begin, type, end - begin, row);
    }

    // Where values read x beside m: module by module, or one vector after the other.
    void remember_joined(int64_t layer, int64_t t, const float* x, int64_t begin, int64_t end) const {
        const Row& row = (*rows_)[size_t(t)];
        const History to = history_of(row, row.sequence->value_history, layer, sizes_.value_history_row, 0);
        const int64_t width = model_.module_width(), type = shape_.history_type, bytes = type_bytes(type);
        char* at = to.base + to.position * to.row;
        for (int64_t i = begin; i < end; ++i) {
            const bool whole = shape_.value_concat == CONCAT_WHOLE;
            const int64_t first = whole ? i : i / width * 2 * width + i % width;
            const int64_t second = first + (whole ? shape_.d_model : width);
            k_.convert(m_.row(t) + i, type, 1, at + first * bytes);
            k_.convert(x + i, type, 1, at + second * bytes);
        }
    }

    void convolve(const Block& block, int64_t layer, int64_t t, int64_t begin, int64_t end) const {
        const int64_t width = model_.module_width();
        const History m = history(layer, t);
        run_convolution(block.query_convolution, m, width, width, begin, end, q_.row(t));
        run_convolution(block.key_convolution, m, width, width, begin, end, k_row_.row(t));
        if (!shape_.value_concat) return run_convolution(block.value_convolution, m, width, 0, begin, end, v_.row(t));
        const Row& row = (*rows_)[size_t(t)];
        const History joined = history_of(row, row.sequence->value_history, layer, sizes_.value_history_row, 0);
        run_convolution(block.value_convolution, joined, 2 * width, 0, begin, end, v_.row(t));
    }

    void run_convolution(const Convolution& convolution, const History& from, int64_t stride, int64_t lead,
                         int64_t begin, int64_t end, float* out) const {
        std::vector<const void*>& taps = taps_();
        taps.resize(size_t(shape_.kernel));
        for (int64_t tap = 0; tap < shape_.kernel; ++tap)
            taps[size_t(tap)] = from.base + (from.position - shape_.kernel + 1 + tap) * from.row +
                                from.margin * type_bytes(shape_.history_type);
        k_.convolve(convolution.kernel, values(convolution.bias), shape_.kernel, taps.data(), stride, lead, begin, end,
                    out);
    }

    static std::vector<const void*>& taps_() {
        static thread_local std::vector<const void*> taps;
        return taps;
    }

    HeadCache head_cache(const Sequence& sequence, int64_t layer, int64_t head) const {
        const int64_t positions = round_up(sequence.capacity, LANES), bytes = type_bytes(shape_.cache_type);
        const int64_t at = layer * shape_.key_value_heads + head;
        return {sequence.keys.data + at * positions * model_.head_width() * bytes,
                sequence.values.data + at * positions * sizes_.value_stride * bytes,
                sequence.key_scales.data ? sequence.key_scales.data + at * positions : nullptr,
                sequence.value_scales.data ? sequence.value_scales.data + at * positions : nullptr};
    }

    // Turns pairs (i, i + width / 2) by the row's angles.
    void rotate(float* head, int64_t t) const {
        if (shape_.positions != ROTARY) return;
        const int64_t half = model_.head_width() / 2;
        const float *cosine = angles_.row(t), *sine = cosine + half;
        for (int64_t i = 0; i < half; ++i) {
            const float first = head[i], second = head[half + i];
            head[i] = first * cosine[i] - second * sine[i];
            head[half + i] = second * cosine[i] + first * sine[i];
        }
    }

    void append(int64_t layer, int64_t t, int64_t head) {
        const Row& row = (*rows_)[size_t(t)];
        float* key = k_row_.row(t) + head * model_.head_width();
        rotate(key, t);
        k_.append(key, v_.row(t) + head * model_.head_width(), shape_.cache_type, model_.head_width(), row.position,
                  head_cache(*row.sequence, layer, head), sizes_.value_stride);
    }

    // Asks for the beginning of this worker's keys and values, all heads at once; the rest follows in streams.
    void fetch_cache(int64_t layer, int64_t worker) const {
        const Row& row = (*rows_)[0];
        const Range heads = mine(shape_.key_value_heads, 1, worker);
        const int64_t bytes = type_bytes(shape_.cache_type);
        for (int64_t head = heads.begin; head < heads.end; ++head) {
            const HeadCache cache = head_cache(*row.sequence, layer, head);
            const int64_t held = std::min(row.position, FETCHED_POSITIONS);
            k_.fetch(cache.keys, held * model_.head_width() * bytes);
            k_.fetch(cache.values, held * sizes_.value_stride * bytes);
        }
    }

    // Queries that read the same keys go together: neighbouring rows of a sequence, heads of a group.
    void attend(int64_t layer, int64_t worker) {
        const int64_t width = model_.head_width(), group = shape_.heads / shape_.key_value_heads, rows = count();
        float* scores = workers_[size_t(worker)].scores.row(0);
        const float rate = 1 / std::sqrt(float(width));
        // Ordered by key head, then row, then head of the group. A single row is shared out by key heads where they
        // are as many as the projections' parts.
        const bool aligned = rows == 1 && shape_.key_value_heads % pool_.threads() == 0;
        const Range items = mine(shape_.heads * rows, aligned ? group : 1, worker);
        const float* queries[QUERIES];
        float* out[QUERIES];
        float mixed[QUERIES][MAX_HEAD_WIDTH];
        int64_t lengths[QUERIES], owner[QUERIES], head_of[QUERIES];
        for (int64_t item = items.begin; item < items.end;) {
            const int64_t key_head = item / (group * rows);
            const Sequence* sequence = (*rows_)[size_t(item / group % rows)].sequence;
            int64_t held = 0;
            for (; held < QUERIES && item < items.end && item / (group * rows) == key_head; ++item, ++held) {
                const int64_t t = item / group % rows;
                if ((*rows_)[size_t(t)].sequence != sequence) break;
                head_of[held] = key_head * group + item % group;
                owner[held] = t;
                float* query = q_.row(t) + head_of[held] * width;
                rotate(query, t);
                queries[held] = query;
                lengths[held] = (*rows_)[size_t(t)].position + 1;
                out[held] = mixed[held];
            }
            k_.attend(queries, lengths, held, shape_.cache_type, width, head_cache(*sequence, layer, key_head),
                      sizes_.value_stride, rate, scores, score_stride_, out);
            for (int64_t i = 0; i < held; ++i) {
                const int64_t at = head_of[i] * width;
                float* to = (shape_.output == NO_OUTPUT ? x_ : y_).row(owner[i]) + at;
                for (int64_t c = 0; c < width; ++c)
                    to[c] = shape_.output == NO_OUTPUT ? to[c] + mixed[i][c] : mixed[i][c];
            }
        }
    }

    void project_output(const Block& block, int64_t layer, int64_t worker) {
        if (shape_.output == DENSE_OUTPUT) {
            const Activations y = readable(y_, d_stride_, worker);
            add_to_residual(m_, linear(block.output, y, m_.row(0), d_stride_, worker));
            return barrier(worker, PROJECTION);
        }
        const int64_t width = model_.module_width();
        const bool convolved = shape_.output == MULTIPLICATIVE_CONV_OUTPUT;
        const auto past = [&](int64_t t) {
            const Row& row = (*rows_)[size_t(t)];
            return history_of(row, row.sequence->output_history, layer, sizes_.history_row, sizes_.history_margin);
        };
        each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
            multiply(block.output, y_.row(t), begin, end, m_.row(t), worker);
            if (convolved) return remember(past(t), m_.row(t), begin * width, end * width);
            for (int64_t i = begin * width; i < end * width; ++i) x_.row(t)[i] += m_.row(t)[i];
        });
        barrier(worker, MULTIPLY);
        if (!convolved) return;
        each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
            run_convolution(block.output_convolution, past(t), width, width, begin, end, q_.row(t));
            for (int64_t i = begin * width; i < end * width; ++i) x_.row(t)[i] += q_.row(t)[i];
        });
        barrier(worker, CONVOLUTION);
    }

    // -- feed-forward ----------------------------------------------------------------------------------------

    void feed_forward(const Block& block, int64_t worker) {
        const Activations x = normalized(block.feed_forward_norm, worker);
        mark(worker, OTHER);
        if (shape_.feed_forward == DENSE_UNITS) return dense_feed_forward(block, x, worker);
        if (shape_.feed_forward == SPARSE_UNITS)
            choose_units(block, x, worker);
        else
            route(block, x, worker);
        barrier(worker, UNIT_DOTS);
        sum_units(block, worker);
        barrier(worker, UNIT_SUMS);
    }

    void dense_feed_forward(const Block& block, const Activations& x, int64_t worker) {
        const Range units = linear(block.up, x, h_.row(0), h_stride_, worker);
        if (shape_.gated) linear(block.gate, x, gate_.row(0), h_stride_, worker);
        for (int64_t t = 0; t < count(); ++t)
            k_.activate(shape_.activation, shape_.gated ? gate_.row(t) + units.begin : nullptr,
                        h_.row(t) + units.begin, units.end - units.begin);
        barrier(worker, DENSE_FF);
        const Activations h = readable(h_, h_stride_, worker);
        add_to_residual(y_, linear(block.down, h, y_.row(0), d_stride_, worker));
        barrier(worker, DENSE_FF);
    }

    void choose_units(const Block& block, const Activations& x, int64_t worker) {
        const Range ranks = mine(shape_.rank, 2, worker);  // rows are computed in pairs
        k_.dots(block.controller_first, ranks.begin, ranks.end, x, count(), z_.row(0), z_stride_);
        barrier(worker, CONTROLLER);
        const Range blocks = mine(shape_.d_ff / shape_.block_size, 1, worker);
        const int64_t each_block = shape_.units_per_block;
        const Choice choice{shape_.block_size, each_block, model_.padded_rank(), model_.padded_block()};
        float* weights = shape_.probability_gate ? probabilities_.row(0) : nullptr;
        Activations z{z_.row(0), nullptr, nullptr, nullptr, z_stride_};
        Worker& own = workers_[size_t(worker)];
        if (block.controller_second.type == INT8) {  // z is small: every thread quantises it for itself
            const int64_t rows = count();
            float* scales = own.line.row(0);
            int16_t* integers = (int16_t*)own.scratch.row(0);
            for (int64_t t = 0; t < rows; ++t) scales[t] = k_.quantise(z_.row(t), z_stride_, integers + t * z_stride_);
            z.integers = integers;
            z.scales = scales;
        }
        k_.choose(block.controller_second, values(block.controller_bias), choice, blocks.begin, blocks.end, z, count(),
                  chosen_.row(0), weights, h_stride_, block.units, model_.parts());
        mark(worker, CONTROLLER);
        if (shape_.units_on_disk) read_ahead(block, blocks.begin * each_block, blocks.end * each_block);
        const int64_t step = count() == 1 ? blocks.end - blocks.begin : BLOCKS_AT_ONCE;
        for (int64_t first = blocks.begin; first < blocks.end; first += step) {
            const int64_t begin = first * each_block, end = std::min(first + step, blocks.end) * each_block;
            for (int64_t t = 0; t < count(); ++t) {
                k_.unit_dots(block.units, model_.parts(), shape_.activation, values(block.unit_bias), chosen_.row(t),
                             begin, end, row_of(x, t), count() == 1, h_.row(t));
                if (weights)
                    for (int64_t i = begin; i < end; ++i) h_.row(t)[i] *= probabilities_.row(t)[i];
            }
        }
    }

    static Activations row_of(const Activations& x, int64_t t) {
        return {x.values + t * x.stride, x.integers + t * x.stride, x.scales + t, x.halves + 2 * t * x.stride,
                x.stride};
    }

    // Asks the system for all of a layer's chosen rows at once: one by one, a disk would be waited for each time.
    void read_ahead([[maybe_unused]] const Block& block, [[maybe_unused]] int64_t begin,
                    [[maybe_unused]] int64_t end) const {
#if defined(__linux__)
        const int64_t page = sysconf(_SC_PAGESIZE);
        const int64_t bytes = model_.parts() * round_up(block.units.cols, PAD) * type_bytes(block.units.type);
        for (int64_t t = 0; t < count(); ++t)
            for (int64_t i = begin; i < end; ++i) {
                const int64_t first = int64_t(block.units.data) + chosen_.row(t)[i] * bytes;
                const int64_t start = first / page * page;
                madvise((void*)start, size_t(first + bytes - start), MADV_WILLNEED);
            }
#endif
    }

    // Mixture of experts: the router chooses slices of consecutive units.
    void route(const Block& block, const Activations& x, int64_t worker) {
        const int64_t experts = shape_.rank, size = shape_.block_size, uses = shape_.units_per_block;
        float* scores = workers_[size_t(worker)].line.row(0);
        for (int64_t t = 0; t < count(); ++t) {
            const Activations row = row_of(x, t);
            k_.dots(block.router, 0, experts, row, 1, scores, experts);
            float top = scores[0], total = 0;
            for (int64_t e = 1; e < experts; ++e) top = std::max(top, scores[e]);
            for (int64_t e = 0; e < experts; ++e) total += std::exp(scores[e] - top);
            for (int64_t use = 0; use < uses; ++use) {
                int64_t best = 0;
                for (int64_t e = 1; e < experts; ++e)
                    if (scores[e] > scores[best]) best = e;
                const float weight = shape_.probability_gate ? std::exp(scores[best] - top) / total : 1;
                const Range units = mine(size, LANES, worker);
                int32_t* to = chosen_.row(t) + use * size;
                for (int64_t u = units.begin; u < units.end; ++u) to[u] = int32_t(best * size + u);
                if (shape_.units_on_disk) read_ahead_row(block, t, use * size + units.begin, use * size + units.end);
                expert_dots(block, row, weight, t, use * size + units.begin, use * size + units.end, worker);
                scores[best] = -INFINITY;
            }
        }
    }

    void read_ahead_row(const Block& block, int64_t, int64_t begin, int64_t end) const { read_ahead(block, begin, end); }

    // The router's weight enters before the activation.
    void expert_dots(const Block& block, const Activations& x, float weight, int64_t t, int64_t begin, int64_t end,
                     int64_t worker) {
        Activations weighted = x;
        if (weight != 1) {
            float* scaled = workers_[size_t(worker)].line.row(0) + z_stride_ + CHUNK;  // behind the router's scores
            for (int64_t i = 0; i < d_stride_; ++i) scaled[i] = x.values[i] * weight;
            weighted = own_forms(scaled, d_stride_, worker);
        }
        k_.unit_dots(block.units, model_.parts(), shape_.activation, nullptr, chosen_.row(t), begin, end, weighted,
                     count() == 1, h_.row(t));
    }

    void sum_units(const Block& block, int64_t worker) {
        const int64_t chosen = model_.chosen_units(), d = shape_.d_model;
        const float* bias = values(block.bias);
        if (count() == 1) {
            const Range columns = mine(d, LANES, worker);
            k_.unit_sums(block.units, model_.parts(), chosen_.row(0), h_.row(0), chosen, columns.begin, columns.end,
                         x_.row(0));
            for (int64_t c = columns.begin; c < columns.end; ++c) x_.row(0)[c] += bias[c];
            return;
        }
        const Range rows = mine(count(), 1, worker);
        const int64_t step = BLOCKS_AT_ONCE * (shape_.feed_forward == SPARSE_UNITS ? shape_.units_per_block : 1);
        for (int64_t first = 0; first < chosen; first += step)
            for (int64_t t = rows.begin; t < rows.end; ++t)
                k_.unit_sums(block.units, model_.parts(), chosen_.row(t) + first, h_.row(t) + first,
                             std::min(step, chosen - first), 0, d, x_.row(t));
        for (int64_t t = rows.begin; t < rows.end; ++t)
            for (int64_t c = 0; c < d; ++c) x_.row(t)[c] += bias[c];
    }

    // -- logits ----------------------------------------------------------------------------------------------

    // Logits of the rows that want them, which lie one after the other.
    void logits(int64_t worker) {
        const int64_t held = int64_t(wanted_.size());
        if (!held) return;
        float* out = (*rows_)[size_t(wanted_[0])].logits;
        const auto normalize = [&](int64_t i, float* to) {
            k_.normalize(x_.row(wanted_[size_t(i)]), values(model_.norm.weight),
                         shape_.rms ? nullptr : values(model_.norm.bias), shape_.d_model, shape_.rms, shape_.epsilon, to);
        };
        Buffer<float>& normed = held == 1 ? workers_[size_t(worker)].normed : normed_;
        const Range rows = held == 1 ? Range{0, 1} : mine(held, 1, worker);
        for (int64_t i = rows.begin; i < rows.end; ++i) normalize(i, normed.row(i));
        const Activations x = readable(normed, d_stride_, worker, held);
        if (shape_.head_modules)
            multiplicative_logits(x, held, out, worker);
        else
            dense_logits(x, held, out, worker);
    }

    void multiplicative_logits(const Activations& x, int64_t held, float* out, int64_t worker) {
        const Map& head = model_.head;
        const Range panels = mine((head.E.rows + PANEL - 1) / PANEL, 1, worker);
        for (int64_t i = 0; i < held; ++i)
            k_.multiplicative(head.D, head.E, values(head.bias), x.values + i * x.stride, 0, shape_.head_modules,
                              panels.begin, panels.end, out + i * shape_.vocabulary,
                              workers_[size_t(worker)].scratch.row(0));
    }

    void dense_logits(const Activations& x, int64_t held, float* out, int64_t worker) {
        const float* bias = values(model_.head.bias);
        const int64_t vocabulary = shape_.vocabulary;
        const auto plain = [&](const Matrix& weight, Range rows, const Activations& of, int64_t tokens, float* to) {
            k_.dots(weight, rows.begin, rows.end, of, tokens, to, vocabulary);
            if (bias)
                for (int64_t i = 0; i < tokens; ++i)
                    for (int64_t r = rows.begin; r < rows.end; ++r) to[i * vocabulary + r] += bias[r];
        };
        if (!model_.exact_head.data) return plain(model_.head.weight, mine(vocabulary, LANES, worker), x, held, out);
        // The likeliest tokens of every part of the vocabulary are scored again with weights that were rounded less.
        const Range lanes = mine(HEAD_LANES, 1, worker);
        for (int64_t lane = lanes.begin; lane < lanes.end; ++lane) {
            const Range rows = share(vocabulary, 1, lane, HEAD_LANES);
            plain(model_.head.weight, rows, x, held, out);
            for (int64_t i = 0; i < held; ++i) {
                float* of_token = out + i * vocabulary;
                int64_t best[CANDIDATES], found = 0;
                for (int64_t r = rows.begin; r < rows.end; ++r) {
                    if (found == CANDIDATES && !(of_token[r] > of_token[best[found - 1]])) continue;
                    int64_t place = found < CANDIDATES ? found++ : found - 1;
                    for (; place > 0 && of_token[r] > of_token[best[place - 1]]; --place) best[place] = best[place - 1];
                    best[place] = r;
                }
                for (int64_t j = 0; j < found; ++j)
                    plain(model_.exact_head, {best[j], best[j] + 1}, row_of(x, i), 1, of_token);
            }
        }
    }

    static constexpr int64_t MAX_HEAD_WIDTH = 1024;

    const Model& model_;
    const sparsecli_shape& shape_;
    const Kernels& k_;
    Pool& pool_;
    std::vector<Worker> workers_;
    CacheSizes sizes_{};
    const std::vector<Row>* rows_ = nullptr;
    std::vector<int64_t> wanted_;  // rows that want logits
    bool profile_ = false;
    Clock::time_point since_;
    int64_t d_stride_ = 0, z_stride_ = 0, h_stride_ = 0, integer_stride_ = 0, score_stride_ = 0;
    Buffer<float> x_, normed_, q_, k_row_, v_, m_, y_, z_, h_, gate_, probabilities_, scales_, angles_;
    Buffer<int32_t> chosen_;
    Buffer<int16_t> integers_;
    Buffer<uint16_t> halves_;
};

}  // namespace sparsecli
