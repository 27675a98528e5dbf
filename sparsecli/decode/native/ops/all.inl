// The ops, written once and compiled once for each instruction set, which `SPARSECLI_AVX512` or
// `SPARSECLI_AVX2` names; with neither, plain C++ that any compiler vectorises for its target.
//
// Everything is in an unnamed namespace, so that the linker does not mix up the code of two sets.
#include "ops/ops.h"

namespace sparsecli {
namespace {

#include "ops/vectors.inl"
#include "ops/quantized.inl"
#include "ops/gguf.inl"
#include "ops/gguf_blocks.inl"
#include "ops/gguf_rows.inl"
#include "ops/gemv.inl"
#include "ops/units.inl"
#include "ops/multiplicative.inl"
#include "ops/controller.inl"
#include "ops/attention.inl"
#include "ops/hashing.inl"
#include "ops/training.inl"

constexpr Ops make_table(const char* name) {
    return {.name = name,
            .bytes = LARGEST < 32767,
            .quantise = quantise,
            .quantise_bytes = quantise_bytes,
            .read_gguf = read_gguf,
            .gguf_row_dots = gguf_row_dots,
            .matmul = matmul,
            .multiplicative = multiplicative,
            .convolve = convolve,
            .choose = choose,
            .unit_dots = unit_dots,
            .row_dots = row_dots,
            .unit_sums = unit_sums,
            .residual_dots = residual_dots,
            .residual_sums = residual_sums,
            .prefetch = prefetch,
            .activate = activate,
            .normalize = normalize,
            .convert = convert,
            .widen = widen,
            .append = append,
            .attend = attend,
            .soft_cap = soft_cap,
            .hash = hash,
            .find_same_bucket = find_same_bucket,
            .attend_chosen = attend_chosen,
            .gather_dots = gather_dots,
            .gather_sums = gather_sums,
            .add_matrix_product = add_matrix_product,
            .add_gumbel_noise = add_gumbel_noise,
            .choose_largest = choose_largest,
            .softmax = softmax,
            .softmax_gradient = softmax_gradient,
            .activation_slopes = activation_slopes};
}

}  // namespace
}  // namespace sparsecli
