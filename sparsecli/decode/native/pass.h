// What the layers of one pass share: tokens, residual stream, activations, worker threads, and the time that parts
// take.
//
// A pass takes up to CHUNK tokens of one or more sequences through all blocks. Every worker thread runs the same code
// with a `Pass` of its own; workers meet at barriers. With a single token they share out each layer's outputs. With
// many they share out tokens where weights are small and outputs where weights are large. Results depend on neither.
//
// Shapes: T tokens of the pass, d = d_model. A buffer with `own` in its name has one row for each worker.
#pragma once
#include <chrono>
#include <cmath>
#include <utility>
#include <vector>

#include "model.h"
#include "pool.h"
#include "sequence.h"

namespace sparsecli {

constexpr int64_t SCRATCH_BYTES = 1 << 19;  // bytes, for the products of a multiplicative layer

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

// This worker's part of `total` items, in steps of `step`; parts differ by one step at most.
inline Range share(int64_t total, int64_t step, int64_t worker, int64_t workers) {
    const int64_t steps = (total + step - 1) / step;
    const int64_t end = steps * (worker + 1) / workers * step;
    return {steps * worker / workers * step, end < total ? end : total};
}

// A token of one sequence in this pass, or a row of an encoder's output.
struct Token {
    Sequence* sequence;
    int64_t position, id;
    float* logits;                        // (vocabulary), null: not asked for
    const float* encoder_states[2] = {};  // (d) in place of an embedding, one for each stream
};

// Buffers and counters that all workers share. Layers add what they need to `activation_width` in their constructors.
struct Workspace {
    const Model& model;
    const sparsecli_shape& shape;
    const Ops& ops;
    Pool& pool;

    const std::vector<Token>* tokens = nullptr;
    Buffer<float> residual, second_stream;     // (T, d); the second where there are two streams
    Buffer<float> normed, own_normed;          // (T, d), (workers, d): what a layer reads
    Buffer<float> saved_norm, own_saved_norm;  // the same for a feed-forward layer beside attention (`parallel`)
    Buffer<float> layer_output;                // (T, d): what a layer computed, before it is added to the residual
    Buffer<float> branch;                      // (T, d): zeros, or what a layer adds before it is normalised or scaled
    Buffer<float> rotary;                      // (T, rotary_width): cosines, then sines of a position's angles
    Buffer<float> sliding_rotary;              // the same with the frequencies of layers with a window

    // Activations as integers, with scales and sums of groups: the rows that were quantised last.
    Buffer<int16_t> integers, own_integers;
    Buffer<int32_t> sums, own_sums;
    Buffer<float> scales, own_scale;
    // The same as bytes.
    Buffer<int8_t> bytes, own_bytes;
    Buffer<ByteScale> byte_scales, own_byte_scales;
    Buffer<int32_t> byte_sums, own_byte_sums;

    Buffer<float> own_scores;  // (workers, QUERIES * score_stride): attention scores of some queries
    int64_t score_stride = 0;
    Buffer<char> own_scratch;          // (workers, SCRATCH_BYTES)
    Buffer<const void*> own_taps;      // (workers, kernel): the inputs of a convolution
    Buffer<int64_t> own_active_units;  // (workers, layers): units that were computed in full
    double seconds[PART_COUNT] = {};   // of worker 0, while `profile` is on
    bool profile = false;

    Workspace(const Model& model, const Ops& ops, Pool& pool);

    // Says that rows of `width` elements are multiplied with weights, which may need their integers.
    void reads(int64_t width) { activation_width_ = std::max(activation_width_, round_up(width, PAD)); }
    void allocate_activations();

    // Room for attention scores over `positions`; before a pass, by one thread.
    void reserve(int64_t positions);

    // (T, width) and (workers, width) of a layer, with padding that stays zero; `poison`: see Buffer.
    template <class T>
    void for_tokens(Buffer<T>& buffer, int64_t width, bool poison) const {
        buffer.rows(width ? CHUNK : 0, width, round_up(width, PAD), poison && shape.poison);
    }
    template <class T>
    void for_workers(Buffer<T>& buffer, int64_t width, bool poison) const {
        buffer.rows(width ? pool.threads() : 0, width, round_up(width, PAD), poison && shape.poison);
    }

  private:
    int64_t activation_width_ = 0;
};

// One worker's view of the pass that is running.
class Pass {
  public:
    Pass(Workspace& workspace, int64_t worker)
        : model(workspace.model),
          shape(workspace.shape),
          ops(workspace.ops),
          worker(worker),
          space(workspace),
          written_(&workspace.residual),
          read_(workspace.shape.streams == 2 ? &workspace.second_stream : &workspace.residual),
          since_(Clock::now()) {}

    const Model& model;
    const sparsecli_shape& shape;
    const Ops& ops;
    const int64_t worker;
    Workspace& space;
    ReadAhead ahead;  // of a single token's next layers, see plan_ahead of the layers

    // -- tokens and workers ----------------------------------------------------------------------------------

    int64_t count() const { return int64_t(space.tokens->size()); }
    bool single() const { return count() == 1; }
    const Token& token(int64_t t) const { return (*space.tokens)[size_t(t)]; }
    int64_t workers() const { return space.pool.active(); }

    // This worker's part of `total` items, in steps of `step`.
    Range mine(int64_t total, int64_t step) const { return share(total, step, worker, workers()); }

    // Calls body(t, begin, end) for this worker's part of `width` items of every token.
    template <class F>
    void each(int64_t width, const F& body) const {
        const Range range = mine(count() * width, 1);
        for (int64_t at = range.begin; at < range.end;) {
            const int64_t t = at / width, end = std::min(range.end, (t + 1) * width);
            body(t, at - t * width, end - t * width);
            at = end;
        }
    }

    // The time since the last mark was spent on `part`.
    void mark(Part part) {
        if (!space.profile || worker) return;
        const Clock::time_point now = Clock::now();
        space.seconds[part] += std::chrono::duration<double>(now - since_).count();
        since_ = now;
    }

    void barrier(Part part) {
        mark(part);
        space.pool.barrier();
        mark(BARRIERS);
    }

    void count_units(int64_t layer_idx, int64_t units) { space.own_active_units.row(worker)[layer_idx] += units; }

    // -- the residual streams --------------------------------------------------------------------------------

    // Layers add to one stream and read the other; the two take turns. A model with one stream reads what it adds to.
    float* residual(int64_t t) const { return written_->row(t); }
    const float* read_stream(int64_t t) const { return read_->row(t); }
    void swap_streams() { std::swap(written_, read_); }
    void add_to_residual(const Buffer<float>& y, Range columns);

    // Between these two, all layers add to a branch of their own. In the end it is normalised, where there is a norm,
    // scaled and added to the stream; a barrier comes before and follows. They do nothing where branches are not
    // changed.
    void begin_branch() {
        if (model.changes_branches()) written_ = &space.branch;
    }
    void end_branch(const Norm& norm);

    // -- activations -----------------------------------------------------------------------------------------

    // The stream's normalised tokens, for a layer to read. With one token every worker computes them for itself, which
    // is cheaper than a barrier.
    Activations normalized(const Norm& norm);

    // The same in two steps, for a layer that reads them after the stream has changed.
    void save_norm(const Norm& norm);
    Activations saved_norm() { return single() ? quantized(space.own_saved_norm) : readable(space.saved_norm); }

    // Rows of a buffer in every form that the model's weights need, for all workers: with many rows a barrier follows.
    Activations readable(const Buffer<float>& rows) { return readable(rows, count()); }
    Activations readable(const Buffer<float>& rows, int64_t held);

    // One row, or this worker's row of a buffer, in this worker's memory.
    Activations quantized(const float* row, int64_t stride);
    Activations quantized(const Buffer<float>& own) { return quantized(own.row(worker), own.stride); }

    static Activations row_of(const Activations& x, int64_t t) {
        return {x.values + t * x.stride,
                x.integers + t * x.stride,
                x.scales + t,
                x.stride,
                x.sums + t * (x.stride / QUANT_GROUP),
                x.bytes + t * x.stride,
                x.byte_scales + t * (x.stride / BYTE_GROUP),
                x.byte_sums + t * (x.stride / LANES)};
    }

    // -- linear and multiplicative maps ----------------------------------------------------------------------

    // out[t] = w x[t] (+ bias, where there is one) for outputs `rows` of `tokens`.
    void linear(const Matrix& weight, const float* bias, Range rows, const Activations& x, int64_t tokens, float* out,
                int64_t out_stride) const;

    // The same for this worker's outputs, which are returned.
    Range linear(const Linear& map, const Activations& x, const Buffer<float>& out) const {
        const Range rows = mine(map.weight.rows, LANES);
        linear(map.weight, values(map.bias), rows, x, count(), out.row(0), out.stride);
        return rows;
    }

    // Modules [begin, end) of a multiplicative map of one row; `panels` of each module's outputs, by default all.
    void multiply(const Linear& map, const float* x, int64_t begin, int64_t end, float* out) {
        multiply(map, x, begin, end, {0, (map.E.rows + PANEL - 1) / PANEL}, out);
    }
    void multiply(const Linear& map, const float* x, int64_t begin, int64_t end, Range panels, float* out) {
        ops.multiplicative(map.D, map.E, values(map.bias), x, begin, end, panels.begin, panels.end, out,
                           space.own_scratch.row(worker), &ahead);
    }

  private:
    using Clock = std::chrono::steady_clock;

    void quantise(const Activations& x) const;
    void normalize(const Norm& norm, int64_t t, float* out) const;
    void normalize(const Norm& norm, const Buffer<float>& shared, const Buffer<float>& own) const;

    Buffer<float>*written_, *read_;
    Clock::time_point since_;
};

}  // namespace sparsecli
