"""Names and shapes of the weights that an architecture has, without building it; torch is not needed."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecli.model.architecture import (
    FeedForwardSpec,
    ModelSpec,
    MultiplicativeVocabularySpec,
    PrecisionFeedForwardSpec,
)
from sparsecli.model.low_bit import GROUP

Shape = tuple[int, ...]


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every tensor in the weight files of `spec`; a tied head is listed, files may leave it out."""
    vocabulary = spec.vocabulary
    shapes: dict[str, Shape] = {"model.embedding.weight": (vocabulary.size, spec.d_model)}
    if spec.positions == "learned":
        shapes["model.position_embedding.weight"] = (spec.max_positions, spec.d_model)
    block = dict(_block(spec))
    for index in range(spec.layers):
        shapes |= {f"model.blocks.{index}.{name}": shape for name, shape in block.items()}
    shapes |= _norm("model.norm", spec)
    if isinstance(vocabulary, MultiplicativeVocabularySpec):
        shapes |= _multiplicative("head", spec.d_model, vocabulary.size, vocabulary.modules)
    else:
        shapes |= _linear("head", spec.d_model, vocabulary.size, vocabulary.bias, spec.low_bit.head)
    return shapes


def _block(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    yield from _norm("attention_norm", spec).items()
    yield from _attention(spec)
    yield from _norm("feed_forward_norm", spec).items()
    for name, shape in _feed_forward(spec.feed_forward, spec.d_model).items():
        yield f"feed_forward.{name}", shape


def _attention(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    attention, d_model = spec.attention, spec.d_model
    modules = attention.modules or spec.heads
    if attention.projection.endswith("_conv"):
        if attention.projection == "dense_conv":
            shared = _linear("shared", d_model, d_model, attention.bias)
        else:
            shared = _multiplicative("shared", d_model, d_model, modules)
        width = d_model // modules
        value_width = width if attention.value_concat == "none" else 2 * width
        made = (
            shared
            | _convolution("query", width, width, attention.kernel, 3)
            | _convolution("key", width, width, attention.kernel, 3)
            | _convolution("value", value_width, width, attention.kernel, 1)
        )
    elif attention.projection == "multiplicative":
        made = {}
        for name in ("query", "key", "value"):
            made |= _multiplicative(name, d_model, d_model, modules)
    else:
        bias, bits = attention.bias, spec.low_bit.projection
        made = _maps("query", d_model, spec.attention_width, bias, bits, spec.query_rank)
        made |= _maps("key", d_model, spec.key_width, bias, bits, spec.key_rank)
        made |= _linear("value", d_model, spec.key_width, bias)
        if attention.query_key_norm:
            made |= dict.fromkeys(("query_norm.weight", "key_norm.weight"), (spec.width_of_head,))
    for name, shape in made.items():
        yield f"attention.projection.{name}", shape

    match attention.output:
        case "dense":
            bias = attention.bias if attention.output_bias is None else attention.output_bias
            bits = spec.low_bit.projection
            yield from _linear("attention.output", spec.attention_width, d_model, bias, bits).items()
        case "multiplicative":
            yield from _multiplicative("attention.output", d_model, d_model, modules).items()
        case "multiplicative_conv":
            width = d_model // modules
            yield from _multiplicative("attention.output.shared", d_model, d_model, modules).items()
            yield from _convolution("attention.output.convolution", width, width, attention.kernel, 3).items()


def _feed_forward(spec: FeedForwardSpec, d_model: int) -> dict[str, Shape]:
    if spec.kind == "dense":
        gate = _linear("gate", d_model, spec.d_ff, spec.bias) if spec.gated else {}
        up, down = (
            _linear("up", d_model, spec.d_ff, spec.bias),
            _linear("down", spec.d_ff, d_model, spec.bias),
        )
        return gate | up | down
    shapes: dict[str, Shape] = {"bias": (d_model,)}
    if spec.kind == "precision":
        return shapes | _precision(spec, d_model)
    shapes |= dict.fromkeys(("up", "down"), (spec.d_ff, d_model))  # unit-major
    if spec.kind == "mixture":
        return shapes | {"router.weight": (spec.experts, d_model)}
    if spec.gated:
        shapes["gate"] = (spec.d_ff, d_model)
    if spec.unit_bias:
        shapes["unit_bias"] = (spec.d_ff,)
    if spec.kind == "sparse":
        return shapes | {
            "controller.first": (spec.rank, d_model),
            "controller.second": (spec.d_ff, spec.rank),
            "controller.bias": (spec.d_ff,),
        }
    shapes["importance"] = (spec.d_ff,)
    for name in ("gate", "up") if spec.gated else ("up",):
        shapes |= _low_bit(f"selector.{name}", d_model, spec.d_ff)
    if spec.choice == "positive":
        shapes["threshold"] = (spec.d_ff,)
    if spec.bypass:
        shapes |= {"bypass.first": (spec.bypass, d_model), "bypass.second": (d_model, spec.bypass)}
    return shapes


def _precision(spec: PrecisionFeedForwardSpec, d_model: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"importance": (spec.d_ff,)}
    if spec.unit_bias:
        shapes["unit_bias"] = (spec.d_ff,)
    for name in ("gate", "up") if spec.gated else ("up",):
        shapes |= _low_bit(f"base.{name}", d_model, spec.d_ff) | _residual(name, d_model, spec.d_ff)
    # The residual of W_down lies unit-major, as it is read.
    return shapes | _low_bit("base.down", spec.d_ff, d_model) | _residual("down", d_model, spec.d_ff)


def _low_bit(name: str, width_in: int, width_out: int) -> dict[str, Shape]:
    groups = -(-width_in // GROUP)
    return {
        f"{name}.codes": (width_out, groups * GROUP // 2),
        f"{name}.scale": (width_out, groups),
        f"{name}.zero": (width_out, groups),
    }


def _residual(name: str, width_in: int, width_out: int) -> dict[str, Shape]:
    shapes = _low_bit(f"residual.{name}", width_in, width_out)
    del shapes[f"residual.{name}.zero"]
    return shapes


def _norm(name: str, spec: ModelSpec) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (spec.d_model,)}
    return weight | ({f"{name}.bias": (spec.d_model,)} if spec.normalization == "layer" else {})


def _linear(
    name: str, width_in: int, width_out: int, bias: bool, bits: int | None = None
) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (width_out, width_in)}
    if bits is not None:
        weight = _low_bit(name, width_in, width_out)
    return weight | ({f"{name}.bias": (width_out,)} if bias else {})


def _maps(
    name: str, width_in: int, width_out: int, bias: bool, bits: int | None, rank: int | None
) -> dict[str, Shape]:
    """One linear map, or two with `rank` numbers between them."""
    if rank is None:
        return _linear(name, width_in, width_out, bias, bits)
    first = _linear(f"{name}.first", width_in, rank, bias=False, bits=bits)
    return first | _linear(f"{name}.second", rank, width_out, bias, bits)


def _multiplicative(name: str, width_in: int, width_out: int, modules: int) -> dict[str, Shape]:
    return {
        f"{name}.D": (modules, width_in),
        f"{name}.E": (width_out // modules, width_in),
        f"{name}.bias": (width_out,),
    }


def _convolution(name: str, width_in: int, width_out: int, length: int, modules: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width_out, length, modules, width_in), f"{name}.bias": (width_out,)}
