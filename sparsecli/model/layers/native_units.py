"""Sparse FF on a CPU from chosen rows alone, in the native engine's library: values, and exact gradients.

The mask stands before the activation, so a unit that is not chosen has the value act(0) = 0, and no weight of it gets
a gradient. With ReLU, whose slope at 0 is 0, the mask of such a unit gets none either; the controller then learns from
the chosen units' masks alone. A training step whose choices are hard therefore needs no other rows. The masked product
in `feed_forward.py` computes the same function, and is the readable twin.

Everything is computed in float32, within autocast too. Results do not depend on the number of threads, but for the
controller's first factor, which is a matrix product of PyTorch.
"""

from __future__ import annotations

import weakref
from ctypes import byref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparsecli import console
from sparsecli.decode.native import binding
from sparsecli.model.layers import exploring
from sparsecli.model.layers.choices import recorded_choice
from sparsecli.model.layers.tracing import tracing

if TYPE_CHECKING:
    from sparsecli.model.layers.feed_forward import SparseFeedForward

ACTIVATIONS = ("relu", "gelu", "silu", "gelu_tanh")  # numbered as in native/ops/ops.h
LARGEST_SHARE = 4
"""Rows are used where at most one of so many units is chosen: of more, dense products are faster."""
LARGEST_BLOCK = 4096


def usable(layer: SparseFeedForward, x: Tensor) -> bool:
    """Whether `chosen_rows` computes the layer for x (tokens, d); a training call on a CPU says why not, once."""
    if x.device.type != "cpu" or tracing() or torch.compiler.is_compiling():
        return False
    reason = _obstacle(layer)
    if reason and layer.training:
        console.say_once(f"Sparse FF computes every unit in training: {reason}")
    return reason is None


def _obstacle(layer: SparseFeedForward) -> str | None:
    k, size = layer.units_per_block, layer.block_size
    if layer.training and layer.hard_fraction < 1:
        return f"hard_fraction is {layer.hard_fraction:g}, and soft choices use every unit"
    if layer.training and layer.activation != "relu":
        return f"with {layer.activation} instead of relu the controller learns from every unit"
    if LARGEST_SHARE * k > size:
        return f"{k} of {size} units are chosen, for which the dense product is faster"
    if size > LARGEST_BLOCK:
        return f"blocks of more than {LARGEST_BLOCK} units are not supported"
    if not {layer.up.dtype, layer.controller.first.dtype} <= {torch.float32, torch.bfloat16}:
        return f"weights are {layer.up.dtype}"
    return binding.available()


def chosen_rows(layer: SparseFeedForward, x: Tensor) -> Tensor:
    """The layer's output for x (tokens, d), before dropout, with hard choices: noisy ones in training."""
    controller, training = layer.controller, layer.training
    with torch.autocast("cpu", enabled=False):
        hidden = F.linear(x.float(), controller.first.float())  # (tokens, r)
    weights = hidden, controller.second.float(), controller.bias.float()
    temperature = layer.temperature if training else 0.0
    # Drawn outside `recorded_choice`: repeated passes must draw as often.
    seed = int(torch.randint(2**62, ())) if temperature > 0 else 0
    chosen = recorded_choice(
        lambda: choose_units(*weights, layer.block_size, layer.units_per_block, temperature, seed),
        below=layer.block_size,
    ).int()
    mask = scale = None
    if training or layer.probability_gate:
        # Straight through: the mask is 1, its gradient the probability's.
        mask = scale = _Probabilities.apply(*weights, chosen, layer.block_size, layer.probability_gate)
        if training:
            scale = scale.detach() if layer.probability_gate else None
        else:
            mask = None
    y = _ChosenUnits.apply(
        x, layer.gate, layer.up, layer.down, layer.unit_bias, layer.bias, mask, scale, chosen,
        layer.block_size, layer.activation,
    )  # fmt: skip
    if training and layer.explored_fraction:
        explored, period = exploring.draw(layer.explored_fraction, len(x))
        with torch.no_grad():
            values = layer.values(x[explored])
        y = exploring.Unchosen.apply(
            y, *weights, values, layer.down, chosen, explored, period, layer.probability_gate
        )
    return y.to(torch.promote_types(x.dtype, layer.bias.dtype))


def choose_units(
    hidden: Tensor,
    second: Tensor,
    bias: Tensor,
    block_size: int,
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The units of each block with the largest noisy logits, int32 (tokens, blocks, count), the best first.

    Args:
        hidden, second, bias: (tokens, r), (d_ff, r) and (d_ff), float32; logits are hidden second^T + bias.
        temperature, seed: scale of the Gumbel noise, and what it is a function of, with the token and the unit.
    """
    hidden, second, bias = (_floats(value.detach()) for value in (hidden, second, bias))
    chosen = hidden.new_empty(len(hidden), len(bias) // block_size, count, dtype=torch.int32)
    controller = _controller(hidden, second, bias, block_size, count)
    binding.call("controller_choose", byref(controller), True, temperature, seed, chosen.data_ptr(), None)
    return chosen


class _Probabilities(torch.autograd.Function):
    """Softmax probabilities of chosen units (tokens, blocks, k); ones, with the same gradients, unless `values`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, second: Tensor, bias: Tensor, chosen: Tensor, block_size: int, values: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden, second, bias, chosen)
        ctx.block_size = block_size
        if not values:
            return torch.ones_like(chosen, dtype=torch.float32)
        p = torch.empty_like(chosen, dtype=torch.float32)
        hidden, second, bias = map(_floats, (hidden, second, bias))
        controller = _controller(hidden, second, bias, block_size, chosen.shape[-1])
        binding.call("controller_choose", byref(controller), False, 0, 0, chosen.data_ptr(), p.data_ptr())
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        *weights, chosen = ctx.saved_tensors
        hidden, second, bias = map(_floats, weights)
        dp = _floats(dp)
        made = [torch.empty_like(value) for value in (hidden, second, bias)]
        controller = _controller(hidden, second, bias, ctx.block_size, chosen.shape[-1])
        addresses = [value.data_ptr() for value in (chosen, dp, *made)]
        binding.call("controller_backward", byref(controller), *addresses)
        return *made, None, None, None


class _ChosenUnits(torch.autograd.Function):
    """The sum of chosen units' rows: x (tokens, d) -> (tokens, d), float32.

    `mask` and `scale` are like chosen (tokens, blocks, k): `mask` multiplies what enters the activation, is always 1,
    and only gets a gradient; `scale` multiplies what leaves it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        unit_bias: Tensor | None,
        bias: Tensor,
        mask: Tensor | None,
        scale: Tensor | None,
        chosen: Tensor,
        block_size: int,
        activation: str,
    ) -> Tensor:
        ctx.block_size, ctx.activation = block_size, activation
        units, _held = _units(x, gate, up, down, unit_bias, bias, scale, chosen, block_size, activation)
        before = torch.empty_like(chosen, dtype=torch.float32)
        raised = torch.empty_like(before) if gate is not None else None
        y = x.new_empty(x.shape, dtype=torch.float32)
        binding.call("units_forward", byref(units), before.data_ptr(), _address(raised), y.data_ptr())
        ctx.save_for_backward(x, gate, up, down, unit_bias, bias, scale, chosen, before, raised)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, unit_bias, bias, scale, chosen, before, raised = ctx.saved_tensors
        units, _held = _units(
            x, gate, up, down, unit_bias, bias, scale, chosen, ctx.block_size, ctx.activation
        )
        like = (x, gate, up, down, unit_bias, bias, before, scale)
        made = [
            _gradient_of(value) if needed else None
            for value, needed in zip(like, ctx.needs_input_grad, strict=False)
        ]
        dx, dgate, dup, ddown, dunit_bias, dbias, dmask, dscale = map(_address, made)
        first, second = (dup, None) if gate is None else (dgate, dup)
        gradients = binding.UnitGradients(dx, first, second, ddown, dunit_bias, dbias, dmask, dscale)
        dy = _floats(dy)
        binding.call(
            "units_backward",
            byref(units), before.data_ptr(), _address(raised), dy.data_ptr(), byref(gradients),
        )  # fmt: skip
        return *made, None, None, None


def _units(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    unit_bias: Tensor | None,
    bias: Tensor,
    scale: Tensor | None,
    chosen: Tensor,
    block_size: int,
    activation: str,
) -> tuple[binding.Units, list[Tensor | None]]:
    """The structure of native/training.h, and the tensors that it points into."""
    narrow = {value.dtype for value in (gate, up, down) if value is not None} == {torch.bfloat16}
    weights = [
        value if value is None else value.contiguous() if narrow else _floats(value)
        for value in ((up, None, down) if gate is None else (gate, up, down))
    ]
    held = [*weights, *(_floats(value) for value in (unit_bias, bias, x)), chosen, _floats(scale)]
    sizes = (len(x), x.shape[-1], len(up), block_size, chosen.shape[-1])
    kinds = (ACTIVATIONS.index(activation), int(narrow), torch.get_num_threads())
    return binding.Units(*sizes, *kinds, *map(_address, held)), held


def _controller(
    hidden: Tensor, second: Tensor, bias: Tensor, block_size: int, count: int
) -> binding.ControllerWeights:
    sizes = (len(hidden), len(second), block_size, count, hidden.shape[-1], torch.get_num_threads())
    return binding.ControllerWeights(*sizes, *(value.data_ptr() for value in (hidden, second, bias)))


_gradient_memory: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of each weight: memory for its gradient, and a weak reference to the part of it that was handed out last."""


def _gradient_of(value: Tensor) -> Tensor:
    """An empty float32 tensor for the gradient of `value`.

    Weights get the memory of their last gradient once no tensor uses it. In new memory a gradient takes much longer to
    write, because the system clears every page.
    """
    if not value.is_leaf:
        return torch.empty_like(value, dtype=torch.float32, memory_format=torch.contiguous_format)
    memory, in_use = _gradient_memory.get(value, (None, None))
    if memory is None or memory.shape != value.shape or in_use() is not None:
        memory = torch.empty(value.shape, dtype=torch.float32).numpy()
    handed_out = memory[...]  # lives as long as the tensor and its views
    _gradient_memory[value] = memory, weakref.ref(handed_out)
    return torch.from_numpy(handed_out)


def _floats(value: Tensor | None) -> Any:
    return None if value is None else value.float().contiguous()


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()
