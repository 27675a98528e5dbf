"""Names and shapes of the weights that an architecture has, without building it; torch is not needed."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecli.model.gguf_types import SKETCH, TYPES
from sparsecli.model.quantization import GROUP
from sparsecli.spec.attention import AttentionSpec
from sparsecli.spec.feed_forward import FeedForwardSpec, PrecisionFeedForwardSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.spec.positions import DIGIT_BASES, DIGITS
from sparsecli.spec.vision import CHANNELS, VisionSpec
from sparsecli.spec.vocabulary import MultiplicativeVocabularySpec

Shape = tuple[int, ...]


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every tensor in the weight files of `spec`; a tied head is listed, files may leave it out.

    Raises:
        ValueError: GGUF's types of modules that there are not, or whose width does not suit them.
    """
    vocabulary = spec.vocabulary
    shapes: dict[str, Shape] = {"model.embedding.weight": (vocabulary.size, spec.d_model)}
    shapes |= _named("model.position_embedding", _positions(spec, spec.max_positions))
    for index in range(spec.layers):
        shapes |= _named(f"model.layers.{index}", dict(_decoder_block(spec)))
    shapes |= _norm("model.norm", spec, spec.merged_width)
    shapes |= _named("model.encoder", dict(_encoder(spec)))
    if isinstance(vocabulary, MultiplicativeVocabularySpec):
        shapes |= _multiplicative("head", spec.merged_width, vocabulary.size, vocabulary.modules)
    else:
        shapes |= _linear("head", spec.merged_width, vocabulary.size, vocabulary.bias, spec.quantization.head)
    for module, name in spec.quantization.gguf.items():
        rows, cols = _matrix(f"{module}.weight", shapes)
        kind = TYPES[name]
        if cols % kind.block:
            raise ValueError(
                f"quantization.gguf: {module} has {cols} columns, {name} needs a multiple of {kind.block}"
            )
        del shapes[f"{module}.weight"]
        if spec.quantization.head_candidates and module == spec.head_module:
            shapes[f"{module}.codes"] = (rows, kind.row_bytes(cols))  # as in the file
            shapes["head.sketch"] = SKETCH.panel_shape(rows, cols)
        else:
            shapes[f"{module}.codes"] = kind.panel_shape(rows, cols)
        if spec.tied and module == "model.embedding":
            del shapes["head.weight"]
    return shapes


def vision_tensor_shapes(spec: VisionSpec) -> dict[str, Shape]:
    """Shape of every tensor in the weight files of a model of images."""
    stack, patch = spec.stack, CHANNELS * spec.patch_size**2
    shapes = _linear("model.embedding.projection", patch, spec.d_model, bias=True)
    if spec.leading:
        shapes["model.embedding.class_token"] = (spec.d_model,)
    shapes |= _named("model.position_embedding", _positions(stack, spec.positions))
    block = _norm("attention_norm", stack)
    block |= _named("attention", dict(_attention(stack, spec.attention, axes=2)))
    block |= dict(_units(stack, spec.feed_forward))
    for index in range(spec.layers):
        shapes |= _named(f"model.layers.{index}", block)
    return shapes | _norm("model.norm", stack) | _linear("head", spec.d_model, spec.classes, bias=True)


def _matrix(name: str, shapes: dict[str, Shape]) -> Shape:
    """The shape of a matrix that may keep a GGUF file's codes."""
    if name not in shapes or len(shapes[name]) != 2:
        raise ValueError(
            f"quantization.gguf: the model has no linear layer or embedding {name.rpartition('.')[0]}"
        )
    return shapes[name]


def _named(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _positions(spec: ModelSpec, max_positions: int) -> dict[str, Shape]:
    match spec.positions:
        case "learned":
            return {"weight": (max_positions, spec.d_model)}
        case (
            "digits"
        ):  # for each base and digit the vector that it multiplies; what is added at the first position
            return {"weight": (len(DIGIT_BASES), DIGITS, spec.d_model // DIGITS), "start": (spec.d_model,)}
        case "axial":
            assert spec.axial
            axes = zip(spec.axial.shape, spec.axial.widths, strict=True)
            return {f"axes.{index}": axis for index, axis in enumerate(axes)}
    return {}


def _decoder_block(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    for name in ("attention", "second_attention")[: spec.attention_layers]:
        yield from _norms_around(name, spec).items()
        yield from _named(name, dict(_attention(spec, spec.attention))).items()
    if spec.encoder and spec.encoder.read_by.kind == "cross_attention":
        yield from _norm("cross_attention_norm", spec).items()
        yield from _named(
            "cross_attention", _cross_attention(spec, spec.encoder.read_by.query_modules)
        ).items()
    yield from _units(spec, spec.feed_forward)


def _units(spec: ModelSpec, feed_forward: FeedForwardSpec) -> Iterator[tuple[str, Shape]]:
    """A feed-forward layer and the recurrent branch beside it."""
    norms = _norms_around("feed_forward", spec)
    yield from () if spec.shared_norm else norms.items()
    yield from _named("feed_forward", _feed_forward(feed_forward, spec.d_model)).items()
    if spec.sru:
        width = spec.sru.width
        yield from _norm("sru.norm", spec).items()
        yield from _linear("sru.enter", spec.d_model, width, bias=True).items()
        for index in range(spec.sru.layers):
            yield from _linear(f"sru.cells.{index}.projection", width, 3 * width, bias=True).items()
        yield from _linear("sru.leave", width, spec.d_model, bias=True).items()


def _encoder(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    encoder = spec.encoder
    if encoder is None:
        return
    yield from _named("position_embedding", _positions(spec, encoder.max_positions)).items()
    block = _norm("attention_norm", spec) | _named("attention", dict(_attention(spec, encoder.attention)))
    block |= dict(_units(spec, encoder.feed_forward or spec.feed_forward))
    for index in range(encoder.layers):
        yield from _named(f"layers.{index}", block).items()
    if encoder.read_by.kind == "prefix":
        if encoder.read_by.streams == 2:
            return
        yield from _linear("merge", spec.d_model, spec.d_model, bias=True).items()
    yield from _norm("norm", spec).items()


def _cross_attention(spec: ModelSpec, query_modules: int | None) -> dict[str, Shape]:
    d_model, width, bias = spec.d_model, spec.attention_width, spec.attention.bias
    shapes = _linear("projection.key", d_model, width, bias) | _linear(
        "projection.value", d_model, width, bias
    )
    if query_modules is None:
        shapes |= _linear("projection.query", d_model, width, bias) | _linear("output", width, d_model, bias)
        return shapes
    module = d_model // query_modules
    shapes |= _multiplicative("projection.query.shared", d_model, d_model, query_modules)
    return shapes | _convolution("projection.query.convolution", module, module, spec.attention.kernel, 3)


def _attention(spec: ModelSpec, attention: AttentionSpec, axes: int = 1) -> Iterator[tuple[str, Shape]]:
    """`axes` of positions that convolutions run along: 2 over the patches of an image."""
    d_model = spec.d_model
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
            | _convolution("query", width, width, attention.kernel, 3, axes)
            | _convolution("key", width, width, attention.kernel, 3, axes)
            | _convolution("value", value_width, width, attention.kernel, 1, axes)
        )
    elif attention.projection == "multiplicative":
        made = {}
        for name in ("query", "key", "value"):
            made |= _multiplicative(name, d_model, d_model, modules)
    else:
        bias, bits = attention.bias, spec.quantization.projection
        held = spec.width_of_head * (attention.key_value_heads or spec.heads)
        ranks = (spec.query_rank, spec.key_rank) if attention.query_key_rank else (None, None)
        made = _low_rank("query", d_model, spec.attention_width, bias, bits, ranks[0])
        made |= _low_rank("key", d_model, held, bias, bits, ranks[1])
        made |= _linear("value", d_model, held, bias)
        if attention.query_key_norm:
            widths = (spec.width_of_head,) * 2
            if attention.query_key_norm_over == "projection":
                widths = spec.attention_width, held
            made |= {"query_norm.weight": widths[:1], "key_norm.weight": widths[1:]}
    for name, shape in made.items():
        if not (attention.share_query_key and name.partition(".")[0] == "key"):
            yield f"projection.{name}", shape

    match attention.output:
        case "dense":
            bias = attention.bias if attention.output_bias is None else attention.output_bias
            bits = spec.quantization.projection
            yield from _linear("output", spec.attention_width, d_model, bias, bits).items()
        case "multiplicative":
            yield from _multiplicative("output", d_model, d_model, modules).items()
        case "multiplicative_conv":
            width = d_model // modules
            yield from _multiplicative("output.shared", d_model, d_model, modules).items()
            yield from _convolution("output.convolution", width, width, attention.kernel, 3).items()


def _feed_forward(spec: FeedForwardSpec, d_model: int) -> dict[str, Shape]:
    if spec.kind == "dense":
        gate = _linear("gate", d_model, spec.d_ff, spec.bias) if spec.gated else {}
        up, down = (
            _linear("up", d_model, spec.d_ff, spec.bias),
            _linear("down", spec.d_ff, d_model, spec.bias),
        )
        return gate | up | down
    if spec.kind == "spark":
        return {
            "predictor": (spec.d_ff, spec.predictor_width),
            "up": (spec.d_ff, d_model - spec.predictor_width),
            "down": (spec.d_ff, d_model),
        }
    shapes: dict[str, Shape] = {"bias": (d_model,)}
    if spec.kind == "precision":
        return shapes | _precision(spec, d_model)
    shapes |= dict.fromkeys(("up", "down"), (spec.d_ff, d_model))  # unit-major
    if spec.gated:
        shapes["gate"] = (spec.d_ff, d_model)
    if spec.kind == "mixture":
        if not spec.bias:
            del shapes["bias"]
        return shapes | {"router.weight": (spec.experts, d_model)}
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
        shapes |= _quantized(f"sketch.{name}", d_model, spec.d_ff)
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
        shapes |= _quantized(f"base.{name}", d_model, spec.d_ff) | _residual(name, d_model, spec.d_ff)
    # The residual of W_down lies unit-major, as it is read.
    return shapes | _quantized("base.down", spec.d_ff, d_model) | _residual("down", d_model, spec.d_ff)


def _quantized(name: str, width_in: int, width_out: int) -> dict[str, Shape]:
    groups = -(-width_in // GROUP)
    return {
        f"{name}.codes": (width_out, groups * GROUP // 2),
        f"{name}.scale": (width_out, groups),
        f"{name}.zero": (width_out, groups),
    }


def _residual(name: str, width_in: int, width_out: int) -> dict[str, Shape]:
    shapes = _quantized(f"residual.{name}", width_in, width_out)
    del shapes[f"residual.{name}.zero"]
    return shapes


def _norm(name: str, spec: ModelSpec, width: int | None = None) -> dict[str, Shape]:
    shape = (width or spec.d_model,)
    weight: dict[str, Shape] = {f"{name}.weight": shape}
    return weight | ({f"{name}.bias": shape} if spec.normalization == "layer" else {})


def _norms_around(name: str, spec: ModelSpec) -> dict[str, Shape]:
    """The norms before and behind a part of a layer."""
    before = {} if spec.norm_placement == "after" else _norm(f"{name}_norm", spec)
    return before if spec.norm_placement == "before" else before | _norm(f"{name}_post_norm", spec)


def _linear(
    name: str, width_in: int, width_out: int, bias: bool, bits: int | None = None
) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (width_out, width_in)}
    if bits is not None:
        weight = _quantized(name, width_in, width_out)
    return weight | ({f"{name}.bias": (width_out,)} if bias else {})


def _low_rank(
    name: str, width_in: int, width_out: int, bias: bool, bits: int | None, rank: int | None
) -> dict[str, Shape]:
    """A linear layer, or two of rank `rank`."""
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


def _convolution(
    name: str, width_in: int, width_out: int, length: int, modules: int, axes: int = 1
) -> dict[str, Shape]:
    shape = (width_out, *[length] * axes, modules, width_in)
    return {f"{name}.weight": shape, f"{name}.bias": (width_out,)}
