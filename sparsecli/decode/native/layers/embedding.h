#pragma once
#include "pass.h"

namespace sparsecli {

// Writes the first residual vectors of every token: its embedding with learned or sinusoidal positions added, or what
// an encoder made, and the angles that rotary positions turn queries and keys by.
class Embedding {
  public:
    explicit Embedding(Workspace& space);
    void run(Pass& pass);

  private:
    void embed(Pass& pass, int64_t t);

    Buffer<float> position_;  // (T, d_model): learned vectors of positions
};

}  // namespace sparsecli
