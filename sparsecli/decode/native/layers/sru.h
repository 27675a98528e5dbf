#pragma once
#include "pass.h"

namespace sparsecli {

// A narrow branch of simple recurrent units beside the feed-forward layer: y = leave(cells(enter(norm(x)))).
// It reads the residual stream before the feed-forward layer adds to it, and adds its output in the middle of that
// layer, so that both share their barriers.
class Sru {
  public:
    explicit Sru(Workspace& space);
    void enter(Pass& pass, const Recurrence& branch);
    void leave(Pass& pass, const Recurrence& branch, int64_t layer_idx);

  private:
    void run_cells(Pass& pass, const Recurrence& branch, int64_t layer_idx, int64_t t, float* y);

    Buffer<float> branch_, own_branch_;  // (T, recurrent_width), (workers, recurrent_width)
    Buffer<float> own_gates_;            // (workers, 3 * recurrent_width): reset, forget, candidate of one cell
};

}  // namespace sparsecli
