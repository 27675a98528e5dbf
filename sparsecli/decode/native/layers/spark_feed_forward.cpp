#include "layers/spark_feed_forward.h"

namespace sparsecli {

constexpr int64_t UNITS_AT_ONCE = 64;  // whose rows many tokens share while they are cached

SparkFeedForward::SparkFeedForward(Workspace& space) : chosen_(space) {
    const int64_t others = space.shape.d_model - space.shape.rank;
    space.reads(others);
    space.for_tokens(scores_, space.shape.d_ff, false);
    space.for_tokens(above_, space.shape.d_ff, false);
    space.for_tokens(thresholds_, 1, false);
    space.for_tokens(other_inputs_, others, false);
    space.for_workers(own_inputs_, others, false);
    space.for_tokens(found_units_, space.pool.threads(), false);
}

// This worker's part of the predictor.
void SparkFeedForward::plan_ahead(Pass& pass, const Block& block, int64_t) const {
    const Matrix& w = block.predictor;
    const int64_t row = round_up(w.cols, PAD) * type_bytes(w.type);
    const Range units = my_units(pass, pass.worker);
    if (w.cols <= SPAN) pass.ahead.add((const char*)w.data + units.begin * row, (units.end - units.begin) * row);
}

void SparkFeedForward::activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    const Range units = my_units(pass, pass.worker);
    const int64_t tokens = pass.count();
    pass.linear(block.predictor, nullptr, units, x, tokens, scores_.row(0), scores_.stride);
    pass.barrier(CONTROLLER);
    // The scores of all workers make the threshold. Of a single token each computes it for itself.
    const Range mine = pass.single() ? Range{0, 0} : pass.mine(tokens, 1);
    for (int64_t t = mine.begin; t < mine.end; ++t) *thresholds_.row(t) = threshold_of(pass, scores_.row(t));
    const float threshold = pass.single() ? threshold_of(pass, scores_.row(0)) : 0;
    const Activations others = other_inputs(pass, x);  // with many tokens, a barrier
    const auto found = [&](int64_t t) -> int64_t& { return found_units_.row(t)[pass.worker]; };
    for (int64_t t = 0; t < tokens; ++t) found(t) = 0;
    const int64_t step = pass.single() ? units.end - units.begin : UNITS_AT_ONCE;
    for (int64_t first = units.begin; first < units.end; first += step)
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t begin = units.begin + found(t);
            const Range piece = {first, std::min(first + step, units.end)};
            const int64_t end = choose(t, pass.single() ? threshold : *thresholds_.row(t), piece, begin);
            found(t) = end - units.begin;
            if (pass.single()) pass.mark(CONTROLLER);
            if (pass.shape.units_on_disk) {
                chosen_.read_ahead(block.unit_inputs, 1, t, begin, end);
                chosen_.read_ahead(block.units, 1, t, begin, end);
            }
            pass.ops.row_dots(block.unit_inputs, chosen_.units.row(t), begin, end, Pass::row_of(others, t),
                              pass.single(), chosen_.hidden.row(t));
        }
    for (int64_t t = 0; t < tokens; ++t) {
        // All lanes, so that a unit's result does not depend on how units are shared out.
        pass.ops.activate(pass.shape.activation, above_.row(t) + units.begin, chosen_.hidden.row(t) + units.begin,
                          round_up(found(t), LANES));
        pass.count_units(layer_idx, found(t));
    }
    pass.barrier(UNIT_DOTS);
}

void SparkFeedForward::add_sum(Pass& pass, const Block& block, int64_t) {
    chosen_.add_found(pass, block, found_units_, [&](int64_t worker) { return my_units(pass, worker).begin; });
    pass.barrier(UNIT_SUMS);
}

// The mean of all scores plus some of their standard deviations, with sums over fixed lanes.
float SparkFeedForward::threshold_of(const Pass& pass, const float* scores) const {
    const int64_t units = pass.shape.d_ff;
    const auto sum = [&](const auto& of) {
        float lanes[LANES] = {};
        const int64_t whole = units / LANES * LANES;
        for (int64_t u = 0; u < whole; u += LANES)
            for (int64_t i = 0; i < LANES; ++i) lanes[i] += of(scores[u + i]);
        double total = 0;
        for (int64_t u = whole; u < units; ++u) total += of(scores[u]);
        for (const float lane : lanes) total += lane;
        return total;
    };
    const float mean = float(sum([](float score) { return score; }) / double(units));
    const double squares = sum([mean](float score) { return (score - mean) * (score - mean); });
    const double deviation = units > 1 ? std::sqrt(squares / double(units - 1)) : 0;
    return float(mean + pass.shape.unit_quantile * deviation);
}

// The inputs behind those of the predictor, for all tokens.
Activations SparkFeedForward::other_inputs(Pass& pass, const Activations& x) const {
    const int64_t first = pass.shape.rank, others = pass.shape.d_model - first;
    if (pass.single()) {
        std::copy_n(x.values + first, others, own_inputs_.row(pass.worker));
        return pass.quantized(own_inputs_);
    }
    const Range mine = pass.mine(pass.count(), 1);
    for (int64_t t = mine.begin; t < mine.end; ++t)
        std::copy_n(Pass::row_of(x, t).values + first, others, other_inputs_.row(t));
    return pass.readable(other_inputs_);
}

// Appends units of a piece that are above the threshold, and how far, to a token's list; returns its new end.
int64_t SparkFeedForward::choose(int64_t t, float threshold, Range piece, int64_t end) const {
    const float* scores = scores_.row(t);
    float* to = above_.row(t);
    int32_t* units = chosen_.units.row(t);
    for (int64_t u = piece.begin; u < piece.end; ++u) {
        to[end] = scores[u] - threshold;  // the list ends at u at the latest
        units[end] = int32_t(u);
        end += to[end] > 0;
    }
    return end;
}

}  // namespace sparsecli
