// The pass as a whole, what its parts share, and the logits.
#include "layers/forward.h"

namespace sparsecli {

void Forward::pass(int64_t worker) {
    if (!worker) since_ = Clock::now();
    Worker& own = workers_[size_t(worker)];
    own.written = &x_;
    own.read = shape_.streams == 2 ? &other_ : &x_;
    const Range rows = mine(count(), 1, worker);
    for (int64_t t = rows.begin; t < rows.end; ++t) embed(t);
    barrier(worker, OTHER);
    const Clock::time_point start = Clock::now();
    for (int64_t layer = 0; layer < shape_.layers; ++layer) {
        const Block& block = model_.blocks[size_t(layer)];
        if (shape_.parallel) set_aside(block, worker);
        for (int64_t i = 0; i < shape_.attention_layers; ++i) {
            attention(block, i, layer, worker);
            swap_streams(worker);
        }
        if (model_.crosses()) cross_attention(block.cross, layer, worker);
        feed_forward(block, layer, worker);
        swap_streams(worker);
    }
    if (!worker) block_stack_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
    logits(worker);
    mark(worker, HEAD);
}

// The first vectors of both streams. Positions of tokens begin after a joined source, but its angles are counted on.
void Forward::embed(int64_t t) {
    const Row& row = (*rows_)[size_t(t)];
    float* x = x_.row(t);
    const int64_t d = shape_.d_model, position = row.position - row.sequence->first;
    const size_t bytes = size_t(d) * sizeof(float);
    if (row.vectors[0]) {
        std::memcpy(x, row.vectors[0], bytes);
    } else {
        widen_row(model_.embedding, row.token, x);
        for (int64_t i = 0; i < d; ++i) x[i] *= float(shape_.embedding_scale);
    }
    if (shape_.positions == LEARNED && !row.vectors[0]) {
        float* line = y_.row(t);
        widen_row(model_.positions, position, line);
        for (int64_t i = 0; i < d; ++i) x[i] += line[i];
    }
    const float* frequency = values(model_.frequencies);
    const int64_t half = model_.frequencies.cols;
    float* angles = angles_.row(t);
    for (int64_t i = 0; i < half && shape_.positions == ROTARY; ++i) {
        angles[i] = std::cos(float(row.position) * frequency[i]);
        angles[half + i] = std::sin(float(row.position) * frequency[i]);
    }
    for (int64_t i = 0; i < half && shape_.positions == SINUSOIDAL && !row.vectors[0]; ++i) {
        x[i] += std::sin(float(position) * frequency[i]);  // all sines, then all cosines
        x[half + i] += std::cos(float(position) * frequency[i]);
    }
    if (shape_.streams == 2) std::memcpy(other_.row(t), row.vectors[1] ? row.vectors[1] : x, bytes);
}

void Forward::widen_row(const Matrix& table, int64_t row, float* out) const {
    const int64_t stride = round_up(table.cols, PAD) * type_bytes(table.type);
    k_.widen((const char*)table.data + row * stride, table.scale ? table.scale + row : nullptr, table.type, table.cols,
             out);
}

void Forward::normalize(const Norm& norm, int64_t t, float* to, int64_t worker) const {
    k_.normalize(workers_[size_t(worker)].read->row(t), values(norm.weight), shape_.rms ? nullptr : values(norm.bias),
                 shape_.d_model, shape_.rms, shape_.epsilon, to);
}

// Normalised residual rows for layers to read. A single row is computed by every thread for itself, which is
// cheaper than waiting for one another.
Activations Forward::normalized(const Norm& norm, int64_t worker) {
    Worker& own = workers_[size_t(worker)];
    if (count() == 1) {
        normalize(norm, 0, own.normed.row(0), worker);
        return readable(own.normed, d_stride_, worker);
    }
    const Range rows = mine(count(), 1, worker);
    for (int64_t t = rows.begin; t < rows.end; ++t) normalize(norm, t, normed_.row(t), worker);
    return readable(normed_, d_stride_, worker);
}

// What the feed-forward half reads, for later: the residual rows will have changed.
void Forward::set_aside(const Block& block, int64_t worker) {
    if (shape_.recurrent_layers) enter_recurrence(block.recurrence, worker);
    const Norm& norm = block.feed_forward_norm;
    if (count() == 1) return normalize(norm, 0, workers_[size_t(worker)].aside.row(0), worker);
    const Range rows = mine(count(), 1, worker);
    for (int64_t t = rows.begin; t < rows.end; ++t) normalize(norm, t, aside_.row(t), worker);
}

// Rows as layers read them, in every form that the model's weights need. With many rows a barrier follows.
Activations Forward::readable(const Buffer<float>& source, int64_t stride, int64_t worker) {
    return readable(source, stride, worker, count());
}

Activations Forward::readable(const Buffer<float>& source, int64_t stride, int64_t worker, int64_t held) {
    if (held == 1) return own_forms(source.row(0), stride, worker);
    const Range rows = mine(held, 1, worker);
    for (int64_t t = rows.begin; t < rows.end; ++t) {
        if (model_.quantised)
            scales_.row(0)[t] = k_.quantise(source.row(t), stride, integers_.data + t * stride,
                                            model_.few_bits ? sums_.data + t * (stride / LOW_BIT_GROUP) : nullptr);
    }
    barrier(worker, OTHER);
    return {source.row(0), integers_.data, scales_.row(0), stride, sums_.data};
}

Activations Forward::row_of(const Activations& x, int64_t t) {
    return {x.values + t * x.stride, x.integers + t * x.stride, x.scales + t, x.stride,
            x.sums + t * (x.stride / LOW_BIT_GROUP)};
}

// One row, in this worker's own memory.
Activations Forward::own_forms(const float* row, int64_t stride, int64_t worker) {
    Worker& own = workers_[size_t(worker)];
    if (model_.quantised)
        own.scale[0] = k_.quantise(row, stride, own.integers.row(0), model_.few_bits ? own.sums.row(0) : nullptr);
    return {row, own.integers.row(0), own.scale, stride, own.sums.row(0)};
}

// out = w x (+ bias, where there is one) for some outputs.
void Forward::dense(const Matrix& weight, const float* bias, Range rows, const Activations& x, int64_t tokens,
                    float* out, int64_t out_stride) const {
    k_.matmul(weight, rows.begin, rows.end, x, tokens, out, out_stride);
    if (!bias) return;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = rows.begin; r < rows.end; ++r) out[t * out_stride + r] += bias[r];
}

// The same for this worker's outputs; returns them.
Range Forward::linear(const Map& map, const Activations& x, float* out, int64_t out_stride, int64_t worker) const {
    const Range rows = mine(map.weight.rows, LANES, worker);
    dense(map.weight, values(map.bias), rows, x, count(), out, out_stride);
    return rows;
}

void Forward::multiply(const Map& map, const float* x, int64_t begin, int64_t end, float* out, int64_t worker) {
    const int64_t panels = (map.E.rows + PANEL - 1) / PANEL;
    k_.multiplicative(map.D, map.E, values(map.bias), x, begin, end, 0, panels, out,
                      workers_[size_t(worker)].scratch.row(0), &workers_[size_t(worker)].ahead);
}

void Forward::add_to_residual(const Buffer<float>& y, Range columns, int64_t worker) {
    for (int64_t t = 0; t < count(); ++t) {
        float* x = residual(t, worker);
        for (int64_t c = columns.begin; c < columns.end; ++c) x[c] += y.row(t)[c];
    }
}

// A row of what the last norm reads; two streams are merged in `line`.
const float* Forward::merged(int64_t t, float* line, int64_t worker) const {
    if (shape_.streams == 1) return x_.row(t);
    const float *a = residual(t, worker), *b = workers_[size_t(worker)].read->row(t);
    const int64_t d = shape_.d_model;
    for (int64_t i = 0; i < d; ++i) {
        line[i] = shape_.concatenate ? a[i] : (a[i] + b[i]) / 2;
        if (shape_.concatenate) line[d + i] = b[i];
    }
    return line;
}

// Logits of the rows that want them, which lie one after the other.
void Forward::logits(int64_t worker) {
    const int64_t held = int64_t(wanted_.size());
    if (!held) return;
    float* out = (*rows_)[size_t(wanted_[0])].logits;
    Buffer<float>& normed = held == 1 ? workers_[size_t(worker)].merged : merged_;
    const Range rows = held == 1 ? Range{0, 1} : mine(held, 1, worker);
    for (int64_t i = rows.begin; i < rows.end; ++i)
        k_.normalize(merged(wanted_[size_t(i)], normed.row(i), worker), values(model_.norm.weight),
                     values(model_.norm.bias), model_.merged_width(), shape_.rms, shape_.epsilon, normed.row(i));
    const Activations x = readable(normed, merged_stride_, worker, held);
    if (shape_.head_modules)
        multiplicative_logits(x, held, out, worker);
    else
        dense_logits(x, held, out, worker);
}

void Forward::multiplicative_logits(const Activations& x, int64_t held, float* out, int64_t worker) {
    const Map& head = model_.head;
    const Range panels = mine((head.E.rows + PANEL - 1) / PANEL, 1, worker);
    for (int64_t i = 0; i < held; ++i)
        k_.multiplicative(head.D, head.E, values(head.bias), x.values + i * x.stride, 0, shape_.head_modules,
                          panels.begin, panels.end, out + i * shape_.vocabulary,
                          workers_[size_t(worker)].scratch.row(0), &workers_[size_t(worker)].ahead);
}

void Forward::dense_logits(const Activations& x, int64_t held, float* out, int64_t worker) {
    const float* bias = values(model_.head.bias);
    const int64_t vocabulary = shape_.vocabulary;
    const Matrix& weight = model_.head.weight;
    if (!model_.exact_head.data) return dense(weight, bias, mine(vocabulary, LANES, worker), x, held, out, vocabulary);
    // The likeliest tokens of every part of the vocabulary are scored again with weights that were rounded less.
    const Range lanes = mine(HEAD_LANES, 1, worker);
    for (int64_t lane = lanes.begin; lane < lanes.end; ++lane) {
        const Range rows = share(vocabulary, 1, lane, HEAD_LANES);
        dense(weight, bias, rows, x, held, out, vocabulary);
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
                dense(model_.exact_head, bias, {best[j], best[j] + 1}, row_of(x, i), 1, of_token, vocabulary);
        }
    }
}

}  // namespace sparsecli
