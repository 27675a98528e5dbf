#include "layers/sparse_feed_forward.h"

#include <numeric>

namespace sparsecli {

SparseFeedForward::SparseFeedForward(Workspace& space) : chosen_(space) {
    const int64_t rank = space.model.padded_rank();
    space.for_tokens(probabilities_, space.shape.probability_gate ? chosen_.units.stride : 0, false);
    space.for_tokens(controller_hidden_, rank, false);
    space.for_workers(own_controller_integers_, CHUNK * controller_hidden_.stride, false);
    space.for_workers(own_controller_scales_, CHUNK, false);
}

// This worker's part of the controller.
void SparseFeedForward::plan_ahead(Pass& pass, const Block& block, int64_t layer_idx) const {
    const sparsecli_shape& s = pass.shape;
    if (!pass.model.chooses(layer_idx)) return;
    const Matrix &first = block.controller_first, &second = block.controller_second;
    const Range ranks = pass.mine(s.rank, 4), blocks = pass.mine(s.d_ff / s.block_size, 1);
    const int64_t row = round_up(first.cols, PAD) * type_bytes(first.type);
    const int64_t bytes = pass.model.padded_block() * pass.model.padded_rank() * type_bytes(second.type);
    if (first.cols <= SPAN)
        pass.ahead.add((const char*)first.data + ranks.begin * row, (ranks.end - ranks.begin) * row);
    pass.ahead.add((const char*)second.data + blocks.begin * bytes, (blocks.end - blocks.begin) * bytes);
}

void SparseFeedForward::activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    const sparsecli_shape& s = pass.shape;
    const Range blocks = pass.mine(s.d_ff / s.block_size, 1);
    const int64_t k = pass.model.chosen_in_block(layer_idx), tokens = pass.count();
    if (pass.model.chooses(layer_idx))
        choose(pass, block, blocks, k, x);
    else
        for (int64_t t = 0; t < tokens; ++t)
            std::iota(chosen_.units.row(t) + blocks.begin * k, chosen_.units.row(t) + blocks.end * k,
                      int32_t(blocks.begin * k));
    pass.mark(CONTROLLER);
    for (int64_t t = 0; s.units_on_disk && t < tokens; ++t)
        chosen_.read_ahead(pass, block, t, blocks.begin * k, blocks.end * k);
    const int64_t step = pass.single() ? blocks.end - blocks.begin : BLOCKS_AT_ONCE;
    for (int64_t first = blocks.begin; first < blocks.end; first += step) {
        const int64_t begin = first * k, end = std::min(first + step, blocks.end) * k;
        for (int64_t t = 0; t < tokens; ++t) {
            chosen_.activate(pass, block, values(block.unit_bias), t, begin, end, Pass::row_of(x, t));
            for (int64_t i = begin; s.probability_gate && i < end; ++i)
                chosen_.hidden.row(t)[i] *= probabilities_.row(t)[i];
        }
    }
    pass.count_units(layer_idx, tokens * (blocks.end - blocks.begin) * k);
    pass.barrier(UNIT_DOTS);
}

// What the controller chooses of this worker's blocks.
void SparseFeedForward::choose(Pass& pass, const Block& block, Range blocks, int64_t k, const Activations& x) {
    const int64_t tokens = pass.count(), stride = controller_hidden_.stride;
    const Range ranks = pass.mine(pass.shape.rank, 4);  // rows are computed four at a time
    pass.linear(block.controller_first, nullptr, ranks, x, tokens, controller_hidden_.row(0), stride);
    pass.barrier(CONTROLLER);
    Activations z{controller_hidden_.row(0), nullptr, nullptr, stride, nullptr};
    if (block.controller_second.type == INT8) {  // z is small: every worker quantises it for itself
        float* scales = own_controller_scales_.row(pass.worker);
        int16_t* integers = own_controller_integers_.row(pass.worker);
        for (int64_t t = 0; t < tokens; ++t)
            scales[t] = pass.ops.quantise(controller_hidden_.row(t), stride, integers + t * stride, nullptr);
        z.integers = integers;
        z.scales = scales;
    }
    const Choice choice{pass.shape.block_size, k, pass.model.padded_rank(), pass.model.padded_block()};
    float* probabilities = pass.shape.probability_gate ? probabilities_.row(0) : nullptr;
    pass.ops.choose(block.controller_second, values(block.controller_bias), choice, blocks.begin, blocks.end, z, tokens,
                    chosen_.units.row(0), probabilities, chosen_.units.stride, block.units, pass.model.parts());
}

void SparseFeedForward::add_sum(Pass& pass, const Block& block, int64_t layer_idx) {
    chosen_.add_all(pass, block, pass.model.chosen_units(layer_idx),
                    BLOCKS_AT_ONCE * pass.model.chosen_in_block(layer_idx));
    pass.barrier(UNIT_SUMS);
}

}  // namespace sparsecli
