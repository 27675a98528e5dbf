#include "ops/ops.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
// Loads that GCC moves ahead before it allots registers leave too few of them for sums.
#pragma GCC optimize("no-schedule-insns")
#endif
#define SPARSECLI_NEON 1
#define SPARSECLI_DOTPROD 1
#include "ops/all.inl"

namespace sparsecli {
const Ops* neon_dotprod_ops() {
    static constexpr Ops table = make_table("neon_dotprod");
    return &table;
}
}  // namespace sparsecli
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace sparsecli {
const Ops* neon_dotprod_ops() { return nullptr; }
}  // namespace sparsecli
#endif
