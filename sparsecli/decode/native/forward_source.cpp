// What an encoder made of a source: keys and values of it, and attention to them.
#include "forward.h"

namespace sparsecli {

void Forward::remember_source(const std::vector<Row>& rows) {
    rows_ = &rows;
    profile_ = false;
    pool_.run([this](int64_t worker) { source_pass(worker); });
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

}  // namespace sparsecli
