// The narrow recurrent branch beside the feed-forward layer: y = leave(cells(enter(norm(x)))).
#include "layers/forward.h"

namespace sparsecli {

namespace {

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

// Reads the residual stream, to which the feed-forward layer adds later.
void Forward::enter_recurrence(const Recurrence& branch, int64_t worker) {
    const Activations x = normalized(branch.norm, worker);
    linear(branch.enter, x, recurrent_.row(0), r_stride_, worker);
    if (count() > 1) barrier(worker, RECURRENCE);  // the feed-forward layer normalises into the same rows
    mark(worker, RECURRENCE);
}

// After a barrier. One row is so little that every thread runs it through the cells for itself.
void Forward::leave_recurrence(const Recurrence& branch, int64_t layer, int64_t worker) {
    const bool alone = count() == 1;
    if (alone) {
        float* own = workers_[size_t(worker)].recurrent.row(0);
        std::memcpy(own, recurrent_.row(0), size_t(shape_.recurrent_width) * sizeof(float));
        recur(branch, layer, 0, own, worker);
    } else {
        if (!worker)
            for (int64_t t = 0; t < count(); ++t) recur(branch, layer, t, recurrent_.row(t), worker);
        barrier(worker, RECURRENCE);
    }
    const Activations y = readable(alone ? workers_[size_t(worker)].recurrent : recurrent_, r_stride_, worker);
    add_to_residual(y_, linear(branch.leave, y, y_.row(0), d_stride_, worker), worker);
    if (!alone) barrier(worker, RECURRENCE);  // units are then summed up row by row, not by columns
    mark(worker, RECURRENCE);
}

// One row through all cells, in place. The first thread keeps the states.
void Forward::recur(const Recurrence& branch, int64_t layer, int64_t t, float* y, int64_t worker) {
    const int64_t width = shape_.recurrent_width;
    const Row& row = (*rows_)[size_t(t)];
    float* gates = workers_[size_t(worker)].gates.row(0);
    for (int64_t cell = 0; cell < shape_.recurrent_layers; ++cell) {
        const Map& map = branch.cells[size_t(cell)];
        dense(map.weight, values(map.bias), {0, 3 * width}, own_forms(y, r_stride_, worker), 1, gates, 3 * width);
        const int64_t at = (layer * shape_.recurrent_layers + cell) * (1 + row.sequence->capacity) + row.position;
        const float* before = row.sequence->states.data + at * width;
        float* after = row.sequence->states.data + (at + 1) * width;
        for (int64_t i = 0; i < width; ++i) {
            const float reset = sigmoid(gates[i]), forget = sigmoid(gates[width + i]);
            const float state = forget * before[i] + (1 - forget) * gates[2 * width + i];
            y[i] = reset * state + std::sqrt(3.0f) * (1 - reset) * y[i];
            if (!worker) after[i] = state;
        }
    }
}

}  // namespace sparsecli
