#include "layers/sru.h"

namespace sparsecli {

namespace {

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

Sru::Sru(Workspace& space) {
    const int64_t width = space.shape.recurrent_layers ? space.shape.recurrent_width : 0;
    space.reads(width);
    space.for_tokens(branch_, width, true);
    space.for_workers(own_branch_, width, true);
    space.for_workers(own_gates_, 3 * width, true);
}

void Sru::enter(Pass& pass, const Recurrence& branch) {
    const Activations x = pass.normalized(branch.norm);
    pass.linear(branch.enter, x, branch_);
    if (!pass.single()) pass.barrier(RECURRENCE);  // the feed-forward layer normalises into the same rows
    pass.mark(RECURRENCE);
}

// After a barrier. The cells of one token are so little work that every worker runs them for itself.
void Sru::leave(Pass& pass, const Recurrence& branch, int64_t layer_idx) {
    if (pass.single()) {
        float* own = own_branch_.row(pass.worker);
        std::memcpy(own, branch_.row(0), size_t(pass.shape.recurrent_width) * sizeof(float));
        run_cells(pass, branch, layer_idx, 0, own);
    } else {
        for (int64_t t = 0; !pass.worker && t < pass.count(); ++t)
            run_cells(pass, branch, layer_idx, t, branch_.row(t));
        pass.barrier(RECURRENCE);
    }
    const Activations y = pass.single() ? pass.quantized(own_branch_) : pass.readable(branch_);
    pass.add_to_residual(pass.space.layer_output, pass.linear(branch.leave, y, pass.space.layer_output));
    if (!pass.single()) pass.barrier(RECURRENCE);  // units are then summed up by tokens, not by columns
    pass.mark(RECURRENCE);
}

// One token through all cells, in place. Worker 0 stores the states.
void Sru::run_cells(Pass& pass, const Recurrence& branch, int64_t layer_idx, int64_t t, float* y) {
    const int64_t width = pass.shape.recurrent_width;
    const Token& token = pass.token(t);
    float* gates = own_gates_.row(pass.worker);
    for (int64_t cell = 0; cell < pass.shape.recurrent_layers; ++cell) {
        const Linear& map = branch.cells[size_t(cell)];
        pass.linear(map.weight, values(map.bias), {0, 3 * width}, pass.quantized(y, branch_.stride), 1, gates,
                    3 * width);
        const float* before = token.sequence->recurrent_state(pass.model, layer_idx, cell, token.position - 1);
        float* after = token.sequence->recurrent_state(pass.model, layer_idx, cell, token.position);
        for (int64_t i = 0; i < width; ++i) {
            const float reset = sigmoid(gates[i]), forget = sigmoid(gates[width + i]);
            const float state = forget * before[i] + (1 - forget) * gates[2 * width + i];
            y[i] = reset * state + std::sqrt(3.0f) * (1 - reset) * y[i];
            if (!pass.worker) after[i] = state;
        }
    }
}

}  // namespace sparsecli
