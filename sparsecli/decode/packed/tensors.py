"""The plan of a packed model's tensors: what they are called, what they are made of, and how each lies in memory.

The engine knows them by these names (native/model.h); the layouts are those of layouts.py. Everything that depends on
an architecture's kind is decided here: C++ is handed finished slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sparsecli.decode.packed.layouts import LANES, Layout, Slot, padded
from sparsecli.model.gguf_types import SKETCH
from sparsecli.model.rotary import RotaryTable
from sparsecli.spec.feed_forward import SparkFeedForwardSpec
from sparsecli.spec.model import ModelSpec

EMBEDDING = "model.embedding"
FREQUENCIES: dict[str, RotaryTable] = {
    "frequencies": "full",
    "long_frequencies": "long",
    "sliding_frequencies": "sliding",
}
"""Tensors that are computed, not learned: see `rotary_frequencies`. The first may be those of sinusoidal positions."""


def slots(spec: ModelSpec) -> list[Slot]:
    """Every tensor of the packed model of `spec`."""
    found = list(_own(spec))
    for layer in range(spec.layers):
        found += _attention(spec, layer)
        if spec.attention_layers == 2:
            found += _attention(spec, layer, "second.", "second_attention")
        if crosses(spec):
            found += _cross_attention(spec, layer)
        found += _feed_forward(spec, layer)
        found += _recurrence(spec, layer)
    found = [
        _with_codes(slot, spec) for slot in found if not (slot.name == "head.weight" and shares_codes(spec))
    ]
    return _with_sketch(found, spec) if spec.quantization.head_candidates else found


def _with_sketch(found: list[Slot], spec: ModelSpec) -> list[Slot]:
    """All logits come from a sketch; the head's own rows are those of the embedding, or a tensor beside it."""
    rows, cols = spec.vocabulary.size, spec.merged_width
    exact = [replace(slot, name="head.exact") if slot.name == "head.weight" else slot for slot in found]
    return [*exact, Slot(-1, "head.weight", "gguf", rows, cols, None, ("head.sketch",), gguf=SKETCH.name)]


def shares_codes(spec: ModelSpec) -> bool:
    """Whether the head reads the embedding's codes, which then lie in memory once."""
    return spec.tied and EMBEDDING in spec.quantization.gguf


def _with_codes(slot: Slot, spec: ModelSpec) -> Slot:
    """The slot, or what it is where its module keeps the codes of a GGUF file."""
    module = slot.sources[0].removesuffix(".weight") if len(slot.sources) == 1 else ""
    kind = spec.quantization.gguf.get(module)
    if kind is None or not slot.sources[0].endswith(".weight"):
        return slot
    by_rows = spec.quantization.head_candidates and module == spec.head_module
    layout: Layout = "gguf_rows" if by_rows else "gguf"
    return replace(slot, layout=layout, part=None, sources=(f"{module}.codes",), gguf=kind)


def crosses(spec: ModelSpec) -> bool:
    """Whether blocks attend to what an encoder made."""
    return spec.encoder is not None and spec.encoder.read_by.kind == "cross_attention"


def joins(spec: ModelSpec) -> bool:
    """Whether what an encoder made comes before the tokens, in one sequence."""
    return spec.encoder is not None and spec.encoder.read_by.kind == "prefix"


def query_modules_of(spec: ModelSpec) -> int | None:
    """Modules of the multiplicative layer that makes cross-attention's queries; None where they are dense."""
    if spec.encoder is None or spec.encoder.read_by.kind != "cross_attention":
        return None
    return spec.encoder.read_by.query_modules


def convolves(spec: ModelSpec) -> bool:
    """Whether queries, keys and values are convolutions."""
    return spec.attention.projection.endswith("_conv")


def modules_of(spec: ModelSpec) -> int:
    """S of the attention's multiplicative layers and convolutions; 1 where there are none."""
    attention = spec.attention
    kinds = (attention.projection, attention.output)
    return (attention.modules or spec.heads) if any(kind not in ("dense", "none") for kind in kinds) else 1


def _norm(spec: ModelSpec, layer: int, name: str, source: str, width: int | None = None) -> Iterator[Slot]:
    for field in ("weight", "bias") if spec.normalization == "layer" else ("weight",):
        cols = width or spec.d_model
        yield Slot(layer, f"{name}.{field}", "vector", 1, cols, None, (f"{source}.{field}",))


def _norms_around(spec: ModelSpec, layer: int, name: str, source: str) -> Iterator[Slot]:
    """The norms before and behind a part of a layer."""
    if spec.norm_placement != "after":
        yield from _norm(spec, layer, f"{name}_norm", f"{source}_norm")
    if spec.norm_placement != "before":
        yield from _norm(spec, layer, f"{name}_post_norm", f"{source}_post_norm")


def _map(
    layer: int,
    name: str,
    source: str,
    rows: int,
    cols: int,
    part: str,
    modules: int | None = None,
    bits: int | None = None,
) -> Iterator[Slot]:
    """A dense map, one whose weights have few `bits`, or a multiplicative one with so many `modules`."""
    if bits:
        yield _quantized(layer, f"{name}.weight", (source,), rows, cols, bits)
    elif modules is None:
        yield Slot(layer, f"{name}.weight", "spans", rows, cols, part, (f"{source}.weight",))
    else:
        yield Slot(layer, f"{name}.D", "rows", modules, cols, "multiplicative", (f"{source}.D",))
        yield Slot(layer, f"{name}.E", "panels", rows // modules, cols, "multiplicative", (f"{source}.E",))
    yield Slot(layer, f"{name}.bias", "vector", 1, rows, None, (f"{source}.bias",), optional=True)


def _quantized(layer: int, name: str, sources: tuple[str, ...], rows: int, cols: int, bits: int) -> Slot:
    """Maps of `rows` outputs each, whose panels follow each other in turn."""
    stored = tuple(f"{source}.{field}" for source in sources for field in ("codes", "scale", "zero"))
    return Slot(
        layer, name, "quantized", rows * len(sources), cols, None, stored, group=len(sources), bits=bits
    )


def _convolution(layer: int, name: str, source: str, width: int, inputs: int, taps: int) -> Iterator[Slot]:
    weight, bias = f"{source}.weight", f"{source}.bias"
    yield Slot(layer, f"{name}.weight", "taps", width, inputs * taps, "convolution", (weight,), group=taps)
    yield Slot(layer, f"{name}.bias", "vector", 1, width, None, (bias,))


def _own(spec: ModelSpec) -> Iterator[Slot]:
    vocabulary, d_model = spec.vocabulary, spec.d_model
    size = vocabulary.size
    yield Slot(-1, "embedding", "rows", size, d_model, "embedding", ("model.embedding.weight",))
    if spec.positions in ("rotary", "sinusoidal"):
        width = spec.rotary_width if spec.positions == "rotary" else d_model
        yield Slot(-1, "frequencies", "vector", 1, width // 2, None, ())
        if spec.rotary_switch:
            yield Slot(-1, "long_frequencies", "vector", 1, width // 2, None, ())
        if spec.sliding_rotary_base:
            yield Slot(-1, "sliding_frequencies", "vector", 1, width // 2, None, ())
    else:
        names = _tables(spec)
        yield Slot(-1, "positions", "rows", spec.max_positions, d_model, "embedding", names)
    width, modules = spec.merged_width, vocabulary.modules if vocabulary.kind == "multiplicative" else None
    yield from _norm(spec, -1, "norm", "model.norm", width)
    for slot in _map(-1, "head", "head", size, width, "head", modules, spec.quantization.head):
        weight = slot.name == "head.weight"
        yield (
            slot
            if not (weight and spec.tied)
            else Slot(-1, slot.name, "spans", size, d_model, "head", ("model.embedding.weight",))
        )


def _tables(spec: ModelSpec) -> tuple[str, ...]:
    """What the table of positions is made of; positions.py writes out digits and coordinates."""
    source = "model.position_embedding"
    if spec.positions == "digits":
        return f"{source}.weight", f"{source}.start"
    if spec.positions == "axial":
        assert spec.axial
        return tuple(f"{source}.axes.{index}" for index in range(len(spec.axial.shape)))
    return (f"{source}.weight",)


def _attention(spec: ModelSpec, layer: int, prefix: str = "", module: str = "attention") -> Iterator[Slot]:
    """An attention layer, whose packed names begin with `prefix`; `module` is what the model calls it."""
    attention, d_model = spec.attention, spec.d_model
    block = f"model.layers.{layer}"
    yield from _norms_around(spec, layer, f"{prefix}attention", f"{block}.{module}")
    source = f"{block}.{module}.projection"
    without = "key" if attention.share_query_key else None
    modules = modules_of(spec)
    multiplied = modules if attention.projection.startswith("multiplicative") else None
    width, taps = d_model // modules, attention.kernel
    if convolves(spec):
        shared = f"{source}.shared"
        yield from _map(layer, f"{prefix}shared", shared, d_model, d_model, "projection", multiplied)
        values = width if attention.value_concat == "none" else 2 * width
        for name, inputs in (("query", 3 * width), ("key", 3 * width), ("value", values)):
            if name != without:
                at = f"{prefix}{name}_convolution"
                yield from _convolution(layer, at, f"{source}.{name}", width, inputs, taps)
    else:
        for name, rows, rank in (
            ("query", spec.attention_width, spec.query_rank),
            ("key", spec.key_width, spec.key_rank),
            ("value", spec.key_width, None),
        ):
            if name == without:
                continue
            bits = None if name == "value" else spec.quantization.projection
            place, at, cols = f"{source}.{name}", f"{prefix}{name}", d_model
            if rank:
                yield from _map(layer, f"{at}.first", f"{place}.first", rank, cols, "projection", bits=bits)
                place, at, cols = f"{place}.second", f"{at}.second", rank
            yield from _map(layer, at, place, rows, cols, "projection", multiplied, bits)
    for name in ("query_norm", "key_norm") if attention.query_key_norm else ():
        norm = (f"{source}.{name}.weight",)
        width = spec.width_of_head
        if attention.query_key_norm_over == "projection":
            width = spec.attention_width if name == "query_norm" else spec.key_width
        yield Slot(layer, f"{prefix}{name}.weight", "vector", 1, width, None, norm)
    kind, at = attention.output, f"{prefix}output"
    source = f"{block}.{module}.output"
    if kind == "dense":
        width, bits = spec.attention_width, spec.quantization.projection
        yield from _map(layer, at, source, d_model, width, "projection", bits=bits)
    elif kind == "multiplicative":
        yield from _map(layer, at, source, d_model, d_model, "projection", modules)
    elif kind == "multiplicative_conv":
        yield from _map(layer, at, f"{source}.shared", d_model, d_model, "projection", modules)
        convolution = f"{source}.convolution"
        yield from _convolution(layer, f"{at}_convolution", convolution, width, 3 * width, taps)


def _cross_attention(spec: ModelSpec, layer: int) -> Iterator[Slot]:
    """Attention to the encoder's output; its keys and values are made once for a source."""
    d_model, width, modules = spec.d_model, spec.attention_width, query_modules_of(spec)
    source = f"model.layers.{layer}.cross_attention"
    yield from _norm(spec, layer, "cross.attention_norm", f"{source}_norm")
    for name in ("key", "value"):
        place = f"{source}.projection.{name}"
        yield from _map(layer, f"cross.{name}", place, width, d_model, "projection")
    query = f"{source}.projection.query"
    if modules is None:
        yield from _map(layer, "cross.query", query, width, d_model, "projection")
        yield from _map(layer, "cross.output", f"{source}.output", d_model, width, "projection")
        return
    module, taps = d_model // modules, spec.attention.kernel
    yield from _map(layer, "cross.shared", f"{query}.shared", d_model, d_model, "projection", modules)
    yield from _convolution(
        layer, "cross.query_convolution", f"{query}.convolution", module, 3 * module, taps
    )


def _recurrence(spec: ModelSpec, layer: int) -> Iterator[Slot]:
    """The branch beside the feed-forward layer that remembers a few numbers."""
    if spec.sru is None:
        return
    source, d_model, width = f"model.layers.{layer}.sru", spec.d_model, spec.sru.width
    yield from _norm(spec, layer, "sru.norm", f"{source}.norm")
    yield from _map(layer, "sru.enter", f"{source}.enter", width, d_model, "projection")
    for index in range(spec.sru.layers):
        cell = f"{source}.cells.{index}.projection"
        yield from _map(layer, f"sru.cells.{index}", cell, 3 * width, width, "projection")
    yield from _map(layer, "sru.leave", f"{source}.leave", d_model, width, "projection")


def _feed_forward(spec: ModelSpec, layer: int) -> Iterator[Slot]:
    feed_forward, d_model = spec.feed_forward, spec.d_model
    block = f"model.layers.{layer}"
    source = f"{block}.feed_forward"
    units = feed_forward.d_ff
    shared = f"{block}.attention" if spec.shared_norm else None
    yield from _norms_around(spec, layer, "feed_forward", shared or f"{block}.feed_forward")
    if feed_forward.kind == "dense":
        for name in ("gate", "up") if feed_forward.gated else ("up",):
            yield from _map(layer, name, f"{source}.{name}", units, d_model, "units")
        yield from _map(layer, "down", f"{source}.down", d_model, units, "units")
        return
    if feed_forward.kind == "spark":
        yield from _spark(layer, source, feed_forward, d_model)
        return
    names = ["gate", "up", "down"] if feed_forward.gated else ["up", "down"]
    if feed_forward.kind == "mixture":
        router = (f"{source}.router.weight",)
        yield Slot(layer, "router", "spans", feed_forward.experts, d_model, "controller", router)
    else:
        unit_bias = (f"{source}.unit_bias",)
        yield Slot(layer, "unit_bias", "vector", 1, units, None, unit_bias, optional=True)
    if feed_forward.kind == "sparse" and chooses(spec, layer):
        rank, size = feed_forward.rank, feed_forward.block_size
        first, second, bias = (f"{source}.controller.{name}" for name in ("first", "second", "bias"))
        blocks = units // size
        yield Slot(layer, "controller.first", "spans", rank, d_model, "controller", (first,))
        yield Slot(layer, "controller.second", "blocks", units, rank, "controller", (second,), group=size)
        yield Slot(
            layer, "controller.bias", "vector", 1, blocks * padded(size, LANES), None, (bias,), group=size
        )
    elif feed_forward.kind in ("selector", "precision"):
        yield from _copy(spec, layer, source, names[:-1])
    if feed_forward.kind == "precision":
        if spec.units_per_block(layer):
            stored = tuple(
                f"{source}.residual.{name}.{field}" for name in names for field in ("codes", "scale")
            )
            rows = units * len(names)
            yield Slot(layer, "residual", "residual", rows, d_model, None, stored, group=len(names), bits=4)
    else:
        rows_of_units = tuple(f"{source}.{name}" for name in names)
        yield Slot(layer, "units", "units", units * len(names), d_model, "units", rows_of_units)
    if getattr(feed_forward, "bias", True):
        yield Slot(layer, "bias", "vector", 1, d_model, None, (f"{source}.bias",))


def _spark(layer: int, source: str, spec: SparkFeedForwardSpec, d_model: int) -> Iterator[Slot]:
    """A predictor that every token reads whole, and rows of units in two lengths."""
    units, width = spec.d_ff, spec.predictor_width
    yield Slot(layer, "predictor", "spans", units, width, "controller", (f"{source}.predictor",))
    yield Slot(layer, "unit_inputs", "units", units, d_model - width, "units", (f"{source}.up",))
    yield Slot(layer, "units", "units", units, d_model, "units", (f"{source}.down",))


def chooses(spec: ModelSpec, layer: int) -> bool:
    """Whether a layer that chooses units in blocks has to: where all are used, nothing is computed for it."""
    feed_forward = spec.feed_forward
    assert feed_forward.kind in ("sparse", "selector", "precision")
    if (
        getattr(feed_forward, "choice", "top") == "positive"
        or getattr(feed_forward, "gate", "none") != "none"
    ):
        return True
    return spec.units_per_block(layer) < feed_forward.block_size


def _copy(spec: ModelSpec, layer: int, source: str, names: list[str]) -> Iterator[Slot]:
    """What a layer reads of all its units, quantized, and what it chooses some of them with."""
    feed_forward, d_model = spec.feed_forward, spec.d_model
    assert feed_forward.kind in ("selector", "precision")
    units = feed_forward.d_ff
    place = "base" if feed_forward.kind == "precision" else "sketch"
    if place == "base" or chooses(spec, layer):
        sources = tuple(f"{source}.{place}.{name}" for name in names)
        yield _quantized(layer, "sketch", sources, units, d_model, feed_forward.bits)
    if chooses(spec, layer):
        yield Slot(layer, "importance", "vector", 1, units, None, (f"{source}.importance",))
    if feed_forward.kind == "precision":
        yield _quantized(layer, "base.down", (f"{source}.base.down",), d_model, units, feed_forward.bits)
        return
    if feed_forward.choice == "positive":
        yield Slot(layer, "threshold", "vector", 1, units, None, (f"{source}.threshold",))
    if rank := feed_forward.bypass:
        for name, rows, cols in (("first", rank, d_model), ("second", d_model, rank)):
            stored = (f"{source}.bypass.{name}",)
            yield Slot(layer, f"bypass.{name}.weight", "spans", rows, cols, "projection", stored)
