// Which instruction sets there are, and which of them this processor has.
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "ops/ops.h"

namespace sparsecli {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx2_vnni() {
#if defined(__clang__) || __GNUC__ >= 11
    return has_avx2() && __builtin_cpu_supports("avxvnni");
#else
    return false;
#endif
}

bool has_avx512() {  // Skylake-X and later
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }  // Cascade Lake, Ice Lake
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx2_vnni() { return false; }
bool has_avx512() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512_bf16() { return false; }
#endif

// Arm: the operating system says. Every 64-bit processor has NEON.
#if defined(__aarch64__) && defined(__linux__)
bool has_neon() { return true; }
bool has_neon_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
bool has_neon_i8mm_bf16() {                                        // HWCAP2_I8MM and HWCAP2_BF16
    const unsigned long more = getauxval(AT_HWCAP2);
    return has_neon_dotprod() && (more >> 13 & 1) && (more >> 14 & 1);
}
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, nullptr, 0) && value;
}
bool has_neon() { return true; }
bool has_neon_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_neon_i8mm_bf16() {
    return has_neon_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM") && has_feature("hw.optional.arm.FEAT_BF16");
}
#else
#if defined(__aarch64__)
bool has_neon() { return true; }
#else
bool has_neon() { return false; }
#endif
bool has_neon_dotprod() { return false; }
bool has_neon_i8mm_bf16() { return false; }
#endif

}  // namespace

const InstructionSet instruction_sets[INSTRUCTION_SETS] = {
    {"avx512_bf16", has_avx512_bf16, avx512_bf16_ops},
    {"avx512_vnni", has_avx512_vnni, avx512_vnni_ops},
    {"avx512", has_avx512, avx512_ops},
    {"avx2_vnni", has_avx2_vnni, avx2_vnni_ops},
    {"avx2", has_avx2, avx2_ops},
    {"neon_i8mm_bf16", has_neon_i8mm_bf16, neon_i8mm_bf16_ops},
    {"neon_dotprod", has_neon_dotprod, neon_dotprod_ops},
    {"neon", has_neon, neon_ops},
    {"portable", [] { return true; }, portable_ops},
};

const Ops* find_ops(const char* name) {
    for (const InstructionSet& set : instruction_sets)
        if ((!std::strcmp(name, "auto") || !std::strcmp(name, set.name)) && set.available() && set.ops())
            return set.ops();
    return nullptr;
}

static const Ops* selected = nullptr;

void select_ops(const Ops* ops) { selected = ops; }

const Ops& selected_ops() {
    if (!selected) selected = find_ops("auto");
    return *selected;
}

}  // namespace sparsecli
