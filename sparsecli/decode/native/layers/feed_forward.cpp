// The feed-forward layer of one block: dense, sparse, or a mixture.
#include <numeric>

#include "layers/forward.h"

namespace sparsecli {

void Forward::feed_forward(const Block& block, int64_t layer, int64_t worker) {
    if (shape_.recurrent_layers && !shape_.parallel) enter_recurrence(block.recurrence, worker);
    const Buffer<float>& aside = count() == 1 ? workers_[size_t(worker)].aside : aside_;
    const Activations x =
        shape_.parallel ? readable(aside, d_stride_, worker) : normalized(block.feed_forward_norm, worker);
    mark(worker, OTHER);
    if (shape_.feed_forward == DENSE_UNITS) return dense_feed_forward(block, layer, x, worker);
    if (model_.promotes()) return precise_feed_forward(block, layer, x, worker);
    if (shape_.feed_forward == SPARSE_UNITS)
        controlled_units(block, layer, x, worker);
    else if (model_.selects())
        selected_units(block, layer, x, worker);
    else
        route(block, layer, x, worker);
    barrier(worker, UNIT_DOTS);
    if (shape_.recurrent_layers) leave_recurrence(block.recurrence, layer, worker);
    if (model_.selects() && shape_.rank) add_bypass(block, worker);
    sum_units(block, layer, worker);
    barrier(worker, UNIT_SUMS);
}

void Forward::dense_feed_forward(const Block& block, int64_t layer, const Activations& x, int64_t worker) {
    const Range units = linear(block.up, x, h_.row(0), h_stride_, worker);
    workers_[size_t(worker)].used[size_t(layer)] += count() * (units.end - units.begin);
    if (shape_.gated) linear(block.gate, x, gate_.row(0), h_stride_, worker);
    for (int64_t t = 0; t < count(); ++t)
        k_.activate(shape_.activation, shape_.gated ? gate_.row(t) + units.begin : nullptr, h_.row(t) + units.begin,
                    units.end - units.begin);
    barrier(worker, DENSE_FF);
    if (shape_.recurrent_layers) leave_recurrence(block.recurrence, layer, worker);
    const Activations h = readable(h_, h_stride_, worker);
    add_to_residual(y_, linear(block.down, h, y_.row(0), d_stride_, worker), worker);
    barrier(worker, DENSE_FF);
}

void Forward::controlled_units(const Block& block, int64_t layer, const Activations& x, int64_t worker) {
    const Range blocks = mine(shape_.d_ff / shape_.block_size, 1, worker);
    const int64_t each_block = model_.chosen_in_block(layer);
    if (model_.chooses(layer))
        choose_units(block, blocks, each_block, x, worker);
    else
        for (int64_t t = 0; t < count(); ++t)
            std::iota(chosen_.row(t) + blocks.begin * each_block, chosen_.row(t) + blocks.end * each_block,
                      int32_t(blocks.begin * each_block));
    mark(worker, CONTROLLER);
    for (int64_t t = 0; shape_.units_on_disk && t < count(); ++t)
        read_ahead(block, t, blocks.begin * each_block, blocks.end * each_block);
    const int64_t step = count() == 1 ? blocks.end - blocks.begin : BLOCKS_AT_ONCE;
    for (int64_t first = blocks.begin; first < blocks.end; first += step) {
        const int64_t begin = first * each_block, end = std::min(first + step, blocks.end) * each_block;
        for (int64_t t = 0; t < count(); ++t) {
            use_units(block, begin, end, x, t);
            for (int64_t i = begin; shape_.probability_gate && i < end; ++i) h_.row(t)[i] *= probabilities_.row(t)[i];
        }
    }
    workers_[size_t(worker)].used[size_t(layer)] += count() * (blocks.end - blocks.begin) * each_block;
}

// What the controller chooses of this worker's blocks.
void Forward::choose_units(const Block& block, Range blocks, int64_t each_block, const Activations& x, int64_t worker) {
    const Range ranks = mine(shape_.rank, 4, worker);  // rows are computed four at a time
    k_.matmul(block.controller_first, ranks.begin, ranks.end, x, count(), z_.row(0), z_stride_);
    barrier(worker, CONTROLLER);
    const Choice choice{shape_.block_size, each_block, model_.padded_rank(), model_.padded_block()};
    float* weights = shape_.probability_gate ? probabilities_.row(0) : nullptr;
    Activations z{z_.row(0), nullptr, nullptr, z_stride_, nullptr};
    Worker& own = workers_[size_t(worker)];
    if (block.controller_second.type == INT8) {  // z is small: every thread quantises it for itself
        const int64_t rows = count();
        float* scales = own.line.row(0);
        int16_t* integers = (int16_t*)own.scratch.row(0);
        for (int64_t t = 0; t < rows; ++t)
            scales[t] = k_.quantise(z_.row(t), z_stride_, integers + t * z_stride_, nullptr);
        z.integers = integers;
        z.scales = scales;
    }
    k_.choose(block.controller_second, values(block.controller_bias), choice, blocks.begin, blocks.end, z, count(),
              chosen_.row(0), weights, h_stride_, block.units, model_.parts());
}

// The chosen units [begin, end) of one row.
void Forward::use_units(const Block& block, int64_t begin, int64_t end, const Activations& x, int64_t t) {
    k_.unit_dots(block.units, model_.parts(), shape_.activation, values(block.unit_bias), chosen_.row(t), begin, end,
                 row_of(x, t), count() == 1, h_.row(t));
}

// Asks the system for all of a layer's chosen rows at once, since a disk would otherwise be waited for row by row; then
// has them mapped in long pieces, which costs less than a page fault for every 4 KiB.
void Forward::read_ahead([[maybe_unused]] const Block& block, [[maybe_unused]] int64_t t,
                         [[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) const {
#if defined(__linux__)
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = model_.parts() * round_up(block.units.cols, PAD) * type_bytes(block.units.type);
    const auto advise = [&](int advice) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = int64_t(block.units.data) + chosen_.row(t)[i] * bytes;
            const int64_t start = first / page * page;
            madvise((void*)start, size_t(first + bytes - start), advice);
        }
    };
    advise(MADV_WILLNEED);
#if defined(MADV_POPULATE_READ)
    advise(MADV_POPULATE_READ);  // older ops refuse it, which does no harm
#endif
#endif
}

// Mixture of experts: the router chooses slices of consecutive units.
void Forward::route(const Block& block, int64_t layer, const Activations& x, int64_t worker) {
    const int64_t experts = shape_.rank, size = shape_.block_size, uses = model_.chosen_in_block(layer);
    float* scores = workers_[size_t(worker)].line.row(0);
    for (int64_t t = 0; t < count(); ++t) {
        const Activations row = row_of(x, t);
        k_.matmul(block.router, 0, experts, row, 1, scores, experts);
        float top = scores[0], total = 0;
        for (int64_t e = 1; e < experts; ++e) top = std::max(top, scores[e]);
        for (int64_t e = 0; e < experts; ++e) total += std::exp(scores[e] - top);
        for (int64_t use = 0; use < uses; ++use) {
            int64_t best = 0;
            for (int64_t e = 1; e < experts; ++e)
                if (scores[e] > scores[best]) best = e;
            const float weight = shape_.probability_gate ? std::exp(scores[best] - top) / total : 1;
            const Range units = mine(size, LANES, worker);
            int32_t* to = chosen_.row(t) + use * size;
            for (int64_t u = units.begin; u < units.end; ++u) to[u] = int32_t(best * size + u);
            if (shape_.units_on_disk) read_ahead(block, t, use * size + units.begin, use * size + units.end);
            workers_[size_t(worker)].used[size_t(layer)] += units.end - units.begin;
            expert_dots(block, row, weight, t, use * size + units.begin, use * size + units.end, worker);
            scores[best] = -INFINITY;
        }
    }
}

// The router's weight enters before the activation.
void Forward::expert_dots(const Block& block, const Activations& x, float weight, int64_t t, int64_t begin, int64_t end,
                          int64_t worker) {
    Activations weighted = x;
    if (weight != 1) {
        float* scaled = workers_[size_t(worker)].line.row(0) + z_stride_ + CHUNK;  // behind the router's scores
        for (int64_t i = 0; i < d_stride_; ++i) scaled[i] = x.values[i] * weight;
        weighted = own_forms(scaled, d_stride_, worker);
    }
    k_.unit_dots(block.units, model_.parts(), shape_.activation, nullptr, chosen_.row(t), begin, end, weighted,
                 count() == 1, h_.row(t));
}

void Forward::sum_units(const Block& block, int64_t layer, int64_t worker) {
    const int64_t chosen = model_.chosen_units(layer), d = shape_.d_model;
    const float* bias = values(block.bias);
    const auto add = [&](int64_t t, int64_t begin, int64_t end, Range columns) {
        k_.unit_sums(block.units, model_.parts(), chosen_.row(t) + begin, h_.row(t) + begin, end - begin, columns.begin,
                     columns.end, residual(t, worker));
    };
    // Where their number is up to the token, every thread has listed its own.
    const auto add_found = [&](int64_t t, Range columns) {
        for (int64_t other = 0; other < pool_.active(); ++other) {
            const int64_t begin = copied_units(other).begin;
            add(t, begin, begin + found_.row(t)[other], columns);
        }
    };
    if (count() == 1) {
        const Range columns = mine(d, LANES, worker);
        if (shape_.positive)
            add_found(0, columns);
        else
            add(0, 0, chosen, columns);
        for (int64_t c = columns.begin; c < columns.end; ++c) residual(0, worker)[c] += bias[c];
        return;
    }
    const Range rows = mine(count(), 1, worker);
    const bool blocks = shape_.feed_forward != MIXTURE_UNITS;
    const int64_t step = BLOCKS_AT_ONCE * (blocks ? model_.chosen_in_block(layer) : 1);
    for (int64_t first = 0; first < chosen && !shape_.positive; first += step)
        for (int64_t t = rows.begin; t < rows.end; ++t) add(t, first, std::min(first + step, chosen), {0, d});
    for (int64_t t = rows.begin; t < rows.end && shape_.positive; ++t) add_found(t, {0, d});
    for (int64_t t = rows.begin; t < rows.end; ++t)
        for (int64_t c = 0; c < d; ++c) residual(t, worker)[c] += bias[c];
}

}  // namespace sparsecli
