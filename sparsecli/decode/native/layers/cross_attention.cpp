// What was made elsewhere: keys and values of an encoder's output, with attention to them, and what another
// implementation remembers of the first positions.
#include "layers/forward.h"

namespace sparsecli {

void Forward::remember_source(const std::vector<Row>& rows) {
    rows_ = &rows;
    profile_ = false;
    pool_.run([this](int64_t worker) { source_pass(worker); }, false);
}

void Forward::source_pass(int64_t worker) {
    const Range rows = mine(count(), 1, worker);
    for (int64_t t = rows.begin; t < rows.end; ++t)
        std::memcpy(x_.row(t), (*rows_)[size_t(t)].vectors[0], size_t(shape_.d_model) * sizeof(float));
    barrier(worker, OTHER);
    const Activations x = readable(x_, d_stride_, worker);
    for (int64_t layer = 0; layer < shape_.layers; ++layer) {
        const AttentionLayer& cross = model_.blocks[size_t(layer)].cross;
        linear(cross.key, x, k_row_.row(0), a_stride_, worker);
        linear(cross.value, x, v_.row(0), a_stride_, worker);
        barrier(worker, PROJECTION);
        each(shape_.heads, worker, [&](int64_t t, int64_t begin, int64_t end) {
            for (int64_t head = begin; head < end; ++head) append(&Sequence::source, layer, t, head);
        });
        barrier(worker, ATTENTION);
    }
}

void Forward::cross_attention(const AttentionLayer& cross, int64_t layer, int64_t worker) {
    const Activations x = normalized(cross.norm, worker);
    if (count() == 1) fetch_cache(&Sequence::source, layer, worker);
    mark(worker, OTHER);
    if (shape_.query_modules)
        convolve_queries(cross, layer, x, worker);
    else
        linear(cross.query, x, q_.row(0), a_stride_, worker);
    barrier(worker, shape_.query_modules ? CONVOLUTION : PROJECTION);
    attend(cross, &Sequence::source, layer, worker);
    barrier(worker, ATTENTION);
    if (!shape_.query_modules) project_output(cross.output, worker);
}

void Forward::convolve_queries(const AttentionLayer& cross, int64_t layer, const Activations& x, int64_t worker) {
    const int64_t modules = shape_.query_modules, width = model_.query_module_width();
    const auto past = [&](int64_t t) {
        const Row& row = (*rows_)[size_t(t)];
        return history_of(row, row.sequence->query_history, layer, sizes_.query_history_row, sizes_.query_margin);
    };
    each(modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
        multiply(cross.shared, x.values + t * x.stride, begin, end, m_.row(t), worker);
        remember(past(t), m_.row(t), begin * width, end * width);
    });
    barrier(worker, MULTIPLY);
    each(modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
        run_convolution(cross.query_convolution, past(t), width, width, begin, end, q_.row(t), worker);
    });
}

void Forward::take_over(Sequence& sequence, int64_t place, const float* keys, const float* values, const float* inputs,
                        const float* output_inputs, const float* states, int64_t count) {
    const int64_t d = shape_.d_model, width = model_.key_width(), units = shape_.recurrent_width;
    const int64_t cells = states ? shape_.recurrent_layers : 0, layer = place / shape_.attention_layers;
    std::vector<Row> rows{{&sequence, 0, -1, nullptr}};
    rows_ = &rows;
    for (int64_t position = 0; position < count; ++position) {
        rows[0].position = position;
        std::memcpy(k_row_.row(0), keys + position * width, size_t(width) * sizeof(float));
        std::memcpy(v_.row(0), values + position * width, size_t(width) * sizeof(float));
        for (int64_t head = 0; head < shape_.key_value_heads; ++head) append(&Sequence::own, place, 0, head);
        if (inputs) {
            const float* line = inputs + position * (shape_.value_concat ? 2 * d : d);
            std::memcpy(m_.row(0), line, size_t(d) * sizeof(float));
            remember(history(place, 0), m_.row(0), 0, d);
            if (shape_.value_concat) remember_joined(place, 0, line + d, 0, d);
        }
        if (output_inputs) remember(output_history(place, 0), output_inputs + position * d, 0, d);
        for (int64_t cell = 0; cell < cells; ++cell) {
            const int64_t at = (layer * cells + cell) * (1 + sequence.capacity) + position + 1;
            std::memcpy(sequence.states.data + at * units, states + (cell * count + position) * units,
                        size_t(units) * sizeof(float));
        }
    }
    for (int64_t head = 0; head < shape_.heads && model_.hashes(); ++head)
        sequence.hashed[size_t(place * shape_.heads + head)] = {};
}

}  // namespace sparsecli
