"""Every linear layer rounded to second order in the weight type that suits it: the method `rounding`.

One pass over the layers rounds each linear layer into every type of GGUF that fits its width, and estimates what that
adds to the loss. A budget then picks a type for each of them, without another pass: see `linear_layers.choose_types`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsecli.console import progress
from sparsecli.convert.linear_layers import (
    EMBEDDING,
    HEAD,
    LinearLayer,
    TypeChoice,
    TypeOption,
    linear_layers,
    with_types,
)
from sparsecli.convert.methods.calibration import ResidualStreams
from sparsecli.convert.methods.fitting import COPIED_FIELDS
from sparsecli.convert.methods.rounding import InputMoment, round_to_type
from sparsecli.convert.streaming import in_float32
from sparsecli.interchange.safetensors_files import write_shards
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.gguf_types import TYPES, panels_of

GRADIENT_TOKENS = 2048
"""Calibration tokens on which gradients are taken."""
CHECKED = 8
"""One of so many calibration batches serves to measure errors on inputs that no fit has seen."""


class RoundedLayers:
    """The linear layers of a dense model in every type, rounded once and kept in a folder.

    A file for each layer holds the codes (`MODULE TYPE`) and the squared errors of the outputs (`MODULE TYPE error`).
    """

    def __init__(
        self, dense: ScalingTransformerForCausalLM, folder: Path, types: Sequence[str] | None = None
    ) -> None:
        """With `types`: no others."""
        self.dense, self.folder, self.types = dense, folder, types
        self.layers = linear_layers(dense.config.spec)

    def types_of(self, layer: LinearLayer) -> list[str]:
        """The types into which a layer is rounded."""
        return [kind for kind in layer.types if self.types is None or kind in self.types]

    def fit(self, batches: Sequence[Tensor], keep: Callable[[Path, dict[str, Tensor]], None]) -> None:
        """Round what is not rounded yet, for token ids (B, T).

        Args:
            keep: writes a file that is complete or absent.
        """
        model = self.dense.model
        seen, checked = _split(batches)
        streams = ResidualStreams(self.dense, [*seen, *checked])
        with progress("rounding every layer in every type", len(model.layers) + 1) as bar, torch.no_grad():
            for index, layer in enumerate(model.layers):
                widened, file = in_float32(layer), self._file(f"layer-{index}")
                prefix = f"model.layers.{index}."
                fits = [each for each in self.layers if each.name.startswith(prefix) and self.types_of(each)]
                modules = {each.name: widened.get_submodule(each.name.removeprefix(prefix)) for each in fits}
                if file.exists():
                    modules = {}
                groups = _pass_and_record(widened, modules, streams, index, len(seen))
                if modules:
                    keep(file, self._round(modules, groups))
                bar.advance()
            head, file = self.layers[-1], self._file("head")
            if self.types_of(head) and not file.exists():
                norm = in_float32(model.norm)
                linear = in_float32(self.dense.head)
                group = _Inputs.of([head.name], head.cols)
                for at, x in enumerate(streams.x):
                    group.add(norm(x), at < len(seen))
                keep(file, self._round({head.name: linear}, [group]))
            bar.advance()

    def _round(self, modules: Mapping[str, nn.Module], groups: Sequence[_Inputs]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        layers = {each.name: each for each in self.layers}
        for group in groups:
            inputs = group.moment
            for name in group.names:
                linear = modules[name]
                assert isinstance(linear, nn.Linear)
                for kind in self.types_of(layers[name]):
                    parts, made = round_to_type(TYPES[kind], linear.weight, inputs)
                    found[f"{name} {kind}"] = torch.from_numpy(panels_of(TYPES[kind], parts))
                    found[f"{name} {kind} error"] = group.errors(made - linear.weight)
        return found

    def options(self, gradients: Mapping[str, Tensor]) -> list[TypeOption]:
        """All types of all layers with their estimated increases of the loss.

        Args:
            gradients: see `output_gradients`.
        """
        found = []
        for layer in self.layers:
            if layer.kept:
                found.append(TypeOption(layer, layer.kept, layer.bytes(layer.kept), 0.0))
            if not self.types_of(layer):
                continue
            squares = gradients[HEAD if layer.name == EMBEDDING else layer.name].double()
            with safe_open(self._file_of(layer), framework="pt") as file:
                for kind in self.types_of(layer):
                    errors = file.get_tensor(f"{layer.name} {kind} error").double()
                    increase = 0.5 * float(squares @ errors)
                    found.append(TypeOption(layer, kind, layer.bytes(kind), increase))
        return found

    def write(self, choice: TypeChoice, target: Path) -> None:
        """Write the weights and the configuration of a choice into a new folder."""
        config = self.dense.config
        target.mkdir(parents=True)
        changed = {
            each.name: each for each in self.layers if choice.types.get(each.name, each.kept) != each.kept
        }
        tensors: list[tuple[int, Callable[[], dict[str, Tensor]]]] = []
        for name, tensor in self.dense.state_dict().items():
            module = name.rpartition(".")[0]
            if name == "head.weight" and config.spec.tied:
                continue
            if module in changed and not name.endswith("bias"):
                codes = partial(self._codes, changed[module], choice.types[module])
                tensors.append((changed[module].bytes(choice.types[module]), codes))
            else:
                tensors.append((tensor.nbytes, partial(dict, {name: tensor})))
        write_shards(target, tensors, lambda item: item[0], lambda item: item[1](), "writing the model")
        made = ScalingTransformerConfig.from_spec(
            with_types(config.spec, choice.types),
            **{name: getattr(config, name) for name in COPIED_FIELDS},
            architectures=config.architectures,
            dtype=str(self.dense.dtype).removeprefix("torch."),
        )
        made.save_pretrained(target)

    def _codes(self, layer: LinearLayer, kind: str) -> dict[str, Tensor]:
        with safe_open(self._file_of(layer), framework="pt") as file:
            return {f"{layer.name}.codes": file.get_tensor(f"{layer.name} {kind}")}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _file_of(self, layer: LinearLayer) -> Path:
        parts = layer.name.split(".")
        return self._file(f"layer-{parts[2]}" if parts[1:2] == ["layers"] else "head")


@dataclass
class _Inputs:
    """The inputs that some linear layers share.

    Attributes:
        names: of the layers.
        total: sum of x x^T (d, d) over `tokens` tokens, float64.
        checked: inputs (tokens, d) on which errors are measured.
    """

    names: list[str]
    total: Tensor
    tokens: int
    checked: list[Tensor]

    @classmethod
    def of(cls, names: list[str], width: int) -> _Inputs:
        """Nothing yet."""
        return cls(names, torch.zeros(width, width, dtype=torch.float64), 0, [])

    def add(self, x: Tensor, fitted: bool) -> None:
        """Inputs (B, T, d), for the fit or for the errors."""
        x = x.flatten(0, -2)
        if fitted:
            self.total += x.T @ x
            self.tokens += len(x)
        else:
            self.checked.append(x)

    @property
    def moment(self) -> InputMoment:
        """The mean of x x^T."""
        return InputMoment(self.total / self.tokens)

    def errors(self, change: Tensor) -> Tensor:
        """Mean square (rows,) of what a change (rows, d) of the weights changes in every output."""
        squares = sum((x @ change.T).square().sum(dim=0) for x in self.checked)
        assert isinstance(squares, Tensor)
        return squares / sum(len(x) for x in self.checked)


def _pass_and_record(
    layer: nn.Module, linears: Mapping[str, nn.Module], streams: ResidualStreams, index: int, fitted: int
) -> list[_Inputs]:
    """Pass all batches through `layer`, and record the inputs of its linear layers; the first `fitted` are for fits."""
    latest: dict[str, Tensor] = {}
    groups: dict[tuple[str, ...], _Inputs] = {}
    handles = []
    for name, linear in linears.items():

        def see(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            latest[name] = arguments[0]

        handles.append(linear.register_forward_pre_hook(see))
    try:
        for at, x in enumerate(streams.x):
            streams.x[at] = layer(x, *streams.arguments[at][index])
            same: dict[int, list[str]] = {}
            for name, seen in latest.items():
                same.setdefault(id(seen), []).append(name)
            for names in same.values():
                inputs = latest[names[0]]
                if (key := tuple(names)) not in groups:
                    groups[key] = _Inputs.of(names, inputs.shape[-1])
                groups[key].add(inputs, at < fitted)
    finally:
        for handle in handles:
            handle.remove()
    return list(groups.values())


def _split(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The batches for fits, and those on which errors are measured; a single batch serves for both."""
    if len(batches) == 1:
        return list(batches), list(batches)
    return [batch for at, batch in enumerate(batches) if at % CHECKED], list(batches[::CHECKED])
