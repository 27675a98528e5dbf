#include <cmath>
#include <cstring>

#include "ops/all.inl"

namespace sparsecli {
const Ops* portable_ops() {
    static constexpr Ops table = make_table("portable");
    return &table;
}
}  // namespace sparsecli
