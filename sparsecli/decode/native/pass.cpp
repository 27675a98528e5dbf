#include "pass.h"

namespace sparsecli {

Workspace::Workspace(const Model& model, const Ops& ops, Pool& pool)
    : model(model), shape(model.shape), ops(ops), pool(pool) {
    const int64_t d = shape.d_model, parallel = shape.parallel ? d : 0;
    reads(d);
    for (Buffer<float>* buffer : {&residual, &normed, &layer_output}) for_tokens(*buffer, d, true);
    for_tokens(second_stream, shape.streams == 2 ? d : 0, true);
    for_workers(own_normed, d, true);
    for_tokens(saved_norm, parallel, true);
    for_workers(own_saved_norm, parallel, true);
    for_tokens(branch, model.changes_branches() ? d : 0, false);
    for_tokens(rotary, shape.rotary_width, false);
    for_tokens(sliding_rotary, model.has_sliding_rotary() ? shape.rotary_width : 0, false);
    for_workers(own_scratch, SCRATCH_BYTES, false);
    for_workers(own_taps, shape.kernel, false);
    for_workers(own_active_units, shape.layers, false);
}

void Workspace::allocate_activations() {
    const int64_t groups = activation_width_ / QUANT_GROUP;
    for_tokens(integers, activation_width_, false);
    for_workers(own_integers, activation_width_, false);
    for_tokens(sums, groups, false);
    for_workers(own_sums, groups, false);
    scales.rows(1, CHUNK, CHUNK, false);
    for_workers(own_scale, 1, false);
    for_tokens(bytes, activation_width_, false);
    for_workers(own_bytes, activation_width_, false);
    for_tokens(byte_scales, activation_width_ / BYTE_GROUP, false);
    for_workers(own_byte_scales, activation_width_ / BYTE_GROUP, false);
    for_tokens(byte_sums, activation_width_ / LANES, false);
    for_workers(own_byte_sums, activation_width_ / LANES, false);
}

void Workspace::reserve(int64_t positions) {
    if (positions <= score_stride) return;
    const int64_t stride = round_up(2 * positions, PAD);
    score_stride = 0;  // until all of it is there: memory may not suffice
    for_workers(own_scores, QUERIES * stride, false);
    score_stride = stride;
}

void Pass::add_to_residual(const Buffer<float>& y, Range columns) {
    for (int64_t t = 0; t < count(); ++t) {
        float* x = residual(t);
        for (int64_t c = columns.begin; c < columns.end; ++c) x[c] += y.row(t)[c];
    }
}

void Pass::end_branch(const Norm& norm) {
    if (!model.changes_branches()) return;
    written_ = &space.residual;
    const int64_t d = shape.d_model;
    const float scale = float(shape.residual_scale);
    const Range tokens = mine(count(), 1);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        float *y = space.branch.row(t), *x = residual(t);
        if (norm.weight.data)
            ops.normalize(y, values(norm.weight), shape.rms ? nullptr : values(norm.bias), d, shape.rms, shape.epsilon,
                          y);
        for (int64_t i = 0; i < d; ++i) x[i] += scale * y[i];
        std::fill_n(y, d, 0.0f);
    }
    barrier(OTHER);
}

// Where there is no norm, a layer reads the stream as it is.
void Pass::normalize(const Norm& norm, int64_t t, float* out) const {
    if (!norm.weight.data) {
        std::copy_n(read_stream(t), shape.d_model, out);
        return;
    }
    ops.normalize(read_stream(t), values(norm.weight), shape.rms ? nullptr : values(norm.bias), shape.d_model,
                  shape.rms, shape.epsilon, out);
}

void Pass::normalize(const Norm& norm, const Buffer<float>& shared, const Buffer<float>& own) const {
    if (single()) return normalize(norm, 0, own.row(worker));
    const Range rows = mine(count(), 1);
    for (int64_t t = rows.begin; t < rows.end; ++t) normalize(norm, t, shared.row(t));
}

Activations Pass::normalized(const Norm& norm) {
    normalize(norm, space.normed, space.own_normed);
    return single() ? quantized(space.own_normed) : readable(space.normed);
}

void Pass::save_norm(const Norm& norm) { normalize(norm, space.saved_norm, space.own_saved_norm); }

Activations Pass::readable(const Buffer<float>& from, int64_t held) {
    const int64_t stride = from.stride;
    if (held == 1) return quantized(from.row(0), stride);
    const Activations all = {from.row(0),     space.integers.data, space.scales.row(0),    stride,
                             space.sums.data, space.bytes.data,    space.byte_scales.data, space.byte_sums.data};
    const Range rows = mine(held, 1);
    for (int64_t t = rows.begin; t < rows.end; ++t) quantise(row_of(all, t));
    barrier(OTHER);
    return all;
}

Activations Pass::quantized(const float* row, int64_t stride) {
    const Activations x = {row,
                           space.own_integers.row(worker),
                           space.own_scale.row(worker),
                           stride,
                           space.own_sums.row(worker),
                           space.own_bytes.row(worker),
                           space.own_byte_scales.row(worker),
                           space.own_byte_sums.row(worker)};
    quantise(x);
    return x;
}

// Fills in the forms of a row's values that the model's weights need.
void Pass::quantise(const Activations& x) const {
    if (model.quantized)
        *(float*)x.scales =
            ops.quantise(x.values, x.stride, (int16_t*)x.integers, model.group_sums ? (int32_t*)x.sums : nullptr);
    if (model.bytes)
        ops.quantise_bytes(x.values, x.stride, (int8_t*)x.bytes, (ByteScale*)x.byte_scales, (int32_t*)x.byte_sums);
}

void Pass::linear(const Matrix& weight, const float* bias, Range rows, const Activations& x, int64_t tokens, float* out,
                  int64_t out_stride) const {
    ops.matmul(weight, rows.begin, rows.end, x, tokens, out, out_stride);
    if (!bias) return;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = rows.begin; r < rows.end; ++r) out[t * out_stride + r] += bias[r];
}

}  // namespace sparsecli
