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
from torch.nn import functional as F

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
from sparsecli.convert.streaming import LOGITS_AT_ONCE, in_float32
from sparsecli.interchange.safetensors_files import write_shards
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.gguf_types import SKETCH, TYPES, arrange, panels_of, restore, values
from sparsecli.model.layers.gguf import GgufWeight, rescored

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

    def _candidates_of(self, layer: LinearLayer) -> list[int]:
        return layer.candidates if self.types is None else []

    def fit(self, batches: Sequence[Tensor], keep: Callable[[Path, dict[str, Tensor]], None]) -> None:
        """Round what is not rounded yet, for token ids (B, T).

        Args:
            keep: writes a file that is complete or absent.
        """
        model = self.dense.model
        head = self.layers[-1]
        fits_head = bool(self.types_of(head) or self._candidates_of(head))
        files = [self._file(f"layer-{index}") for index in range(len(model.layers))]
        if all(file.exists() for file in files) and (self._file("head").exists() or not fits_head):
            return
        seen, checked = _split(batches)
        streams = ResidualStreams(self.dense, [*seen, *checked])
        with progress("rounding every layer in every type", len(model.layers) + 1) as bar, torch.no_grad():
            for index, layer in enumerate(model.layers):
                widened, file = in_float32(layer), files[index]
                prefix = f"model.layers.{index}."
                fits = [each for each in self.layers if each.name.startswith(prefix) and self.types_of(each)]
                modules = {each.name: widened.get_submodule(each.name.removeprefix(prefix)) for each in fits}
                if file.exists():
                    modules = {}
                groups = _pass_and_record(widened, modules, streams, index, len(seen))
                if modules:
                    keep(file, self._round(modules, groups))
                bar.advance()
            file = self._file("head")
            if fits_head and not file.exists():
                norm = in_float32(model.norm)
                linear = in_float32(self.dense.head)
                group = _Inputs.of([head.name], head.cols)
                for at, x in enumerate(streams.x):
                    group.add(norm(x), at < len(seen))
                found = self._round({head.name: linear}, [group])
                keep(file, found | self._sketch(head, linear, group, found))
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

    def _sketch(
        self, head: LinearLayer, linear: nn.Module, inputs: _Inputs, rounded: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The sketch of the head, and what it adds to the loss with every number of candidates.

        The candidates of a token are those that matter to its loss. So the increase is not estimated from mean errors
        of outputs: it is KL(dense || changed).
        """
        candidates = self._candidates_of(head)
        if not candidates:
            return {}
        assert isinstance(linear, nn.Linear)
        parts, sketch = round_to_type(SKETCH, linear.weight, inputs.moment)
        exact = linear.weight
        if (codes := rounded.get(f"{head.name} {head.exact}")) is not None:
            exact = torch.from_numpy(values(TYPES[head.exact], codes.numpy(), head.rows, head.cols))
        increases = dict.fromkeys(candidates, 0.0)
        inputs_checked = torch.cat(inputs.checked)
        for x in inputs_checked.split(max(1, LOGITS_AT_ONCE // head.rows)):
            dense, first, again = (
                F.linear(x, weight, linear.bias) for weight in (linear.weight, sketch, exact)
            )
            dense = self.dense.scaled_logits(dense).log_softmax(dim=-1)
            for count in increases:
                changed = self.dense.scaled_logits(rescored(first, again, count)).log_softmax(dim=-1)
                increases[count] += float((dense.exp() * (dense - changed)).sum()) / len(inputs_checked)
        found = {f"{SKETCH.name} {count}": torch.tensor(increase) for count, increase in increases.items()}
        return found | {SKETCH.name: torch.from_numpy(panels_of(SKETCH, parts))}

    def options(self, gradients: Mapping[str, Tensor]) -> list[TypeOption]:
        """All types of all layers with their estimated increases of the loss.

        Args:
            gradients: see `output_gradients`.
        """
        found = []
        for layer in self.layers:
            if layer.kept:
                found.append(TypeOption(layer, layer.kept, layer.bytes(layer.kept), 0.0))
            if candidates := self._candidates_of(layer):
                with safe_open(self._file_of(layer), framework="pt") as file:
                    for count in candidates:
                        increase = float(file.get_tensor(f"{SKETCH.name} {count}"))
                        size = layer.bytes_with_sketch(count)
                        found.append(TypeOption(layer, layer.exact, size, increase, count))
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
        head = self.layers[-1]
        for name, tensor in self.dense.state_dict().items():
            module = name.rpartition(".")[0]
            if name == "head.sketch" or (name == "head.weight" and config.spec.tied):
                continue
            if module in changed and not name.endswith("bias"):
                by_rows = choice.head_candidates is not None and module == head.name
                codes = partial(self._codes, changed[module], choice.types[module], by_rows)
                tensors.append((changed[module].bytes(choice.types[module]), codes))
            elif module == head.name and name.endswith("codes"):
                kept = partial(self._kept_codes, head, choice.head_candidates is not None)
                tensors.append((tensor.nbytes, kept))
            else:
                tensors.append((tensor.nbytes, partial(dict, {name: tensor})))
        if choice.head_candidates:
            tensors.append((head.bytes_with_sketch(0), self._sketch_codes))
        write_shards(target, tensors, lambda item: item[0], lambda item: item[1](), "writing the model")
        made = ScalingTransformerConfig.from_spec(
            with_types(config.spec, choice.types, choice.head_candidates),
            **{name: getattr(config, name) for name in COPIED_FIELDS},
            architectures=config.architectures,
            dtype=str(self.dense.dtype).removeprefix("torch."),
        )
        made.save_pretrained(target)

    def _codes(self, layer: LinearLayer, kind: str, by_rows: bool) -> dict[str, Tensor]:
        with safe_open(self._file_of(layer), framework="pt") as file:
            codes = file.get_tensor(f"{layer.name} {kind}")
        if by_rows:
            codes = torch.from_numpy(restore(TYPES[kind], codes.numpy(), layer.rows, layer.cols))
        return {f"{layer.name}.codes": codes}

    def _kept_codes(self, head: LinearLayer, by_rows: bool) -> dict[str, Tensor]:
        """The source's own codes of the head, as they lie with a sketch beside them, or without."""
        weight = self.dense.get_submodule(head.name)
        assert isinstance(weight, GgufWeight)
        codes = weight.codes.numpy()
        if by_rows and not weight.by_rows:
            codes = restore(weight.kind, codes, head.rows, head.cols)
        if weight.by_rows and not by_rows:
            codes = arrange(weight.kind, codes, head.cols)
        return {f"{head.name}.codes": torch.from_numpy(codes)}

    def _sketch_codes(self) -> dict[str, Tensor]:
        with safe_open(self._file("head"), framework="pt") as file:
            return {"head.sketch": file.get_tensor(SKETCH.name)}

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
