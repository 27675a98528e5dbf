#include "layers/quantized_feed_forward.h"

#include <numeric>

namespace sparsecli {

constexpr int64_t UNITS_AT_ONCE = 64;  // at least: read from the sketch, then chosen from

// -- the sketch ----------------------------------------------------------------------------------------------

Sketch::Sketch(Workspace& space) {
    space.for_tokens(products, space.model.padded_units() * space.model.inward(), true);
}

Range Sketch::my_units(const Pass& pass, int64_t worker) {
    return share(pass.shape.d_ff, pass.model.whole_blocks(), worker, pass.workers());
}

template <class F>
void Sketch::each_piece(const Pass& pass, Range units, const F& body) {
    const int64_t step = round_up(UNITS_AT_ONCE, pass.model.whole_blocks());
    for (int64_t first = units.begin; first < units.end; first += step) body(first, std::min(first + step, units.end));
}

void Sketch::read(const Pass& pass, const Block& block, int64_t first, int64_t last, const Activations& x,
                  const Buffer<float>& hidden) const {
    const int64_t inward = pass.model.inward();
    const float* bias = values(block.unit_bias);
    pass.linear(block.sketch, nullptr, {first * inward, round_up(last, LANES) * inward}, x, pass.count(),
                products.row(0), products.stride);
    for (int64_t t = 0; t < pass.count(); ++t)
        for (int64_t u = first; u < last; u += LANES) {
            const int64_t held = std::min(LANES, last - u);
            float *gate = products.row(t) + u * inward, *h = hidden.row(t) + u;
            for (int64_t i = 0; bias && i < held; ++i) gate[i] += bias[u + i];
            std::memcpy(h, gate + (inward - 1) * LANES, size_t(held) * sizeof(float));
            pass.ops.activate(pass.shape.activation, inward == 2 ? gate : nullptr, h, held);
        }
}

void Sketch::choose(const Pass& pass, const Block& block, int64_t k, int64_t first, int64_t last, const float* hidden,
                    int32_t* chosen) {
    const int64_t size = pass.shape.block_size;
    const float* importance = values(block.importance);
    float scores[MAX_BLOCK];
    for (int64_t start = first; start < last; start += size) {
        int32_t* to = chosen + start / size * k;
        if (k == size) {
            std::iota(to, to + size, int32_t(start));
            continue;
        }
        for (int64_t i = 0; i < size; ++i) {
            const float score = std::fabs(hidden[start + i]) * importance[start + i];
            scores[i] = score > 0 ? score : 0;  // no NaN
        }
        for (int64_t j = 0; j < k; ++j) {
            int64_t best = 0;
            for (int64_t i = 1; i < size; ++i)
                if (scores[i] > scores[best]) best = i;
            to[j] = int32_t(start + best);
            scores[best] = -1;
        }
    }
}

// -- selector ------------------------------------------------------------------------------------------------

SelectorFeedForward::SelectorFeedForward(Workspace& space) : sketch_(space), chosen_(space) {
    const int64_t rank = space.model.padded_rank();
    space.reads(rank);
    space.for_tokens(estimates_, space.shape.d_ff, true);
    space.for_tokens(bypass_hidden_, rank, false);
    space.for_tokens(positive_units_, space.shape.positive ? space.pool.threads() : 0, false);
}

void SelectorFeedForward::activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    if (pass.shape.rank) pass.linear(block.bypass_first, x, bypass_hidden_);
    if (pass.shape.positive)
        activate_positive(pass, block, layer_idx, x);
    else
        activate_best(pass, block, layer_idx, x);
    pass.barrier(UNIT_DOTS);
}

void SelectorFeedForward::activate_best(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    const int64_t size = pass.shape.block_size, k = pass.model.chosen_in_block(layer_idx);
    const Range units = Sketch::my_units(pass, pass.worker);
    Sketch::each_piece(pass, units, [&](int64_t first, int64_t last) {
        const int64_t begin = first / size * k, end = last / size * k;
        if (k < size) sketch_.read(pass, block, first, last, x, estimates_);
        for (int64_t t = 0; t < pass.count(); ++t) {
            Sketch::choose(pass, block, k, first, last, estimates_.row(t), chosen_.units.row(t));
            prefetch(pass, block, t, begin, end);
            if (!pass.single()) activate_units(pass, block, t, begin, end, x);
        }
    });
    pass.mark(CONTROLLER);
    const int64_t begin = units.begin / size * k, end = units.end / size * k;
    if (pass.single()) activate_units(pass, block, 0, begin, end, x);
    pass.count_units(layer_idx, pass.count() * (end - begin));
}

// A worker's list of what it finds begins at the index of its first unit.
void SelectorFeedForward::activate_positive(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    const float* threshold = values(block.threshold);
    const Range units = Sketch::my_units(pass, pass.worker);
    const auto found = [&](int64_t t) -> int64_t& { return positive_units_.row(t)[pass.worker]; };
    for (int64_t t = 0; t < pass.count(); ++t) found(t) = 0;
    Sketch::each_piece(pass, units, [&](int64_t first, int64_t last) {
        sketch_.read(pass, block, first, last, x, estimates_);
        for (int64_t t = 0; t < pass.count(); ++t) {
            const int64_t begin = units.begin + found(t);
            int64_t end = begin;
            for (int64_t u = first; u < last; ++u)
                if (sketch_.products.row(t)[u] > threshold[u]) chosen_.units.row(t)[end++] = int32_t(u);
            found(t) = end - units.begin;
            pass.count_units(layer_idx, end - begin);
            prefetch(pass, block, t, begin, end);
            if (!pass.single()) activate_units(pass, block, t, begin, end, x);
        }
    });
    pass.mark(CONTROLLER);
    if (pass.single()) activate_units(pass, block, 0, units.begin, units.begin + found(0), x);
}

void SelectorFeedForward::activate_units(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end,
                                         const Activations& x) const {
    chosen_.activate(pass, block, values(block.unit_bias), t, begin, end, Pass::row_of(x, t));
}

// The rows of units that were just chosen and meet the input soon. Many tokens read them at once.
void SelectorFeedForward::prefetch(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end) const {
    if (pass.shape.units_on_disk) return chosen_.read_ahead(pass, block, t, begin, end);
    const int64_t row = round_up(block.units.cols, PAD) * type_bytes(block.units.type);
    for (int64_t i = begin; pass.single() && i < end; ++i)
        pass.ops.prefetch((const char*)block.units.data + chosen_.units.row(0)[i] * pass.model.parts() * row,
                          pass.model.inward() * row);
}

void SelectorFeedForward::add_sum(Pass& pass, const Block& block, int64_t layer_idx) {
    if (pass.shape.rank) add_bypass(pass, block);
    if (pass.shape.positive)
        chosen_.add_found(pass, block, positive_units_,
                          [&](int64_t worker) { return Sketch::my_units(pass, worker).begin; });
    else
        chosen_.add_all(pass, block, pass.model.chosen_units(layer_idx),
                        BLOCKS_AT_ONCE * pass.model.chosen_in_block(layer_idx));
    pass.barrier(UNIT_SUMS);
}

void SelectorFeedForward::add_bypass(Pass& pass, const Block& block) {
    const Activations z = pass.readable(bypass_hidden_);
    pass.add_to_residual(pass.space.layer_output, pass.linear(block.bypass_second, z, pass.space.layer_output));
    if (!pass.single()) pass.barrier(UNIT_SUMS);  // units are then summed up by tokens, not by columns
}

// -- precision -----------------------------------------------------------------------------------------------

PrecisionFeedForward::PrecisionFeedForward(Workspace& space) : base_(space) {
    int64_t most = 0;
    for (int64_t layer_idx = 0; layer_idx < space.shape.layers; ++layer_idx)
        most = std::max(most, space.model.chosen_units(layer_idx));
    space.reads(space.shape.d_ff);
    space.for_tokens(hidden_, space.shape.d_ff, false);
    space.for_tokens(chosen_units_, most, false);
}

void PrecisionFeedForward::activate(Pass& pass, const Block& block, int64_t layer_idx, const Activations& x) {
    const int64_t size = pass.shape.block_size, k = pass.model.chosen_in_block(layer_idx), d = pass.shape.d_model;
    const int64_t inward_bytes = pass.model.inward() * residual_row(d), unit = residual_unit(d, pass.model.parts());
    const char* residual = (const char*)block.residual.data;
    const Range units = Sketch::my_units(pass, pass.worker);
    Sketch::each_piece(pass, units, [&](int64_t first, int64_t last) {
        base_.read(pass, block, first, last, x, hidden_);
        const int64_t begin = first / size * k, end = last / size * k;
        for (int64_t t = 0; k && t < pass.count(); ++t) {
            Sketch::choose(pass, block, k, first, last, hidden_.row(t), chosen_units_.row(t));
            if (!pass.single()) refine(pass, block, begin, end, x, t);
            for (int64_t i = begin; pass.single() && i < end; ++i)
                pass.ops.prefetch(residual + chosen_units_.row(t)[i] * unit, inward_bytes);
        }
    });
    pass.mark(DENSE_FF);
    const int64_t begin = units.begin / size * k, end = units.end / size * k;
    if (pass.single()) refine(pass, block, begin, end, x, 0);
    pass.count_units(layer_idx, pass.count() * (end - begin));
    pass.barrier(UNIT_DOTS);
}

void PrecisionFeedForward::add_sum(Pass& pass, const Block& block, int64_t layer_idx) {
    const int64_t d = pass.shape.d_model, chosen = pass.model.chosen_units(layer_idx);
    const int64_t row = residual_row(d), unit = residual_unit(d, pass.model.parts());
    const Range columns = pass.mine(d, LANES);
    for (int64_t i = 0; pass.single() && i < chosen; ++i) {
        const char* down =
            (const char*)block.residual.data + chosen_units_.row(0)[i] * unit + pass.model.inward() * row;
        const int64_t first = columns.begin / QUANT_GROUP, last = groups_of(columns.end), width = QUANT_GROUP / 2;
        pass.ops.prefetch(down + first * width, (last - first) * width);
        pass.ops.prefetch(down + groups_of(d) * width, row - groups_of(d) * width);  // the scales
    }
    const Activations hidden = pass.readable(hidden_);
    const Buffer<float>& output = pass.space.layer_output;
    pass.linear(block.base_down, values(block.bias), columns, hidden, pass.count(), output.row(0), output.stride);
    pass.mark(DENSE_FF);
    for (int64_t t = 0; t < pass.count(); ++t)
        pass.ops.residual_sums(block.residual, pass.model.parts(), chosen_units_.row(t), hidden_.row(t), chosen,
                               columns.begin, columns.end, output.row(t));
    pass.add_to_residual(output, columns);
    pass.barrier(UNIT_SUMS);
}

// Chosen units [begin, end) of one token again, base and residual.
void PrecisionFeedForward::refine(const Pass& pass, const Block& block, int64_t begin, int64_t end,
                                  const Activations& x, int64_t t) const {
    const int64_t inward = pass.model.inward();
    for (int64_t first = begin; first < end; first += LANES) {
        const int64_t held = std::min(LANES, end - first);
        const int32_t* units = chosen_units_.row(t) + first;
        float more[2 * LANES], gate[LANES] = {}, h[LANES] = {};
        pass.ops.residual_dots(block.residual, pass.model.parts(), units, held, Pass::row_of(x, t), more);
        for (int64_t i = 0; i < held; ++i) {
            const float* base = base_.products.row(t) + units[i] / LANES * LANES * inward + units[i] % LANES;
            gate[i] = base[0] + more[i * inward];
            h[i] = inward == 2 ? base[LANES] + more[i * inward + 1] : gate[i];
        }
        // All lanes, so that a unit's result does not depend on how units are shared out.
        pass.ops.activate(pass.shape.activation, inward == 2 ? gate : nullptr, h, LANES);
        for (int64_t i = 0; i < held; ++i) hidden_.row(t)[units[i]] = h[i];
    }
}

}  // namespace sparsecli
