"""Models recorded as programs for other lengths: `torch.export`, `torch.jit.trace` and, where there is one, ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_encoder_decoder
import test_model
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from sparsecli.model.layers.sru import scan_in_order, scan_of_any_length

CAUSAL = {"/".join(kind): kind for kind in test_model.KINDS}
MODELS = [*CAUSAL, *test_encoder_decoder.MODELS]
LENGTHS = [(3, 13, 7), (1, 2, 2), (2, 20, 19)]
"""Rows, tokens of a text or source, tokens of a target. What is recorded with the first meets the choices of all."""


def build(name: str) -> nn.Module:
    return test_model.build(*CAUSAL[name]) if name in CAUSAL else test_encoder_decoder.build(name)


def given(name: str, rows: int, length: int, target: int, padded: bool = True) -> dict[str, Tensor]:
    """Inputs of a model; texts are padded on the left, sources on the right."""
    if name not in CAUSAL:
        lengths = [max(1, length - 4 * row if padded else length) for row in range(rows)]
        return {
            **test_encoder_decoder.sources(*lengths),
            "decoder_input_ids": test_encoder_decoder.targets(rows, target),
        }
    ids = test_model.prompt(rows, length)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, : length // 4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "name",
    [
        name if name in (MODELS[3], "Terraformer") else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_an_exported_program_takes_any_length(name: str) -> None:
    model = build(name)
    rows, length, target = Dim("rows", max=8), Dim("length", min=2, max=24), Dim("target", min=2, max=24)
    shapes = {key: {0: rows, 1: length} for key in ("input_ids", "attention_mask")}
    if name not in CAUSAL:
        shapes["decoder_input_ids"] = {0: rows, 1: target}
    program = export(
        model,
        (),
        given(name, *LENGTHS[0]) | {"use_cache": False},
        dynamic_shapes=shapes | {"use_cache": None},
    ).module()
    for lengths in LENGTHS:
        inputs = given(name, *lengths) | {"use_cache": False}
        test_model.assert_same(program(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_no_mask(strict: bool) -> None:
    model, shapes = build(MODELS[3]), {"input_ids": {1: Dim("length", max=64)}, "use_cache": None}
    program = export(
        model,
        (),
        {"input_ids": test_model.prompt(), "use_cache": False},
        dynamic_shapes=shapes,
        strict=strict,
    )
    for length in (1, 40):
        ids = test_model.prompt(2, length)
        test_model.assert_same(program.module()(input_ids=ids, use_cache=False).logits, model(ids).logits)


class Logits(nn.Module):
    """A model as tracers want it: tensors in a fixed order, one tensor out."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(self.names, tensors, strict=True))
        return self.model(**inputs, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_traced_program_takes_any_length(name: str) -> None:
    """Recorded without padding, and used with it."""
    model, inputs = build(name), given(name, 1, 9, 5, padded=False)
    traced = torch.jit.trace(Logits(model, list(inputs)), tuple(inputs.values()), check_trace=False)
    for lengths in LENGTHS:
        inputs = given(name, *lengths)
        test_model.assert_same(traced(*inputs.values()), model(**inputs).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [MODELS[3], "Terraformer"])
@torch.no_grad()
def test_onnx_computes_the_same(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, inputs = build(name), given(name, *LENGTHS[0])
    file = tmp_path / "model.onnx"
    rows, length, target = Dim("rows", max=8), Dim("length", min=2, max=24), Dim("target", min=2, max=24)
    shapes = [{0: rows, 1: target if key.startswith("decoder") else length} for key in inputs]
    torch.onnx.export(
        Logits(model, list(inputs)),
        tuple(inputs.values()),
        file,
        dynamo=True,
        dynamic_shapes=(tuple(shapes),),
        input_names=list(inputs),
    )
    session = runtime.InferenceSession(str(file))
    for lengths in LENGTHS:
        inputs = given(name, *lengths)
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]
        torch.testing.assert_close(torch.tensor(found), model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_a_scan_of_any_length_is_a_scan(length: int) -> None:
    keep, add = torch.rand(2, 3, length, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scan_of_any_length(keep, add), scan_in_order(keep, add))
