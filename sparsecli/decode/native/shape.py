"""A model as the native engine takes it: `sparsecli_shape` and its tensors (native/engine.h)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sparsecli.decode.native.binding import BoundTensor, Shape
from sparsecli.decode.native.gguf import TYPE_CODES as GGUF_CODES
from sparsecli.decode.packed.layouts import Slot
from sparsecli.decode.packed.pack import LINE, PackedModel
from sparsecli.decode.packed.precision import head_candidates
from sparsecli.decode.packed.tensor_file import WIDTHS
from sparsecli.decode.packed.tensors import crosses, joins, modules_of, query_modules_of
from sparsecli.spec.model import ModelSpec

QUANTIZED_TYPES = {4: 3, 3: 4}  # native/ops/ops.h, by bits of a weight
TYPE_CODES = {"float32": 0, "bfloat16": 1, "int8": 2, "float16": 17}
ACTIVATIONS = ("relu", "gelu", "silu", "gelu_tanh")
FEED_FORWARDS = ("dense", "sparse", "mixture", "selector", "precision", "spark")
PROJECTIONS = ("dense", "multiplicative", "dense_conv", "multiplicative_conv")
OUTPUTS = ("none", "dense", "multiplicative", "multiplicative_conv")
POSITIONS = (
    "learned",
    "sinusoidal",
    "rotary",
)  # digits and coordinates are packed as a table, like learned ones
NORMS = ("none", "head", "projection")  # of queries and keys
ROTARY_TABLES = ("none", "full", "sliding")
CONCATENATIONS = ("none", "modules", "whole")
MIXTURE_GATES = {"none": 0, "probability": 1, "output_probability": 2}


def shape_of(model: PackedModel, poison: bool) -> Shape:
    """All fields but those of `by_layer`, which are memory of the caller."""
    spec, precision = model.spec, model.precision
    attention, vocabulary = spec.attention, spec.vocabulary
    shape = Shape(
        d_model=spec.d_model,
        layers=spec.layers,
        heads=spec.heads,
        head_width=spec.width_of_head,
        key_value_heads=attention.key_value_heads or spec.heads,
        max_positions=spec.max_positions,
        vocabulary=vocabulary.size,
        projection=PROJECTIONS.index(attention.projection),
        output=OUTPUTS.index(attention.output),
        modules=modules_of(spec),
        kernel=attention.kernel,
        value_concat=CONCATENATIONS.index(attention.value_concat),
        query_key_norm=NORMS.index(attention.query_key_norm_over) if attention.query_key_norm else 0,
        query_rank=spec.query_rank or 0,
        key_rank=spec.key_rank or 0,
        rms=spec.normalization == "rms",
        post_norms=spec.norm_placement != "before",
        positions=POSITIONS.index(spec.positions) if spec.positions in POSITIONS else 0,
        rotary_width=spec.rotary_width if spec.positions == "rotary" else 0,
        rotary_switch=spec.rotary_switch or 0,
        parallel=spec.parallel,
        streams=2 if spec.residual == "reversible" else 1,
        concatenate=spec.merge == "concatenate",
        attention_layers=spec.attention_layers,
        shared_query_key=(1 if attention.share_query_key else 2) if attention.shares_query_key else 0,
        hash_rounds=attention.hashing.rounds if attention.hashing else 0,
        most_keys=attention.hashing.most_keys if attention.hashing else 0,
        encoder=1 if crosses(spec) else 2 if joins(spec) else 0,
        query_modules=query_modules_of(spec) or 0,
        recurrent_layers=spec.sru.layers if spec.sru else 0,
        recurrent_width=spec.sru.width if spec.sru else 0,
        head_modules=vocabulary.modules if vocabulary.kind == "multiplicative" else 0,
        head_candidates=head_candidates(spec, precision),
        cache_type=TYPE_CODES[precision.cache],
        conv_type=TYPE_CODES[precision.convolution],
        units_on_disk=model.from_disk,
        poison=poison,
        epsilon=spec.normalization_epsilon,
        embedding_scale=spec.embedding_scale,
        rotary_attention_factor=spec.rotary_attention_factor,
        attention_scale=spec.attention_scale,
        attention_softcap=attention.logit_softcap or 0,
        residual_scale=spec.residual_scale,
        logit_scale=spec.logit_scale,
        logit_softcap=spec.logit_softcap or 0,
    )
    _describe_feed_forward(shape, spec)
    return shape


def _describe_feed_forward(shape: Shape, spec: ModelSpec) -> None:
    feed_forward = spec.feed_forward
    shape.feed_forward = FEED_FORWARDS.index(feed_forward.kind)
    shape.d_ff = feed_forward.d_ff
    shape.activation = ACTIVATIONS.index(feed_forward.activation)
    shape.gated = getattr(feed_forward, "gated", False)
    if feed_forward.kind == "mixture":  # native/engine.h: the units of an expert, and experts
        shape.block_size, shape.rank = feed_forward.d_ff // feed_forward.experts, feed_forward.experts
        shape.probability_gate = MIXTURE_GATES[feed_forward.gate]
        shape.normalized_probabilities = feed_forward.normalize_probabilities
        return
    if feed_forward.kind == "spark":
        shape.rank, shape.unit_quantile = feed_forward.predictor_width, feed_forward.quantile
        return
    if feed_forward.kind == "dense":
        return
    shape.block_size = feed_forward.block_size
    if feed_forward.kind == "sparse":
        shape.rank, shape.probability_gate = feed_forward.rank, feed_forward.gate == "probability"
    elif feed_forward.kind == "selector":
        shape.rank, shape.positive = feed_forward.bypass, feed_forward.choice == "positive"


def by_layer(spec: ModelSpec) -> dict[str, list[int]]:
    """Fields that have a number for every layer."""
    layers = range(spec.layers)
    return {
        "units_per_block": units_per_block(spec),
        "windows": [spec.window(layer) or 0 for layer in layers],
        "rotary_tables": [ROTARY_TABLES.index(spec.rotary_table(layer)) for layer in layers],
    }


def units_per_block(spec: ModelSpec) -> list[int]:
    """k of every layer; experts a token of a mixture."""
    feed_forward = spec.feed_forward
    if feed_forward.kind in ("dense", "spark"):
        return [0] * spec.layers
    if feed_forward.kind == "mixture":
        return [feed_forward.experts_per_token] * spec.layers
    return [spec.units_per_block(layer) for layer in range(spec.layers)]


def bound_tensor(slot: Slot, kind: str, tensors: Mapping[str, np.ndarray]) -> BoundTensor:
    """A tensor as the library takes it, compared with the plan.

    The library does not check lengths. Python's integers have no limit, so that no product of sizes can wrap here.

    Raises:
        ValueError: it is missing, or has another type or length.
    """
    if slot.key not in tensors:
        raise ValueError(f"{slot.key} is missing from the packed model")
    tensor, scale = tensors[slot.key], tensors.get(f"{slot.key}.scale")
    if tensor.itemsize != WIDTHS[kind]:
        raise ValueError(f"{slot.key}: is {tensor.dtype}, expected {kind}")
    if not slot.elements <= tensor.size < slot.elements + LINE // tensor.itemsize:  # whole cache lines
        raise ValueError(f"{slot.key}: has {tensor.size} elements, expected {slot.elements}")
    if kind != "int8":
        scale = None
    elif scale is None:
        raise ValueError(f"{slot.key}.scale is missing from the packed model")
    elif scale.dtype != np.float32 or scale.size < slot.scales:
        raise ValueError(f"{slot.key}.scale: is {scale.size} {scale.dtype}, expected {slot.scales} float32")
    return BoundTensor(
        name=slot.name.encode(),
        data=tensor.ctypes.data,
        scale=None if scale is None else scale.ctypes.data,
        layer=slot.layer,
        type=_type_code(slot, kind),
        rows=slot.rows,
        cols=slot.cols,
        by_rows=slot.layout == "gguf_rows",
    )


def _type_code(slot: Slot, kind: str) -> int:
    if slot.gguf:
        return GGUF_CODES[slot.gguf]
    return QUANTIZED_TYPES[slot.bits] if slot.bits else TYPE_CODES[kind]
