#include "layers/mixture_feed_forward.h"

#include <algorithm>

namespace sparsecli {

constexpr int64_t UNITS_AT_ONCE = 32;  // of an expert, that many tokens share while they are cached

MixtureFeedForward::MixtureFeedForward(Workspace& space) : chosen_(space) {
    const int64_t k = space.model.chosen_in_block(0), experts = space.shape.rank;  // k is the same in all layers
    space.for_tokens(experts_, k, false);
    space.for_workers(own_experts_, k, false);
    space.for_tokens(probabilities_, k, false);
    space.for_workers(own_probabilities_, k, false);
    space.for_workers(own_entries_, CHUNK * k, false);
    space.for_workers(own_ends_, experts, false);
    space.for_workers(own_router_scores_, experts, false);
    space.for_workers(own_scaled_input_, space.shape.d_model, false);
}

// Every worker computes its part of each expert's units.
void MixtureFeedForward::activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    const sparsecli_shape& s = pass.shape;
    const int64_t size = s.block_size, k = pass.model.chosen_in_block(layer_idx);
    route(pass, block, x, k);
    group(pass, k);
    const Range units = pass.mine(size, LANES);
    const int32_t* entries = own_entries_.row(pass.worker);
    each_expert(pass, [&](int64_t first, int64_t last, int64_t expert) {
        for (int64_t at = first; at < last; ++at) {
            int32_t* list = chosen_.units.row(entries[at] / k) + entries[at] % k * size;
            for (int64_t i = units.begin; i < units.end; ++i) list[i] = int32_t(expert * size + i);
        }
        const int64_t before = entries[first] % k * size;
        if (s.units_on_disk)
            chosen_.read_ahead(pass, block, entries[first] / k, before + units.begin, before + units.end);
        // A token's scaled input is made anew for each piece, so that there is one piece only.
        const bool whole = last - first == 1 || s.probability_gate == GATE_INPUT;
        const int64_t step = whole ? size : UNITS_AT_ONCE;
        for (int64_t begin = units.begin; begin < units.end; begin += step)
            for (int64_t at = first; at < last; ++at)
                activate_expert(pass, block, x, entries[at], k, {begin, std::min(begin + step, units.end)});
        pass.count_units(layer_idx, (last - first) * (units.end - units.begin));
    });
    pass.barrier(UNIT_DOTS);
}

void MixtureFeedForward::route(Pass& pass, const Block& block, const Activations& x, int64_t k) {
    const Range tokens = pass.single() ? Range{0, 1} : pass.mine(pass.count(), 1);
    for (int64_t t = tokens.begin; t < tokens.end; ++t)
        choose_experts(pass, block, Pass::row_of(x, t), k, experts_of(pass, t), probabilities_of(pass, t));
    if (!pass.single()) pass.barrier(CONTROLLER);
    pass.mark(CONTROLLER);
}

// The k experts with the largest scores of one token, in the order of their numbers: a sum over them then does not
// depend on how tokens are grouped.
void MixtureFeedForward::choose_experts(Pass& pass, const Block& block, const Activations& x, int64_t k,
                                        int32_t* experts, float* probabilities) {
    const sparsecli_shape& s = pass.shape;
    const int64_t count = s.rank;
    float* scores = own_router_scores_.row(pass.worker);
    pass.linear(block.router, nullptr, {0, count}, x, 1, scores, count);
    const float top = *std::max_element(scores, scores + count);
    float total = 0, chosen = 0;
    for (int64_t e = 0; e < count; ++e) total += std::exp(scores[e] - top);
    for (int64_t held = 0; held < k; ++held) {
        const int64_t best = std::max_element(scores, scores + count) - scores;
        const float probability = s.probability_gate ? std::exp(scores[best] - top) / total : 1;
        scores[best] = -INFINITY;
        chosen += probability;
        int64_t at = held;
        for (; at > 0 && experts[at - 1] > best; --at) {
            experts[at] = experts[at - 1];
            probabilities[at] = probabilities[at - 1];
        }
        experts[at] = int32_t(best);
        probabilities[at] = probability;
    }
    for (int64_t i = 0; i < k && s.normalized_probabilities; ++i) probabilities[i] /= chosen;
}

// Sorts what the tokens chose by expert; each worker for itself.
void MixtureFeedForward::group(const Pass& pass, int64_t k) {
    int32_t *entries = own_entries_.row(pass.worker), *ends = own_ends_.row(pass.worker);
    const int64_t tokens = pass.count(), experts = pass.shape.rank;
    std::fill_n(ends, experts, 0);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < k; ++i) ++ends[experts_of(pass, t)[i]];
    for (int64_t e = 0, before = 0; e < experts; ++e) {
        const int64_t held = ends[e];
        ends[e] = int32_t(before);  // where they begin, until they are filled in
        before += held;
    }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < k; ++i) entries[ends[experts_of(pass, t)[i]]++] = int32_t(t * k + i);
}

template <class F>
void MixtureFeedForward::each_expert(const Pass& pass, const F& body) const {
    const int32_t* ends = own_ends_.row(pass.worker);
    for (int64_t e = 0, first = 0; e < pass.shape.rank; first = ends[e], ++e)
        if (ends[e] > first) body(first, int64_t(ends[e]), e);
}

// The router's probability enters before the activation function or behind it.
void MixtureFeedForward::activate_expert(Pass& pass, const Block& block, const Activations& x, int64_t entry, int64_t k,
                                         Range units) {
    const int64_t t = entry / k, before = entry % k * pass.shape.block_size;
    const int64_t begin = before + units.begin, end = before + units.end;
    const float probability = probabilities_of(pass, t)[entry % k];
    Activations input = Pass::row_of(x, t);
    if (pass.shape.probability_gate == GATE_INPUT) {
        float* scaled = own_scaled_input_.row(pass.worker);
        for (int64_t i = 0; i < own_scaled_input_.stride; ++i) scaled[i] = input.values[i] * probability;
        input = pass.quantized(own_scaled_input_);
    }
    chosen_.activate(pass, block, nullptr, t, begin, end, input);
    if (pass.shape.probability_gate != GATE_OUTPUT) return;
    for (int64_t i = begin; i < end; ++i) chosen_.hidden.row(t)[i] *= probability;
}

void MixtureFeedForward::add_sum(Pass& pass, const Block& block, int64_t layer_idx) {
    const int64_t size = pass.shape.block_size, k = pass.model.chosen_in_block(layer_idx);
    if (pass.single()) {
        chosen_.add_all(pass, block, k * size, k * size);
    } else {
        const Range columns = pass.mine(pass.shape.d_model, LANES);
        const int32_t* entries = own_entries_.row(pass.worker);
        each_expert(pass, [&](int64_t first, int64_t last, int64_t) {
            for (int64_t begin = 0; begin < size; begin += UNITS_AT_ONCE)
                for (int64_t at = first; at < last; ++at) {
                    const int64_t before = entries[at] % k * size, end = std::min(begin + UNITS_AT_ONCE, size);
                    chosen_.add(pass, block, entries[at] / k, before + begin, before + end, columns);
                }
        });
        for (int64_t t = 0; t < pass.count(); ++t) add_bias(pass, block, t, columns);
    }
    pass.barrier(UNIT_SUMS);
}

}  // namespace sparsecli
