#include "layers/units.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sparsecli {

ChosenUnits::ChosenUnits(Workspace& space) {
    int64_t most = 0;
    for (int64_t layer_idx = 0; layer_idx < space.shape.layers; ++layer_idx)
        most = std::max(most, space.model.chosen_units(layer_idx));
    space.for_tokens(units, most, false);
    space.for_tokens(hidden, most, false);
}

void ChosenUnits::activate(const Pass& pass, const Block& block, const float* unit_bias, int64_t t, int64_t begin,
                           int64_t end, const Activations& x_of_t) const {
    pass.ops.unit_dots(block.units, pass.model.parts(), pass.shape.activation, unit_bias, units.row(t), begin, end,
                       x_of_t, pass.single(), hidden.row(t));
}

void ChosenUnits::add(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end,
                      Range columns) const {
    pass.ops.unit_sums(block.units, pass.model.parts(), units.row(t) + begin, hidden.row(t) + begin, end - begin,
                       columns.begin, columns.end, pass.residual(t));
}

void ChosenUnits::add_all(const Pass& pass, const Block& block, int64_t count, int64_t step) const {
    const bool few = pass.count() < 8 * pass.workers();  // so few are shared out more evenly by columns
    const Range tokens = few ? Range{0, pass.count()} : pass.mine(pass.count(), 1);
    const Range columns = few ? pass.mine(pass.shape.d_model, LANES) : Range{0, pass.shape.d_model};
    for (int64_t first = 0; first < count; first += step)
        for (int64_t t = tokens.begin; t < tokens.end; ++t)
            add(pass, block, t, first, std::min(first + step, count), columns);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) add_bias(pass, block, t, columns);
}

void add_bias(const Pass& pass, const Block& block, int64_t t, Range columns) {
    const float* bias = values(block.bias);
    if (!bias) return;
    float* x = pass.residual(t);
    for (int64_t c = columns.begin; c < columns.end; ++c) x[c] += bias[c];
}

// All rows are asked for at once, since the system would otherwise wait for the disk row by row. They are then mapped
// in long pieces, which costs less than a page fault for every 4 KiB.
void ChosenUnits::read_ahead([[maybe_unused]] const Matrix& rows, [[maybe_unused]] int64_t parts,
                             [[maybe_unused]] int64_t t, [[maybe_unused]] int64_t begin,
                             [[maybe_unused]] int64_t end) const {
#if defined(__linux__)
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = parts * round_up(rows.cols, PAD) * type_bytes(rows.type);
    const auto advise = [&](int advice) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = int64_t(rows.data) + units.row(t)[i] * bytes;
            const int64_t start = first / page * page;
            madvise((void*)start, size_t(first + bytes - start), advice);
        }
    };
    advise(MADV_WILLNEED);
#if defined(MADV_POPULATE_READ)
    advise(MADV_POPULATE_READ);  // older kernels refuse it, which does no harm
#endif
#endif
}

}  // namespace sparsecli
