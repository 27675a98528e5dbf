// The C interface of Sparse FF in training: values and gradients from chosen rows alone. Like the one in engine.h;
// `binding.py` is the only caller and mirrors the structures.
//
// Results are equal bit for bit whatever the number of threads: a sum adds its products in an order of its own.
#pragma once
#include <cstdint>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
extern "C" {

// Weights are unit-major (d_ff, d_model), of `type` float32 or bfloat16; everything else is float32. A pair is a token
// with one of its chosen units: chosen (tokens, blocks, units_per_block) counts units within their block.
struct sparsecli_units {
    int64_t tokens, d_model, d_ff, block_size, units_per_block, activation, type, threads;
    const void *first, *up, *down;  // `first` enters the activation; `up` multiplies it, null where there is no gate
    const float *unit_bias, *bias;  // before the activation, and of the output; may be null
    const float* x;                 // (tokens, d_model)
    const int32_t* chosen;
    const float* scale;  // of every pair, behind the activation; may be null
};

// y (tokens, d_model). `before` and `raised`, like chosen, are kept for the gradients: what enters the activation, and
// what `up` multiplies it by, where there is a gate.
int64_t sparsecli_units_forward(const sparsecli_units* units, float* before, float* raised, float* y, char* error);

// Gradients; those that are null are not computed. `mask` is that of a factor of 1 before the activation.
struct sparsecli_unit_gradients {
    float *x, *first, *up, *down, *unit_bias, *bias, *mask, *scale;
};
int64_t sparsecli_units_backward(const sparsecli_units* units, const float* before, const float* raised,
                                 const float* dy, const sparsecli_unit_gradients* gradients, char* error);

// Logits (tokens, d_ff) = hidden second^T + bias: hidden (tokens, rank), second (d_ff, rank). They are not kept.
struct sparsecli_controller {
    int64_t tokens, d_ff, block_size, units_per_block, rank, threads;
    const float *hidden, *second, *bias;
};

// Writes the units of each block whose logits plus temperature * Gumbel noise are largest, where `decide`, otherwise
// reads them; and their softmax probabilities, unless null. Noise is a function of the seed, the token and the unit.
int64_t sparsecli_controller_choose(const sparsecli_controller* controller, int64_t decide, float temperature,
                                    uint64_t seed, int32_t* chosen, float* probabilities, char* error);

// Gradients of hidden, second and bias, from those of the chosen units' probabilities.
int64_t sparsecli_controller_backward(const sparsecli_controller* controller, const int32_t* chosen,
                                      const float* gradient, float* hidden, float* second, float* bias, char* error);
}
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
