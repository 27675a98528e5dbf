"""Trained models with weights in fewer bits, and their losses as the engine decodes them."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsecli.console import progress
from sparsecli.convert.linear_layers import TypeChoice
from sparsecli.convert.weight_types import RoundedLayers
from sparsecli.data.examples import Prepared
from sparsecli.data.packing import Windows
from sparsecli.decode.engine import Engine
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.precision import Precision
from sparsecli.evaluate.losses import bits_per_byte, engine_losses
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.loading import load_network, read_config
from sparsecli.model.outputs import share
from sparsecli.recipe.schema import QuantizeSpec
from sparsecli.train.result import Result

TYPES = {4: ("Q4_K", "IQ4_NL"), 8: ("Q8_0",)}
"""Types of GGUF by bits: those of rows of a multiple of 256 weights first."""
CALIBRATION_TOKENS, CALIBRATION_BATCH = 16384, 4


def engine_type(spec: QuantizeSpec) -> str | None:
    """The engine's weight type of a model that is rounded to nearest; None where its folder holds rounded weights."""
    return f"int{spec.bits}" if spec.rounding == "nearest" else None


def quantize(spec: QuantizeSpec, source: Path, prepared: Prepared, seed: int, target: Path) -> None:
    """Write the model in `source` with fewer bits into the folder `target`, which is complete or absent.

    A model that the engine rounds when it loads it is the same files.
    """
    beside = target.with_name(f"{target.name}.tmp")
    for folder in (beside, target):
        shutil.rmtree(folder, ignore_errors=True)
    if engine_type(spec):
        shutil.copytree(source, beside, copy_function=_link)
    else:
        model = load_network(source)
        assert isinstance(model, ScalingTransformerForCausalLM)
        _round(model, TYPES[spec.bits], _calibration(prepared, seed), beside)
        prepared.tokenizer.save_pretrained(beside)
        share(beside)
    beside.rename(target)


def _link(source: str, target: str) -> None:
    """The same file again, without a copy where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _calibration(prepared: Prepared, seed: int) -> list[Tensor]:
    """Training windows, as batches of token ids (B, T)."""
    windows = prepared.train
    assert isinstance(windows, Windows)
    count = min(len(windows), -(-CALIBRATION_TOKENS // windows.sequence_length))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]
    rows = torch.stack([windows[index]["input_ids"] for index in order.tolist()])
    return list(rows.split(CALIBRATION_BATCH))


def _round(
    model: ScalingTransformerForCausalLM, types: tuple[str, ...], batches: list[Tensor], target: Path
) -> None:
    """Every linear layer in the first of `types` that its width allows; others stay as they are."""
    with TemporaryDirectory(dir=target.parent) as folder:
        rounded = RoundedLayers(model, Path(folder), types)
        rounded.fit(batches, lambda path, tensors: save_file(tensors, path))
        chosen = {layer.name: found[0] for layer in rounded.layers if (found := rounded.types_of(layer))}
        rounded.write(TypeChoice(chosen, 0, 0.0), target)


def measure(spec: QuantizeSpec, folder: Path, prepared: Prepared) -> Result:
    """Losses of the model in `folder` on held-out and on tuning text, in the engine."""
    kind = engine_type(spec)
    precision = Precision.of(kind) if kind else Precision.of("float32", cache="bfloat16")
    held_out, tuning = prepared.held_out, prepared.tuning
    assert isinstance(held_out, Windows)
    assert isinstance(tuning, Windows)
    with closing(Engine(pack_folder(folder, read_config(folder).spec, precision))) as engine:
        losses = []
        with progress("evaluating in the engine", len(held_out) + len(tuning)) as bar:
            for windows in (held_out, tuning):
                losses.append(float(engine_losses(engine, windows, bar).mean()))
    per_byte = bits_per_byte(losses[0], held_out.bytes_per_token(prepared.tokenizer))
    return Result(0, losses[0], per_byte, None, losses[1])
