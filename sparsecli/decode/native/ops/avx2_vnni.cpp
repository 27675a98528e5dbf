#include "ops/ops.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define SPARSECLI_AVX2 1
#define SPARSECLI_VNNI 1
#include "ops/all.inl"

namespace sparsecli {
const Ops* avx2_vnni_ops() {
    static constexpr Ops table = make_table("avx2_vnni");
    return &table;
}
}  // namespace sparsecli
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace sparsecli {
const Ops* avx2_vnni_ops() { return nullptr; }
}  // namespace sparsecli
#endif
