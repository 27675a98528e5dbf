// Rows of chosen units, which sparse, mixture, selector and spark layers share.
#pragma once
#include "pass.h"

namespace sparsecli {

constexpr int64_t BLOCKS_AT_ONCE = 4;  // whose units' rows stay in the second-level cache for all tokens

// The units that each token uses, as lists: K = model.chosen_units(layer_idx) at most.
class ChosenUnits {
  public:
    explicit ChosenUnits(Workspace& space);

    Buffer<int32_t> units;  // (T, K): their numbers
    Buffer<float> hidden;   // (T, K): their activations

    // Activations of entries [begin, end) of a token's list.
    void activate(const Pass& pass, const Block& block, const float* unit_bias, int64_t t, int64_t begin, int64_t end,
                  const Activations& x_of_t) const;

    // Adds entries [begin, end) of a token's list to columns of its residual.
    void add(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end, Range columns) const;

    // Adds the whole lists, K entries each, and the layer's bias. Many tokens that chose the same units share one
    // reading of `step` entries.
    void add_all(const Pass& pass, const Block& block, int64_t count, int64_t step) const;

    // Adds lists whose length depends on the token, and the layer's bias. Each worker found its own part: entries from
    // first_of(worker) on, `found` (T, workers) of them.
    template <class F>
    void add_found(const Pass& pass, const Block& block, const Buffer<int64_t>& found, const F& first_of) const;

    // Asks the system to read the rows of entries [begin, end) from disk; `parts` rows of `rows` are one unit's.
    void read_ahead(const Pass& pass, const Block& block, int64_t t, int64_t begin, int64_t end) const {
        read_ahead(block.units, pass.model.parts(), t, begin, end);
    }
    void read_ahead(const Matrix& rows, int64_t parts, int64_t t, int64_t begin, int64_t end) const;
};

// Adds columns of a layer's bias to a token's residual, where there is one.
void add_bias(const Pass& pass, const Block& block, int64_t t, Range columns);

template <class F>
void ChosenUnits::add_found(const Pass& pass, const Block& block, const Buffer<int64_t>& found,
                            const F& first_of) const {
    const bool single = pass.single();
    const Range tokens = single ? Range{0, 1} : pass.mine(pass.count(), 1);
    const Range columns = single ? pass.mine(pass.shape.d_model, LANES) : Range{0, pass.shape.d_model};
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        for (int64_t worker = 0; worker < pass.workers(); ++worker) {
            const int64_t begin = first_of(worker);
            add(pass, block, t, begin, begin + found.row(t)[worker], columns);
        }
        add_bias(pass, block, t, columns);
    }
}

}  // namespace sparsecli
