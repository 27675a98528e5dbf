"""Small models of every kind for the tests of the decode engine; sizes are odd wherever they may be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from sparsecli.decode.engine import Engine
from sparsecli.decode.native import binding
from sparsecli.decode.packed.pack import PackedModel, pack
from sparsecli.decode.packed.precision import Precision
from sparsecli.decode.reference.step import Reference
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.tensors import tensor_shapes
from sparsecli.spec.model import ModelSpec

MOST_SETS = int(os.environ.get("SPARSECLI_TESTED_SETS", "99"))  # the best ones; `make sanitize` is slow
INSTRUCTION_SETS = binding.instruction_sets()[:MOST_SETS] if binding.available() is None else []

SPARSE = {"kind": "sparse", "d_ff": 160, "block_size": 20, "rank": 7, "units_per_block": 2}
DEFAULTS = {
    "d_model": 48,
    "layers": 2,
    "heads": 4,
    "max_positions": 2100,
    "feed_forward": SPARSE,
    "attention": {"projection": "multiplicative_conv"},
    "vocabulary": {"kind": "dense", "size": 101},
    "positions": "rotary",
}
MODELS: dict[str, dict] = {
    "sparse": {},
    "sparse, odd widths": {
        "d_model": 42,
        "heads": 6,
        "feed_forward": {"kind": "sparse", "d_ff": 63, "block_size": 7, "rank": 5},
        "attention": {"projection": "dense"},
        "vocabulary": {"kind": "dense", "size": 37, "tied": True},
        "positions": "learned",
    },
    "sparse, gated": {
        "feed_forward": {
            **SPARSE,
            "block_size": 32,
            "rank": 8,
            "units_per_block": 5,
            "activation": "gelu",
            "gated": True,
            "unit_bias": True,
            "gate": "probability",
        },
        "attention": {"projection": "dense_conv", "kernel": 4, "modules": 6},
        "positions": "sinusoidal",
    },
    "dense": {
        "feed_forward": {"kind": "dense", "d_ff": 100},
        "attention": {"projection": "dense"},
        "vocabulary": {"kind": "dense", "size": 101, "bias": True},
        "positions": "learned",
    },
    "dense, gated, grouped queries": {
        "feed_forward": {"kind": "dense", "d_ff": 100, "gated": True, "activation": "silu", "bias": False},
        "attention": {"projection": "dense", "key_value_heads": 2, "bias": False},
        "vocabulary": {"kind": "dense", "size": 101, "tied": True, "bias": True},
        "normalization": "rms",
    },
    "one head of keys": {
        "d_model": 60,
        "heads": 6,
        "attention": {"projection": "dense", "key_value_heads": 1},
    },
    "mixture of one": {
        "feed_forward": {"kind": "mixture", "d_ff": 99, "experts": 3},
        "attention": {"projection": "multiplicative", "modules": 3},
        "positions": "learned",
    },
    "mixture of two": {
        "feed_forward": {
            "kind": "mixture",
            "d_ff": 160,
            "experts": 5,
            "experts_per_token": 2,
            "gate": "probability",
            "activation": "gelu",
        },
        "attention": {"projection": "multiplicative", "output_projection": "none"},
        "normalization": "rms",
    },
    "spark": {
        "feed_forward": {"kind": "spark", "d_ff": 160, "active_units": 24, "predictor_width": 24},
        "attention": {"projection": "dense"},
    },
    "spark, odd widths": {
        "d_model": 132,
        "heads": 6,
        "feed_forward": {
            "kind": "spark",
            "d_ff": 101,
            "active_units": 30,
            "predictor_width": 67,
            "activation": "silu",
        },
        "normalization": "rms",
    },
    "convolved output": {
        "attention": {
            "projection": "multiplicative_conv",
            "output_projection": "multiplicative_conv",
            "value_concat": "modules",
            "kernel": 2,
        },
    },
    "whole concatenation": {
        "attention": {
            "projection": "multiplicative_conv",
            "output_projection": "dense",
            "value_concat": "whole",
            "modules": 12,
            "kernel": 1,
        },
    },
    "multiplicative head": {
        "attention": {"projection": "dense_conv", "output_projection": "multiplicative"},
        "vocabulary": {"kind": "multiplicative", "size": 102, "modules": 3},
    },
    "wide modules": {  # several panels, and groups of inputs that have scales of their own
        "d_model": 320,
        "layers": 1,
        "heads": 2,
        "feed_forward": {"kind": "sparse", "d_ff": 320, "block_size": 64, "rank": 20},
        "vocabulary": {"kind": "multiplicative", "size": 202, "modules": 2},
    },
    "many modules": {  # more than one tile of them
        "d_model": 144,
        "layers": 1,
        "heads": 2,
        "attention": {"projection": "multiplicative_conv", "modules": 72, "value_concat": "modules"},
    },
}

TWO_STREAMS: dict[str, dict] = {
    "reversible": {
        "residual": "reversible",
        "attention_layers": 2,
        "sru": {"width": 18},
        "positions": "digits",
    },
    "reversible, side by side in the end": {
        "residual": "reversible",
        "merge": "concatenate",
        "sru": {"layers": 2, "width": 5},
        "feed_forward": {"kind": "dense", "d_ff": 100},
        "attention": {"projection": "dense"},
        "positions": "axial",
        "axial": {"shape": [30, 70], "widths": [20, 28]},
    },
    "shared queries and keys": {
        "residual": "reversible",
        "attention": {"projection": "dense", "share_query_key": True},
        "feed_forward": {"kind": "dense", "d_ff": 100},
    },
    "shared queries and keys, convolved": {
        "attention": {"projection": "multiplicative_conv", "share_query_key": True},
        "positions": "learned",
    },
    "one stream, recurrent": {"sru": {"layers": 2, "width": 33}, "parallel": True},
}
MODELS |= TWO_STREAMS

DENSE = {"kind": "dense", "d_ff": 100}
SWIGLU = {"kind": "dense", "d_ff": 100, "gated": True, "activation": "silu", "bias": False}
GROUPED = {"projection": "dense", "key_value_heads": 2, "bias": False}
TIED = {"kind": "dense", "size": 101, "tied": True}
EXTENDED = {
    "kind": "llama3",
    "factor": 8.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_positions": 16,
}
YARN = {
    "kind": "yarn",
    "factor": 4.0,
    "original_positions": 128,
    "attention_factor": 1.14,
    "beta_fast": 8.0,
}
LONGROPE = {
    "kind": "longrope",
    "original_positions": 2000,
    "short_factor": [1.0, 1.05, 1.1, 1.2],
    "long_factor": [1.0, 2.5, 6.0, 8.0],
    "attention_factor": 1.2,
}
EXPERTS = {
    "kind": "mixture",
    "d_ff": 8 * 50,
    "experts": 8,
    "experts_per_token": 3,
    "activation": "silu",
    "gated": True,
    "bias": False,
    "gate": "output_probability",
}
FAMILIES: dict[str, dict] = {  # as checkpoints of other projects combine what the engine can do
    "llama 3": {
        "feed_forward": SWIGLU,
        "attention": GROUPED,
        "vocabulary": TIED,
        "normalization": "rms",
        "normalization_epsilon": 1e-5,
        "rotary_base": 5e5,
        "rotary_scaling": EXTENDED,
    },
    "mistral": {
        "head_width": 18,
        "feed_forward": SWIGLU,
        "attention": GROUPED,
        "normalization": "rms",
    },
    "qwen 2": {
        "feed_forward": SWIGLU,
        "attention": {**GROUPED, "bias": True, "output_bias": False},
        "vocabulary": TIED,
        "normalization": "rms",
    },
    "qwen 3": {
        "head_width": 20,
        "feed_forward": SWIGLU,
        "attention": {**GROUPED, "query_key_norm": True},
        "normalization": "rms",
    },
    "gemma": {
        "head_width": 36,
        "feed_forward": {**SWIGLU, "activation": "gelu_tanh"},
        "attention": {**GROUPED, "key_value_heads": 1},
        "vocabulary": TIED,
        "normalization": "rms",
        "embedding_scale": 48**0.5,
    },
    "gpt 2": {
        "feed_forward": {**DENSE, "activation": "gelu_tanh"},
        "attention": {"projection": "dense"},
        "vocabulary": TIED,
        "positions": "learned",
    },
    "opt": {
        "max_positions": 717,
        "feed_forward": DENSE,
        "attention": {"projection": "dense"},
        "vocabulary": TIED,
        "positions": "learned",
    },
    "neox": {
        "feed_forward": {**DENSE, "activation": "gelu"},
        "attention": {"projection": "dense"},
        "rotary_fraction": 0.35,
        "parallel": True,
    },
    "gemma 2": {
        "layers": 3,
        "head_width": 20,
        "feed_forward": {**SWIGLU, "activation": "gelu_tanh"},
        "attention": {
            **GROUPED,
            "window": 9,
            "sliding_layers": [True, False, True],
            "scale": 0.3,
            "logit_softcap": 2.0,
        },
        "vocabulary": TIED,
        "normalization": "rms",
        "norm_placement": "around",
        "embedding_scale": 48**0.5,
        "logit_softcap": 3.0,
    },
    "gemma 3": {
        "layers": 3,
        "head_width": 20,
        "feed_forward": {**SWIGLU, "activation": "gelu_tanh"},
        "attention": {
            **GROUPED,
            "key_value_heads": 1,
            "query_key_norm": True,
            "window": 24,
            "sliding_layers": [True, True, False],
        },
        "vocabulary": TIED,
        "normalization": "rms",
        "norm_placement": "around",
        "rotary_base": 1e6,
        "rotary_scaling": {"kind": "linear", "factor": 8.0},
        "sliding_rotary_base": 1e4,
        "embedding_scale": 48**0.5,
    },
    "olmo 2": {
        "feed_forward": SWIGLU,
        "attention": {**GROUPED, "query_key_norm": True, "query_key_norm_over": "projection"},
        "normalization": "rms",
        "norm_placement": "after",
    },
    "smollm 3": {
        "layers": 3,
        "feed_forward": SWIGLU,
        "attention": GROUPED,
        "vocabulary": TIED,
        "normalization": "rms",
        "rotary_layers": [True, False, True],
    },
    "granite": {
        "feed_forward": SWIGLU,
        "attention": {**GROUPED, "scale": 0.2},
        "vocabulary": TIED,
        "normalization": "rms",
        "embedding_scale": 6.0,
        "residual_scale": 0.4,
        "logit_scale": 0.3,
    },
    "phi 3": {
        "feed_forward": SWIGLU,
        "attention": GROUPED,
        "normalization": "rms",
        "rotary_fraction": 0.7,
        "rotary_scaling": LONGROPE,
    },
    "mixtral": {
        "feed_forward": {**EXPERTS, "normalize_probabilities": True, "experts_per_token": 2},
        "attention": GROUPED,
        "normalization": "rms",
    },
    "olmoe": {
        "feed_forward": EXPERTS,
        "attention": {**GROUPED, "query_key_norm": True, "query_key_norm_over": "projection"},
        "normalization": "rms",
    },
    "gpt j": {
        "feed_forward": DENSE,
        "attention": {"projection": "dense", "bias": False},
        "vocabulary": {"kind": "dense", "size": 101, "bias": True},
        "rotary_fraction": 0.5,
        "parallel": True,
        "shared_norm": True,
    },
}
ALONE: dict[str, dict] = {  # one field each, in a model of our own
    "narrow heads": {"head_width": 6, "attention": {"projection": "dense"}},
    "part of a head turned": {"rotary_fraction": 0.5},
    "slower turns": {"rotary_scaling": {"kind": "linear", "factor": 4.0}},
    "slower turns by a ramp": {"attention": {"projection": "dense"}, "rotary_scaling": YARN},
    "gated experts of scaled inputs": {
        "feed_forward": {
            **EXPERTS,
            "gate": "probability",
            "normalize_probabilities": True,
            "activation": "relu",
        }
    },
    "side by side": {"parallel": True},
    "side by side, no output": {
        "feed_forward": {"kind": "mixture", "d_ff": 99, "experts": 3},
        "attention": {"projection": "dense", "output_projection": "none"},
        "parallel": True,
    },
    "scaled embedding": {"positions": "learned", "embedding_scale": 3.0},
    "only the output biased": {"attention": {"projection": "dense", "bias": False, "output_bias": True}},
    "heads normalised": {"attention": {"projection": "dense", "query_key_norm": True}},
    "low rank": {"attention": {"projection": "dense", "query_key_rank": 7}},
    "low rank, grouped, normalised": {
        "d_model": 150,
        "heads": 6,
        "head_width": 26,
        "feed_forward": SWIGLU,
        "attention": {
            "projection": "dense",
            "key_value_heads": 3,
            "query_key_norm": True,
            "query_key_rank": 67,
        },
    },
    "gelu by tanh": {"feed_forward": {**SPARSE, "gated": True, "activation": "gelu_tanh"}},
    "a window of one": {"attention": {"projection": "dense", "window": 1}},
    "a window in every layer": {"attention": {"projection": "dense", "window": 40}, "positions": "learned"},
    "limited scores": {"attention": {"projection": "dense", "logit_softcap": 0.7}},
    "norms behind, sparse": {"norm_placement": "after"},
    "norms around, a mixture": {
        "feed_forward": {"kind": "mixture", "d_ff": 99, "experts": 3},
        "norm_placement": "around",
    },
    "scaled branches, no output": {
        "attention": {"projection": "dense_conv"},
        "residual_scale": 0.5,
        "parallel": True,
    },
    "limited logits, multiplicative": {
        "vocabulary": {"kind": "multiplicative", "size": 102, "modules": 3},
        "logit_scale": 2.0,
        "logit_softcap": 1.5,
    },
    "gated, biased": {"feed_forward": {**SWIGLU, "activation": "gelu", "bias": True}},
}
MODELS |= FAMILIES | ALONE

PRECISION = {"kind": "precision", "d_ff": 160, "units_per_block": 2, "gated": True}
SELECTOR = {"kind": "selector", "d_ff": 160, "gated": True, "activation": "silu"}
QUANTIZED: dict[str, dict] = {  # activations are rounded, whatever the precision
    "precision": {
        "d_model": 72,
        "feed_forward": {**PRECISION, "units_per_block": [2, 5]},
        "attention": {"projection": "dense"},
    },
    "precision, three bits": {
        "d_model": 200,
        "feed_forward": {**PRECISION, "d_ff": 144, "bits": 3, "block_size": 8, "units_per_block": 1},
        "attention": {"projection": "dense"},
        "quantization": {"projection": 3, "head": 4},
        "normalization": "rms",
    },
    "precision by layer, one branch": {
        "feed_forward": {
            **PRECISION,
            "d_ff": 100,
            "block_size": 20,
            "units_per_block": [0, 20],
            "gated": False,
            "unit_bias": True,
        },
        "vocabulary": {"kind": "dense", "size": 101, "bias": True},
        "quantization": {"head": 3},
    },
    "selector": {
        "feed_forward": {**SELECTOR, "units_per_block": [4, 1]},
        "attention": {"projection": "dense"},
        "quantization": {"projection": 4},
    },
    "selector by layer": {
        "feed_forward": {
            **SELECTOR,
            "d_ff": 126,
            "block_size": 7,
            "units_per_block": [7, 2],
            "bits": 4,
            "unit_bias": True,
            "gated": False,
            "bypass": 5,
        },
        "parallel": True,
    },
    "selector, ties": {  # half of the units are silent and all alike: the first of them are chosen
        "d_model": 16,
        "heads": 2,
        "layers": 1,
        "feed_forward": {
            "kind": "selector",
            "d_ff": 64,
            "block_size": 16,
            "units_per_block": 12,
            "gated": False,
            "activation": "relu",
        },
        "attention": {"projection": "dense"},
    },
    "positive": {
        "feed_forward": {
            "kind": "selector",
            "d_ff": 150,
            "block_size": 10,
            "choice": "positive",
            "unit_bias": True,
            "bypass": 3,
        },
    },
    "low rank, quantized": {
        "attention": {"projection": "dense", "query_key_rank": 13},
        "quantization": {"projection": 4},
    },
    "sparse by layer": {"feed_forward": {**SPARSE, "units_per_block": [20, 3]}},
}


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.model_validate({**DEFAULTS, **(MODELS | QUANTIZED)[name]})


@cache
def network(name: str) -> ScalingTransformerForCausalLM:
    """The model called `name` as transformers runs it, with biases that matter."""
    torch.manual_seed(0)
    made = ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(spec_of(name))).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for kind, buffer in made.named_buffers():
            if kind.endswith("importance"):
                buffer.uniform_(0.5, 2)
            elif kind.endswith("threshold"):
                buffer.normal_(0, 0.1)
            elif "residual" in kind and kind.endswith("codes"):
                buffer.random_(0, 256)
            elif "residual" in kind:
                buffer.copy_(buffer.uniform_(0.001, 0.01).bfloat16())
    return made


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def random_weights(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Normal numbers for every tensor of `spec`."""
    random = np.random.default_rng(0)
    return {
        name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in tensor_shapes(spec).items()
    }


@cache
def packed(name: str, precision: Precision = Precision.of("float32")) -> PackedModel:  # noqa: B008
    return pack(spec_of(name), weights_of(network(name)), precision)


def some_tokens(vocabulary: int, count: int) -> list[int]:
    return np.random.default_rng(1).integers(0, vocabulary, count).tolist()


@cache
def expected(name: str, count: int) -> np.ndarray:
    """Logits (count, V) after each of `some_tokens`, by the model that transformers runs."""
    made = network(name)
    with torch.no_grad():
        return made(torch.tensor([some_tokens(made.config.vocab_size, count)])).logits[0].numpy()


@cache
def twin(name: str, precision: Precision, count: int) -> np.ndarray:
    """The same by the reference, with weights as they are packed."""
    return Reference(packed(name, precision)).logits(some_tokens(spec_of(name).vocabulary.size, count))


def start(model: PackedModel, threads: int = 1) -> Engine:
    """An engine that meets its mistakes: its memory is NaN wherever nothing was written yet, and every tensor has
    memory of its own, so that a sanitizer notices reading beyond it."""
    if not model.from_disk:
        tensors = {name: on_its_own(tensor) for name, tensor in model.tensors.items()}
        model = replace(model, tensors=tensors)
    return Engine(model, threads, poison=True)


def on_its_own(tensor: np.ndarray) -> np.ndarray:
    """A copy on cache lines, as far at the end of its memory as they allow."""
    room = np.empty(tensor.nbytes + 63, np.uint8)
    place = -room.ctypes.data % 64
    copy = room[place : place + tensor.nbytes].view(tensor.dtype)
    copy[:] = tensor
    return copy


def stepped(engine: Engine, tokens: Sequence[int]) -> np.ndarray:
    """Logits (n, V) of one step after the other."""
    sequence = engine.sequence(len(tokens))
    return np.stack([engine.step(sequence, token) for token in tokens])


def batched(engine: Engine, texts: Iterable[Sequence[int]]) -> np.ndarray:
    """Logits (texts, n, V) of texts of one length, decoded side by side."""
    texts = list(texts)
    sequences = [engine.sequence(len(text)) for text in texts]
    return np.stack([engine.step_batch(sequences, tokens) for tokens in zip(*texts, strict=True)], axis=1)


def assert_close(actual: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual, wanted, atol=tolerance, rtol=tolerance)


def assert_twins(actual: np.ndarray, wanted: np.ndarray) -> None:
    """Logits (n, V) of two implementations of the same rounded arithmetic; ops.cpp compares each op by itself.

    Where two sums differ in their last bit, a number may round the other way: of 8-bit products by 2^-8 of the largest,
    of bfloat16 by 2^-8 of itself. So that is how far half of the tokens may be off, against the logits' own size. A few
    more may be where the choice of a unit changed, too. What is computed wrongly is off everywhere.
    """
    assert np.isfinite(actual).all()
    error = np.sqrt(((actual - wanted) ** 2).mean(axis=-1)) / wanted.std()
    half, most, nearly_all = np.quantile(error, [0.5, 0.75, 0.9]) * 2**8
    assert half < 1, f"error by token: {error}"
    assert most < 1.5, f"error by token: {error}"
    assert nearly_all < 3, f"error by token: {error}"
