#include "ops/ops.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif
#define SPARSECLI_AVX512 1
#define SPARSECLI_VNNI 1
#include "ops/all.inl"

namespace sparsecli {
const Ops* avx512_vnni_ops() {
    static constexpr Ops table = make_table("avx512_vnni");
    return &table;
}
}  // namespace sparsecli
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace sparsecli {
const Ops* avx512_vnni_ops() { return nullptr; }
}  // namespace sparsecli
#endif
