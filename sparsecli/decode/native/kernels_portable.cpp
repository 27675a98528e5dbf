#include <cmath>
#include <cstring>

#include "kernels.inl"

namespace sparsecli {
const Kernels* portable_kernels() {
    static constexpr Kernels table = make_table("portable");
    return &table;
}
}  // namespace sparsecli
