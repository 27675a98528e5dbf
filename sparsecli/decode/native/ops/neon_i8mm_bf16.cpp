#include "ops/ops.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm,bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm+bf16")
// Loads that GCC moves ahead before it allots registers leave too few of them for sums.
#pragma GCC optimize("no-schedule-insns")
#endif
#define SPARSECLI_NEON 1
#define SPARSECLI_DOTPROD 1
#define SPARSECLI_I8MM 1
#define SPARSECLI_BF16 1
#include "ops/all.inl"

namespace sparsecli {
const Ops* neon_i8mm_bf16_ops() {
    static constexpr Ops table = make_table("neon_i8mm_bf16");
    return &table;
}
}  // namespace sparsecli
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace sparsecli {
const Ops* neon_i8mm_bf16_ops() { return nullptr; }
}  // namespace sparsecli
#endif
