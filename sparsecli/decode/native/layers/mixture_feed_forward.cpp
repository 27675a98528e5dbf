#include "layers/mixture_feed_forward.h"

namespace sparsecli {

MixtureFeedForward::MixtureFeedForward(Workspace& space) : chosen_(space) {
    space.for_workers(own_router_scores_, space.shape.rank, false);
    space.for_workers(own_scaled_input_, space.shape.d_model, false);
}

// Every worker computes the router for itself, and its part of each expert's units.
void MixtureFeedForward::activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    const sparsecli_shape& s = pass.shape;
    const int64_t experts = s.rank, size = s.block_size, k = pass.model.chosen_in_block(layer_idx);
    const Range units = pass.mine(size, LANES);
    float* scores = own_router_scores_.row(pass.worker);
    for (int64_t t = 0; t < pass.count(); ++t) {
        const Activations x_of_t = Pass::row_of(x, t);
        pass.linear(block.router, nullptr, {0, experts}, x_of_t, 1, scores, experts);
        float top = scores[0], total = 0;
        for (int64_t e = 1; e < experts; ++e) top = std::max(top, scores[e]);
        for (int64_t e = 0; e < experts; ++e) total += std::exp(scores[e] - top);
        for (int64_t choice = 0; choice < k; ++choice) {
            int64_t best = 0;
            for (int64_t e = 1; e < experts; ++e)
                if (scores[e] > scores[best]) best = e;
            const float probability = s.probability_gate ? std::exp(scores[best] - top) / total : 1;
            const int64_t begin = choice * size + units.begin, end = choice * size + units.end;
            for (int64_t i = begin; i < end; ++i) chosen_.units.row(t)[i] = int32_t(best * size + i - choice * size);
            if (s.units_on_disk) chosen_.read_ahead(pass, block, t, begin, end);
            activate_expert(pass, block, x_of_t, probability, t, begin, end);
            pass.count_units(layer_idx, end - begin);
            scores[best] = -INFINITY;
        }
    }
    pass.barrier(UNIT_DOTS);
}

// The router's probability enters before the activation function.
void MixtureFeedForward::activate_expert(Pass& pass, const Block& block, const Activations& x, float probability,
                                         int64_t t, int64_t begin, int64_t end) {
    Activations input = x;
    if (probability != 1) {
        float* scaled = own_scaled_input_.row(pass.worker);
        for (int64_t i = 0; i < own_scaled_input_.stride; ++i) scaled[i] = x.values[i] * probability;
        input = pass.quantized(own_scaled_input_);
    }
    chosen_.activate(pass, block, nullptr, t, begin, end, input);
}

void MixtureFeedForward::add_sum(Pass& pass, const Block& block, int64_t layer_idx) {
    chosen_.add_all(pass, block, pass.model.chosen_units(layer_idx), BLOCKS_AT_ONCE);
    pass.barrier(UNIT_SUMS);
}

}  // namespace sparsecli
