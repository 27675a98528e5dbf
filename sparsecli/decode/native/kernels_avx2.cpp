#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SPARSECLI_AVX2 1
#include "kernels.inl"

namespace sparsecli {
const Kernels* avx2_kernels() {
    static constexpr Kernels table = make_table("avx2");
    return &table;
}
}  // namespace sparsecli
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace sparsecli {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace sparsecli
#endif
