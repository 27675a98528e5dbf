#include "layers/feed_forward.h"

namespace sparsecli {

DenseFeedForward::DenseFeedForward(Workspace& space) {
    const int64_t units = space.shape.d_ff;
    space.reads(units);
    space.for_tokens(hidden_, units, false);
    space.for_tokens(gate_, space.shape.gated ? units : 0, false);
}

void DenseFeedForward::activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    const bool gated = pass.shape.gated;
    const Range units = pass.linear(block.up, x, hidden_);
    const int64_t mine = units.end - units.begin;
    if (gated) pass.linear(block.gate, x, gate_);
    for (int64_t t = 0; t < pass.count(); ++t)
        pass.ops.activate(pass.shape.activation, gated ? gate_.row(t) + units.begin : nullptr,
                          hidden_.row(t) + units.begin, mine);
    pass.count_units(layer_idx, pass.count() * mine);
    pass.barrier(DENSE_FF);
}

void DenseFeedForward::add_sum(Pass& pass, const Block& block, int64_t) {
    const Activations hidden = pass.readable(hidden_);
    pass.add_to_residual(pass.space.layer_output, pass.linear(block.down, hidden, pass.space.layer_output));
    pass.barrier(DENSE_FF);
}

}  // namespace sparsecli
