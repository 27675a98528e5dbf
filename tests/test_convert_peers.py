"""llama.cpp beside a conversion: its files hold our model, and its rows are in the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsecli.bench import peers as bench_peers
from sparsecli.bench.random_weights import empty_model
from sparsecli.console import Failure
from sparsecli.convert import command
from sparsecli.convert.command import PEER_NAMES, check_peer_names, measures_llama
from sparsecli.convert.importance import input_importance
from sparsecli.convert.report import MeasuredModel, Report
from sparsecli.data.packing import Windows
from sparsecli.decode.native import binding
from sparsecli.evaluate.losses import HeldOutLoss
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.recipe.schema import ConvertSpec
from sparsecli.spec.model import ModelSpec
from sparsecli.train.command import run as train

needs_llama = pytest.mark.skipif(
    bench_peers.PEERS["llama.cpp"].missing() is not None, reason="llama.cpp is not there"
)
needs_engine = pytest.mark.skipif(binding.available() is not None, reason="the native engine is not there")

FILES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_xs", "q4_0")
LLAMA: dict[str, Any] = {
    "d_model": 64,
    "layers": 2,
    "heads": 4,
    "max_positions": 32,
    "positions": "rotary",
    "rotary_base": 5000.0,
    "normalization": "rms",
    "normalization_epsilon": 1e-5,
    "attention": {"key_value_heads": 2, "bias": False},
    "feed_forward": {"kind": "dense", "d_ff": 96, "activation": "silu", "gated": True, "bias": False},
    "vocabulary": {"kind": "dense", "size": 300, "tied": True},
}
SCALING = {
    "kind": "llama3",
    "factor": 8.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_positions": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "own head, wide heads": {"vocabulary": {"kind": "dense", "size": 300}, "head_width": 32},
    "scaled positions": {"rotary_scaling": SCALING},
    "qwen2": {"attention": {"key_value_heads": 2, "bias": True, "output_bias": False}},
    "qwen3": {"attention": {"key_value_heads": 2, "bias": False, "query_key_norm": True}},
}


def model_of(**changes: Any) -> ScalingTransformerForCausalLM:
    """A random model whose every tensor matters."""
    model = empty_model(ModelSpec.model_validate({**LLAMA, **changes}))
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    return model.eval()


# -- files ---------------------------------------------------------------------------------------------------


@needs_llama
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_our_model_does(kind: str, tmp_path: Path) -> None:
    from sparsecli.bench.peers import llama_cpp, llama_file

    model = model_of(**KINDS[kind])
    spec = model.config.spec
    assert llama_file.unlike_llama(spec) is None
    file = tmp_path / "model.gguf"
    llama_file.write_weights(file, spec, dict(model.named_parameters()))
    tokens = torch.arange(24) * 37 % 300
    with torch.inference_mode():
        expected = model(tokens.unsqueeze(0)).logits[0].numpy()
    loaded = llama_cpp.LlamaModel(file, spec, 1)
    found = llama_cpp.LlamaSequence(loaded, 24).logits(tokens.tolist())
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.02 * expected.std()

    decoder = llama_cpp.LlamaDecoder(loaded, 24)
    decoder.prefill(tokens[:-1].tolist())
    assert decoder.step(int(tokens[-1])) == (int(expected[-1].argmax()), None)


@needs_llama
def test_quantised_files_come_from_the_same_weights(tmp_path: Path) -> None:
    from sparsecli.bench.peers import llama_cpp, llama_file

    model = model_of()
    spec = model.config.spec
    source = tmp_path / "float16.gguf"
    llama_file.write_weights(source, spec, dict(model.named_parameters()))
    tokens = list(range(16))
    errors, sizes = [], []
    exact = llama_cpp.LlamaSequence(llama_cpp.LlamaModel(source, spec, 1), 16).logits(tokens).copy()
    for dtype in ("q8_0", "q4_k_m", "q4_0"):  # fewer bits each
        file = tmp_path / f"{dtype}.gguf"
        llama_cpp.quantise(source, file, dtype, 1)
        found = llama_cpp.LlamaSequence(llama_cpp.LlamaModel(file, spec, 1), 16).logits(tokens)
        errors.append(float(np.abs(found - exact).mean() / exact.std()))
        sizes.append(file.stat().st_size)
    assert errors == sorted(errors)
    assert errors[0] < 0.04 < errors[2] < 0.5
    assert source.stat().st_size > sizes[0] > sizes[2]


def test_importance_is_the_mean_square_of_inputs() -> None:
    model = model_of()
    batches = [torch.arange(40).view(2, 20) * 7 % 300, torch.arange(20).view(1, 20) * 11 % 300]
    found = input_importance(model, batches)
    assert len(found) == 2 * 7
    block = model.model.layers[0]
    with torch.no_grad():
        read = torch.cat(
            [block.attention_norm(model.model.embedding(batch)).flatten(0, 1) for batch in batches]
        )
    for name in ("query", "key", "value"):
        squares = found[f"model.layers.0.attention.projection.{name}"]
        np.testing.assert_allclose(squares, read.square().mean(0).numpy(), rtol=1e-5)
    assert found["model.layers.1.feed_forward.down"].shape == (96,)
    assert not any(module._forward_pre_hooks for module in model.modules())


@needs_llama
@pytest.mark.parametrize("dtype", ["q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_xs", "q4_0"])
def test_an_importance_matrix_lowers_the_errors_that_matter(dtype: str, tmp_path: Path) -> None:
    import gguf

    from sparsecli.bench.peers import llama_cpp, llama_file

    layer = {**LLAMA["feed_forward"], "d_ff": 256}
    model = model_of(d_model=256, layers=1, feed_forward=layer)
    spec, weights = model.config.spec, dict(model.named_parameters())
    source = tmp_path / "float16.gguf"
    llama_file.write_weights(source, spec, weights)
    random = np.random.default_rng(0)
    linear = [name.removesuffix(".weight") for name, each in weights.items() if each.ndim == 2]
    importance = {
        llama_file.matrix_name(name, spec): random.uniform(0.01, 1, 256).astype(np.float32) ** 4
        for name in linear
        if name.startswith("model.layers.")
    }
    exact = {each.name: np.array(each.data, np.float32) for each in gguf.GGUFReader(source).tensors}
    assert importance.keys() < exact.keys()

    def errors(matrices: dict[str, np.ndarray] | None) -> np.ndarray:
        file = tmp_path / "quantized.gguf"
        llama_cpp.quantise(source, file, dtype, 1, matrices)
        found = {each.name: each for each in gguf.GGUFReader(file).tensors}
        kinds.append([found[name].tensor_type for name in importance])
        rounded = {name: gguf.dequantize(found[name].data, found[name].tensor_type) for name in importance}
        return np.array(
            [(squares * (rounded[name] - exact[name]) ** 2).sum() for name, squares in importance.items()]
        )

    kinds: list[list[object]] = []
    ratios = errors(importance) / errors(None)
    same = [with_it == without for with_it, without in zip(*kinds, strict=True)]
    assert sum(same) >= 5  # llama.cpp may choose another type for some
    assert ratios[same].max() < 0.97


@needs_llama
def test_what_llama_cpp_refuses_is_one_line(tmp_path: Path) -> None:
    from sparsecli.bench.peers import llama_cpp

    (tmp_path / "noise.gguf").write_bytes(b"noise")
    with pytest.raises(Failure, match=r"^llama\.cpp cannot make a q8_0 file: .*fail"):
        llama_cpp.quantise(tmp_path / "noise.gguf", tmp_path / "q8_0.gguf", "q8_0", 1)


@needs_llama
def test_another_model_in_the_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecli.bench.peers import llama_file
    from sparsecli.convert import llama_cpp

    windows = Windows(np.arange(64) * 37 % 300, 32)
    assert len(llama_cpp.llama_contenders(tmp_path, model_of(), windows, 1)) == 1 + len(FILES)
    monkeypatch.setattr(llama_file, "_in_their_order", lambda name, values, spec: values)
    with pytest.raises(
        Failure, match=r"its float16 file does not match our model: its perplexity differs by .*%"
    ):
        llama_cpp.llama_contenders(tmp_path, model_of(), windows, 1)


@needs_llama
def test_rows_that_blocks_do_not_divide_are_float16_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsecli.convert import llama_cpp

    model = model_of(d_model=72, heads=2, attention={"bias": False})
    [only] = llama_cpp.llama_contenders(tmp_path, model, Windows(np.arange(64) * 37 % 300, 32), 1)
    assert only.name == "llama.cpp, float16"
    told = " ".join(capsys.readouterr().err.split())
    assert "measured only in float16: its blocks of 32 weights do not divide rows of 72" in told


# -- choosing ------------------------------------------------------------------------------------------------


def test_the_recipe_knows_the_same_peers() -> None:
    assert ConvertSpec.model_json_schema()["properties"]["peers"]["items"]["const"] == PEER_NAMES[0]
    with pytest.raises(Failure, match=r"--peer: 'openvino' is not one of llama\.cpp") as caught:
        check_peer_names(["llama.cpp", "openvino"])
    assert caught.value.exit_code == 2
    assert check_peer_names(["llama.cpp", "llama.cpp"]) == ["llama.cpp"]


@needs_llama
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"feed_forward": {"kind": "dense", "d_ff": 96}}, "units that are not gated SiLU"),
        ({"normalization": "layer"}, "layer norm"),
        ({"rotary_fraction": 0.5}, "other than rotary positions"),
        ({"parallel": True}, "parallel blocks"),
        ({"attention": {"bias": False, "query_key_rank": 16}}, "queries of low rank"),
        ({"embedding_scale": 8.0}, "a scaled embedding"),
        ({"attention": {"bias": False, "window": 8}}, r"attention.window"),
        ({"norm_placement": "around"}, "norm_placement"),
        ({"attention": {"bias": True}}, "a bias after attention"),
        ({**KINDS["qwen3"], "rotary_scaling": SCALING}, "scaled rotary positions"),
    ],
)
def test_models_that_cannot_be_written(
    changes: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ModelSpec.model_validate({**LLAMA, **changes})
    assert not measures_llama(["llama.cpp"], spec)
    told = " ".join(capsys.readouterr().err.split())
    assert f"llama.cpp is not measured: its files cannot hold a model with {why}" in told


def test_without_llama_cpp_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda package: None)
    spec = ModelSpec.model_validate(LLAMA)
    assert not measures_llama([], spec)
    assert capsys.readouterr().err == ""
    assert not measures_llama(["llama.cpp"], spec)
    told = " ".join(capsys.readouterr().err.split())
    assert "llama.cpp is not measured: it is not installed; pip install 'sparsecli[peers-llama-cpp]'" in told


# -- the report ----------------------------------------------------------------------------------------------


def report_of(*models: MeasuredModel) -> Report:
    return Report("dense", "sparse", None, "precision, 1/16", 1, 1, 0, 0.1, None, 1, 1.0, models=list(models))


def test_a_peer_can_be_preferred() -> None:
    def row(name: str, loss: float, ms: float, **kind: bool) -> MeasuredModel:
        return MeasuredModel(
            name, HeldOutLoss(loss, loss - 3.0, 0.0), 1, ms, 1.0, bits_per_weight=8.0, **kind
        )

    dense, ours = row("dense, bfloat16", 3.0, 4.0), row("precision", 3.1, 2.0, converted=True)
    slower = row("llama.cpp, q8_0", 3.0, 2.5, peer=True)
    faster = row("llama.cpp, q4_0", 3.1, 1.5, peer=True)
    assert report_of(dense, ours, slower).verdict.endswith("; llama.cpp, q8_0: 1.60x at +0.00%")
    assert report_of(dense, ours, slower, faster).verdict.endswith(
        "; llama.cpp, q4_0 is faster and no worse: prefer it"
    )


RECIPE = """
data:
  source: files
  paths: ["TEXTS/*.txt"]
  sequence_length: 32
  tokenizer: {kind: bpe, vocabulary_size: 300}
train: {max_steps: 60, per_device_train_batch_size: 8, learning_rate: 0.01, eval_steps: 60, save_steps: 60}
convert:
  feed_forward: {kind: precision, d_ff: 96, activation: silu, gated: true}
  calibration_tokens: 1024
  tuning_tokens: 512
  refit: false
  distillation: {tokens: 0}
  peers: [llama.cpp]
"""


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRecipe, Path]:
    """A recipe, and the Llama-like run that it trained."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "texts").mkdir()
    for number in range(40):
        words = [f"{a} plus {b} is {a + b}. " for a in range(number, number + 8) for b in range(6)]
        (folder / "texts" / f"{number}.txt").write_text("".join(words))
    recipe = folder / "sums.yaml"
    recipe.write_text(f"model: {json.dumps(LLAMA)}" + RECIPE.replace("TEXTS", str(folder / "texts")))
    loaded = load(str(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSECLI_CACHE", str(folder / "cache"))
        train(loaded, output=folder / "dense")
    return loaded, folder / "dense"


@pytest.fixture
def convert(
    dense_run: tuple[LoadedRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Report]:
    """Converts the run."""
    monkeypatch.setenv("SPARSECLI_CACHE", str(dense_run[1].parent / "cache"))
    monkeypatch.setattr("sparsecli.convert.run.ROUNDS", 1)

    def run() -> Report:
        report = command.run(dense_run[0], model=str(dense_run[1]), output=tmp_path / "converted")
        assert report
        assert not (tmp_path / "converted.converting").exists()
        return report

    return run


@needs_llama
@needs_engine
def test_rows_of_llama_cpp_stand_beside_ours(convert: Callable[[], Report], tmp_path: Path) -> None:
    report = convert()
    theirs = {row.name: row for row in report.models if row.peer}
    assert list(theirs) == [f"llama.cpp, {dtype}" for dtype in ("float16", *FILES)]
    assert report.models[3] is report.result
    assert theirs["llama.cpp, float16"].loss.increase == pytest.approx(0, abs=2e-3)
    assert theirs["llama.cpp, q8_0"].loss.increase == pytest.approx(0, abs=1e-2)
    float16, q8_0 = (theirs[f"llama.cpp, {dtype}"].bytes_per_token for dtype in ("float16", "q8_0"))
    assert q8_0 / float16 == pytest.approx(34 / 64, rel=0.02)
    assert all(row.ms_per_token > 0 and row.prompt_ms_per_token > 0 for row in theirs.values())
    assert theirs["llama.cpp, float16"].bits_per_weight == pytest.approx(16, abs=0.2)
    assert theirs["llama.cpp, q8_0"].bits_per_weight == pytest.approx(8.5, abs=0.2)
    assert "q8_0" in theirs["llama.cpp, q8_0"].settings
    weighted = [
        name.removeprefix("llama.cpp, ") for name, row in theirs.items() if "importance" in row.settings
    ]
    assert weighted == list(FILES[1:])
    assert report.facts()[0] == ("source", "float32")

    written = json.loads((tmp_path / "converted" / "report.json").read_text())
    assert [row["peer"] for row in written["models"]] == [False] * 4 + [True] * (1 + len(FILES))
    assert "| llama.cpp, q4_k_m |" in (tmp_path / "converted" / "report.md").read_text()
    assert "llama.cpp" in report.verdict


@needs_llama
@needs_engine
def test_a_full_disk_leaves_the_peer_out(
    convert: Callable[[], Report], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    report = convert()
    assert not any(row.peer for row in report.models)
    assert "0.0 GB are free; free some space" in " ".join(capsys.readouterr().err.split())
