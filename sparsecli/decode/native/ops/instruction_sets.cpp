// Which instruction sets there are, and which of them this processor has.
#include <cstring>

#include "ops/ops.h"

namespace sparsecli {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
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

}  // namespace

const InstructionSet instruction_sets[INSTRUCTION_SETS] = {
    {"avx512_bf16", has_avx512_bf16, avx512_bf16_ops},
    {"avx512_vnni", has_avx512_vnni, avx512_vnni_ops},
    {"avx512", has_avx512, avx512_ops},
    {"avx2_vnni", has_avx2_vnni, avx2_vnni_ops},
    {"avx2", has_avx2, avx2_ops},
    {"neon", [] { return neon_ops() != nullptr; }, neon_ops},  // every 64-bit Arm processor has it
    {"portable", [] { return true; }, portable_ops},
};

const Ops* find_ops(const char* name) {
    for (const InstructionSet& set : instruction_sets)
        if ((!std::strcmp(name, "auto") || !std::strcmp(name, set.name)) && set.available() && set.ops())
            return set.ops();
    return nullptr;
}

}  // namespace sparsecli
