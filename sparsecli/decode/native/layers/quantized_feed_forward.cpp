// Feed-forward layers that read all their units in few bits: to choose those that are computed exactly (selector), or to
// compute all of them, and the chosen ones with more bits (precision).
#include <numeric>

#include "layers/forward.h"

namespace sparsecli {

constexpr int64_t UNITS_AT_ONCE = 64;  // at least: read in few bits, then chosen from

// This worker's units: whole blocks and whole panels.
Range Forward::copied_units(int64_t worker) const { return mine(shape_.d_ff, model_.whole_blocks(), worker); }

// Calls body(first, last) for pieces of `units`, whole blocks and panels each.
template <class F>
void Forward::each_piece(Range units, const F& body) const {
    const int64_t step = round_up(UNITS_AT_ONCE, model_.whole_blocks());
    for (int64_t first = units.begin; first < units.end; first += step) body(first, std::min(first + step, units.end));
}

// Units [first, last) in few bits: what enters their activations into `pairs_`, what they give into `h`.
void Forward::read_copy(const Block& block, int64_t first, int64_t last, const Activations& x, Buffer<float>& h) {
    const int64_t inward = model_.inward();
    const float* bias = values(block.unit_bias);
    k_.matmul(block.copy, first * inward, round_up(last, LANES) * inward, x, count(), pairs_.row(0), pair_stride_);
    for (int64_t t = 0; t < count(); ++t)
        for (int64_t u = first; u < last; u += LANES) {
            const int64_t held = std::min(LANES, last - u);
            float* before = pairs_.row(t) + u * inward;
            for (int64_t i = 0; bias && i < held; ++i) before[i] += bias[u + i];
            std::memcpy(h.row(t) + u, before + (inward - 1) * LANES, size_t(held) * sizeof(float));
            k_.activate(shape_.activation, inward == 2 ? before : nullptr, h.row(t) + u, held);
        }
}

// The k best units of each block of [first, last), for what they give: the largest |h| * importance, best first.
void Forward::choose_best(const Block& block, int64_t layer, int64_t first, int64_t last, const float* h,
                          int32_t* chosen) const {
    const int64_t size = shape_.block_size, k = model_.chosen_in_block(layer);
    const float* importance = values(block.importance);
    float scores[MAX_BLOCK];
    for (int64_t start = first; start < last; start += size) {
        int32_t* to = chosen + start / size * k;
        if (k == size) {
            std::iota(to, to + size, int32_t(start));
            continue;
        }
        for (int64_t i = 0; i < size; ++i) {
            const float score = std::fabs(h[start + i]) * importance[start + i];
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

void Forward::selected_units(const Block& block, int64_t layer, const Activations& x, int64_t worker) {
    if (shape_.rank) linear(block.bypass_first, x, z_.row(0), z_stride_, worker);
    const Range units = copied_units(worker);
    if (shape_.positive) return positive_units(block, layer, x, units, worker);
    const int64_t size = shape_.block_size, k = model_.chosen_in_block(layer);
    each_piece(units, [&](int64_t first, int64_t last) {
        if (k < size) read_copy(block, first, last, x, estimates_);
        for (int64_t t = 0; t < count(); ++t) {
            choose_best(block, layer, first, last, estimates_.row(t), chosen_.row(t));
            fetch_units(block, t, first / size * k, last / size * k);
            if (count() > 1) use_units(block, first / size * k, last / size * k, x, t);
        }
    });
    mark(worker, CONTROLLER);
    if (count() == 1) use_units(block, units.begin / size * k, units.end / size * k, x, 0);
    workers_[size_t(worker)].used[size_t(layer)] += count() * (units.end - units.begin) / size * k;
}

// Units whose estimate lies above their threshold. They are listed from the beginning of this worker's units on.
void Forward::positive_units(const Block& block, int64_t layer, const Activations& x, Range units, int64_t worker) {
    const float* threshold = values(block.threshold);
    for (int64_t t = 0; t < count(); ++t) found_.row(t)[worker] = 0;
    each_piece(units, [&](int64_t first, int64_t last) {
        read_copy(block, first, last, x, estimates_);
        for (int64_t t = 0; t < count(); ++t) {
            const int64_t begin = units.begin + found_.row(t)[worker];
            int64_t end = begin;
            for (int64_t u = first; u < last; ++u)
                if (pairs_.row(t)[u] > threshold[u]) chosen_.row(t)[end++] = int32_t(u);
            found_.row(t)[worker] = end - units.begin;
            workers_[size_t(worker)].used[size_t(layer)] += end - begin;
            fetch_units(block, t, begin, end);
            if (count() > 1) use_units(block, begin, end, x, t);
        }
    });
    mark(worker, CONTROLLER);
    if (count() == 1) use_units(block, units.begin, units.begin + found_.row(0)[worker], x, 0);
}

// Asks for the rows of units that were just chosen and meet the input soon; those of many tokens are used at once.
void Forward::fetch_units(const Block& block, int64_t t, int64_t begin, int64_t end) const {
    if (shape_.units_on_disk) return read_ahead(block, t, begin, end);
    const int64_t row = round_up(block.units.cols, PAD) * type_bytes(block.units.type);
    for (int64_t i = begin; count() == 1 && i < end; ++i)
        k_.fetch((const char*)block.units.data + chosen_.row(0)[i] * model_.parts() * row, model_.inward() * row);
}

// What stands in for the units that were left out, into this worker's columns of the residual.
void Forward::add_bypass(const Block& block, int64_t worker) {
    const Activations z = readable(z_, z_stride_, worker);
    add_to_residual(y_, linear(block.bypass_second, z, y_.row(0), d_stride_, worker), worker);
    if (count() > 1) barrier(worker, UNIT_SUMS);  // units are then summed up row by row, not by columns
}

// -- precision -----------------------------------------------------------------------------------------------

void Forward::precise_feed_forward(const Block& block, int64_t layer, const Activations& x, int64_t worker) {
    const int64_t size = shape_.block_size, k = model_.chosen_in_block(layer), d = shape_.d_model;
    const int64_t row = residual_row(d), unit = residual_unit(d, model_.parts());
    const char* residual = (const char*)block.residual.data;
    const Range units = copied_units(worker);
    each_piece(units, [&](int64_t first, int64_t last) {
        read_copy(block, first, last, x, h_);
        if (!k) return;
        const int64_t begin = first / size * k, end = last / size * k;
        for (int64_t t = 0; t < count(); ++t) {
            choose_best(block, layer, first, last, h_.row(t), chosen_.row(t));
            if (count() > 1) promote(block, begin, end, x, t);
            for (int64_t i = begin; count() == 1 && i < end; ++i)
                k_.fetch(residual + chosen_.row(t)[i] * unit, model_.inward() * row);
        }
    });
    mark(worker, DENSE_FF);
    const int64_t chosen = shape_.d_ff / size * k;
    if (count() == 1) promote(block, units.begin / size * k, units.end / size * k, x, 0);
    workers_[size_t(worker)].used[size_t(layer)] += count() * (units.end - units.begin) / size * k;
    barrier(worker, UNIT_DOTS);
    if (shape_.recurrent_layers) leave_recurrence(block.recurrence, layer, worker);

    const Range columns = mine(d, LANES, worker);
    for (int64_t i = 0; count() == 1 && i < chosen; ++i) {
        const char* down = residual + chosen_.row(0)[i] * unit + model_.inward() * row;
        const int64_t first = columns.begin / LOW_BIT_GROUP, last = groups_of(columns.end), width = LOW_BIT_GROUP / 2;
        k_.fetch(down + first * width, (last - first) * width);
        k_.fetch(down + groups_of(d) * width, row - groups_of(d) * width);  // the scales
    }
    const Activations h = readable(h_, h_stride_, worker);
    dense(block.base_down, values(block.bias), columns, h, count(), y_.row(0), d_stride_);
    mark(worker, DENSE_FF);
    for (int64_t t = 0; t < count(); ++t)
        k_.residual_sums(block.residual, model_.parts(), chosen_.row(t), h_.row(t), chosen, columns.begin, columns.end,
                         y_.row(t));
    add_to_residual(y_, columns, worker);
    barrier(worker, UNIT_SUMS);
}

// Chosen units [begin, end) of one row again, with what rounding had left out.
void Forward::promote(const Block& block, int64_t begin, int64_t end, const Activations& x, int64_t t) {
    const int64_t inward = model_.inward();
    for (int64_t first = begin; first < end; first += LANES) {
        const int64_t held = std::min(LANES, end - first);
        const int32_t* units = chosen_.row(t) + first;
        float more[2 * LANES], gate[LANES] = {}, h[LANES] = {};
        k_.residual_dots(block.residual, model_.parts(), units, held, row_of(x, t), more);
        for (int64_t i = 0; i < held; ++i) {
            const float* before = pairs_.row(t) + units[i] / LANES * LANES * inward + units[i] % LANES;
            gate[i] = before[0] + more[i * inward];
            h[i] = inward == 2 ? before[LANES] + more[i * inward + 1] : gate[i];
        }
        k_.activate(shape_.activation, inward == 2 ? gate : nullptr, h,
                    LANES);  // all alike, however units are shared out
        for (int64_t i = 0; i < held; ++i) h_.row(t)[units[i]] = h[i];
    }
}

}  // namespace sparsecli
