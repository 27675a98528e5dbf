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

// Whether a unit is used by few tokens of the pass, 8 on average at most: its rows then come from memory, not from those
// caches that a short list of units fits into.
bool SparseFeedForward::scattered(const Pass& pass, int64_t k) {
    return pass.single() || pass.count() * k <= 8 * pass.shape.block_size;
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
    const bool chooses = pass.model.chooses(layer_idx);
    const Activations z = chooses ? hidden(pass, block, x) : Activations{};
    const auto choose = [&](Range part) {
        if (chooses)
            choose_units(pass, block, part, k, z);
        else
            for (int64_t t = 0; t < tokens; ++t)
                std::iota(chosen_.units.row(t) + part.begin * k, chosen_.units.row(t) + part.end * k,
                          int32_t(part.begin * k));
        for (int64_t t = 0; s.units_on_disk && t < tokens; ++t)
            chosen_.read_ahead(pass, block, t, part.begin * k, part.end * k);
        pass.mark(CONTROLLER);
    };
    if (s.units_on_disk) choose(blocks);  // the disk reads all of them at the same time
    const int64_t step = pass.single() ? blocks.end - blocks.begin : BLOCKS_AT_ONCE;
    Range arriving{blocks.begin, blocks.begin};  // their rows arrive while the next units are chosen
    while (arriving.begin < blocks.end) {
        const Range next{arriving.end, std::min(arriving.end + step, blocks.end)};
        if (!s.units_on_disk && next.begin < next.end) choose(next);
        for (int64_t t = 0; t < tokens; ++t) compute_units(pass, block, t, arriving.begin * k, arriving.end * k, x);
        pass.mark(UNIT_DOTS);
        arriving = next;
    }
    pass.count_units(layer_idx, tokens * (blocks.end - blocks.begin) * k);
    pass.barrier(UNIT_DOTS);
}

// Entries [begin, end) of a token's list.
void SparseFeedForward::compute_units(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end,
                                      const Activations& x) {
    chosen_.activate(pass, block, values(block.unit_bias), t, begin, end, Pass::row_of(x, t));
    for (int64_t i = begin; pass.shape.probability_gate && i < end; ++i)
        chosen_.hidden.row(t)[i] *= probabilities_.row(t)[i];
}

// The controller's first factor, for all workers.
Activations SparseFeedForward::hidden(Pass& pass, const Block& block, const Activations& x) {
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
    return z;
}

// What the controller chooses of some blocks.
void SparseFeedForward::choose_units(const Pass& pass, const Block& block, Range blocks, int64_t k,
                                     const Activations& z) {
    const Choice choice{pass.shape.block_size, k, pass.model.padded_rank(), pass.model.padded_block()};
    float* probabilities = pass.shape.probability_gate ? probabilities_.row(0) : nullptr;
    pass.ops.choose(block.controller_second, values(block.controller_bias), choice, blocks.begin, blocks.end, z,
                    pass.count(), chosen_.units.row(0), probabilities, chosen_.units.stride, block.units,
                    pass.model.parts(), scattered(pass, k));
}

void SparseFeedForward::add_sum(Pass& pass, const Block& block, int64_t layer_idx) {
    const int64_t count = pass.model.chosen_units(layer_idx), k = pass.model.chosen_in_block(layer_idx);
    const bool whole = scattered(pass, k);  // long lists are prefetched further ahead
    chosen_.add_all(pass, block, count, whole ? count : BLOCKS_AT_ONCE * k);
    pass.barrier(UNIT_SUMS);
}

}  // namespace sparsecli
