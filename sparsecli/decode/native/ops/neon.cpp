#include "ops/ops.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#if !defined(__clang__)
// Loads that GCC moves ahead before it allots registers leave too few of them for sums.
#pragma GCC optimize("no-schedule-insns")
#endif
#define SPARSECLI_NEON 1
#include "ops/all.inl"

namespace sparsecli {
const Ops* neon_ops() {
    static constexpr Ops table = make_table("neon");
    return &table;
}
}  // namespace sparsecli
#else
namespace sparsecli {
const Ops* neon_ops() { return nullptr; }
}  // namespace sparsecli
#endif
