// The kernels, written once and compiled once for each instruction set, which `SPARSECLI_AVX512` or
// `SPARSECLI_AVX2` names; with neither, plain C++ that any compiler vectorises for its target.
//
// Everything lives in an unnamed namespace, so that the linker never takes one set's code for another's.
#include "kernels.h"

namespace sparsecli {
namespace {

#include "vectors.inl"
#include "low_bit.inl"
#include "dots.inl"
#include "units.inl"
#include "products.inl"
#include "controller.inl"
#include "attention.inl"
#include "hashing.inl"

constexpr Kernels make_table(const char* name) {
    return {name,      SPLITS,    quantise,      split,         dots,  multiplicative, convolve,  choose,
            unit_dots, unit_sums, residual_dots, residual_sums, fetch, activate,       normalize, convert,
            widen,     append,    attend,        hash,          find_alike, attend_chosen};
}

}  // namespace
}  // namespace sparsecli
