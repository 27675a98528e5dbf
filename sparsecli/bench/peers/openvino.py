"""OpenVINO: our own model's step, converted to a stateful graph in the form that its CPU plugin fuses."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecli.bench.peers.decode_step import GrowingStep
from sparsecli.spec.model import ModelSpec

# If this package is found, OpenVINO sends telemetry at its import; without it OpenVINO uses a stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402
from openvino import opset13 as operations  # noqa: E402
from openvino._offline_transformations import apply_make_stateful_transformation  # noqa: E402
from openvino.frontend import FrontEndManager  # noqa: E402
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder  # noqa: E402

TYPES = {"float32": "f32", "bfloat16": "bf16"}
EXAMPLE_POSITIONS = 7  # positions of the caches in the trace; any number except 0 and 1


def refusal(spec: ModelSpec, dtype: str) -> str | None:
    """See `PeerModule.refusal`."""
    return None


def load(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: str, capacity: int, threads: int
) -> OpenVinoDecoder:
    """See `PeerModule.load`."""
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": TYPES[dtype],
        "KV_CACHE_PRECISION": TYPES[dtype],
    }
    compiled = openvino.Core().compile_model(stateful(GrowingStep(spec, weights), capacity), "CPU", options)
    return OpenVinoDecoder(compiled, options)


def stateful(step: GrowingStep, capacity: int) -> Any:
    """The step as a stateful OpenVINO model, with the inputs token, position and beam order.

    The plugin fuses attention with its cache if states start empty, are reordered by beam, and are concatenated with
    the new keys and values.
    """
    example = step.new_caches(EXAMPLE_POSITIONS)
    past = torch.export.Dim("past", min=0, max=max(capacity, EXAMPLE_POSITIONS + 1))
    growing = [{2: past} if cache.dim() == 4 else None for cache in example]
    inputs = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), _quiet():
        exported = torch.export.export(step, (*inputs, *example), dynamic_shapes=(None, None, tuple(growing)))
        decoder = TorchFXPythonDecoder.from_exported_program(exported)
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))

    for index, port in enumerate(model.inputs):
        port.get_tensor().set_names({f"in{index}"})
    for index, port in enumerate(model.outputs):
        port.get_tensor().set_names({f"out{index}"})
    shapes = {f"in{index + 2}": [*cache.shape] for index, cache in enumerate(example)}
    for name, cache in zip(shapes, example, strict=True):
        if cache.dim() == 4:
            shapes[name][2] = -1
    model.reshape({"in0": [1, 1], "in1": [1], **shapes})
    _reorder_by_beam(model, [name for name, shape in shapes.items() if len(shape) == 4])
    outputs = [f"out{index + 1}" for index in range(len(shapes))]
    apply_make_stateful_transformation(model, dict(zip(shapes, outputs, strict=True)))
    _start_empty(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of torch about itself, and of the converter about operations that this torch lacks."""
    earlier = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(earlier)


def _reorder_by_beam(model: Any, names: Sequence[str]) -> None:
    beams = operations.parameter([1], openvino.Type.i32, name="beams")
    beams.output(0).get_tensor().add_names({"beams"})
    model.add_parameters([beams])
    for name in names:
        held = model.input(name).get_node()
        readers = held.output(0).get_target_inputs()
        reordered = operations.gather(held, beams, operations.constant(0, openvino.Type.i32))
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
    model.validate_nodes_and_infer_types()


def _start_empty(model: Any) -> None:
    """Set the initial value of every state: zeros, without positions for caches that grow."""
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            sizes = [0 if size.is_dynamic else size.get_length() for size in node.get_output_partial_shape(0)]
            zero = operations.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([operations.broadcast(zero, operations.constant(np.array(sizes)))])
    model.validate_nodes_and_infer_types()


class OpenVinoDecoder:
    """See `PeerDecoder`."""

    def __init__(self, compiled: Any, options: Mapping[str, Any]) -> None:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        self.settings = f"openvino {openvino.__version__.split('-')[0]}, stateful, {given}"
        self.request = compiled.create_infer_request()
        self.states = self.request.query_state()
        self.prompt: list[Any] = []
        self.context = self.position = 0
        self.beams = np.zeros(1, dtype=np.int32)

    def prefill(self, tokens: Sequence[int]) -> None:
        """See `PeerDecoder.prefill`; token by token."""
        self.request.reset_state()
        self.position = 0
        for token in tokens:
            self.step(token)
        self.prompt = [_copy(state.state) for state in self.states]
        self.context = self.position

    def rewind(self) -> None:
        """See `PeerDecoder.rewind`."""
        for state, held in zip(self.states, self.prompt, strict=True):
            state.state = held
        self.position = self.context

    def step(self, token: int) -> tuple[int, None]:
        """See `PeerDecoder.step`."""
        inputs = [np.array([[token]]), np.array([self.position]), self.beams]
        found = self.request.infer(inputs, share_inputs=True, share_outputs=True)
        self.position += 1
        return int(found[0].flat[0]), None


def _copy(tensor: Any) -> Any:
    copy = openvino.Tensor(tensor.element_type, tensor.shape)
    tensor.copy_to(copy)
    return copy
