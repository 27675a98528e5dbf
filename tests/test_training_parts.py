"""Evaluation, schedules, weight decay and the keeping of checkpoints, each alone."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.loss.loss_utils import ForCausalLMLoss

from sparsecli.console import Failure
from sparsecli.data.packing import TokenStream
from sparsecli.model.causal_lm import ScalingTransformerForCausalLM
from sparsecli.model.configuration import ScalingTransformerConfig
from sparsecli.model.layers import attention, cross_entropy
from sparsecli.recipe.loader import LoadedRecipe, load
from sparsecli.spec.model import ModelSpec
from sparsecli.train import checkpoint, command, plan, trainer
from sparsecli.train.evaluation import evaluate


def tiny_model(**fields: Any) -> ScalingTransformerForCausalLM:
    spec = {
        "d_model": 8,
        "layers": 2,
        "heads": 2,
        "max_positions": 16,
        "feed_forward": {"kind": "sparse", "d_ff": 16, "block_size": 4, "rank": 2},
        "vocabulary": {"kind": "dense", "size": 50},
        **fields,
    }
    torch.manual_seed(0)
    return ScalingTransformerForCausalLM(ScalingTransformerConfig.from_spec(ModelSpec.model_validate(spec)))


def stream(tokens: int) -> TokenStream:
    return TokenStream(torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(1)).numpy())


def test_evaluation_is_the_mean_over_predicted_tokens() -> None:
    model, windows = tiny_model().eval(), stream(16 * 5).windows(16)
    figures = evaluate(model, windows, 1.0, batch_size=2)  # the last batch is smaller
    tokens = torch.stack([windows[index]["input_ids"] for index in range(5)])
    with torch.no_grad():
        predicted = model(tokens).logits[:, :-1].log_softmax(-1)
    expected = -predicted.gather(-1, tokens[:, 1:, None]).mean().item()
    assert figures is not None
    assert figures.nats_per_token == pytest.approx(expected, abs=1e-5)
    assert figures.bits_per_byte == pytest.approx(expected / math.log(2), abs=1e-5)
    assert figures.tokens == 5 * 15


def test_evaluation_splits_over_processes() -> None:
    model, windows = tiny_model(), stream(16 * 7).windows(16)
    whole = evaluate(model, windows, 2.0, batch_size=2)
    collected: list[list[torch.Tensor]] = [[], []]
    for rank in range(2):
        evaluate(
            model, windows, 2.0, batch_size=2, rank=rank, ranks=2,
            add_up=lambda sums, to=collected[rank]: to.append(sums) or sums,
        )  # fmt: skip
    sums = [first + second for first, second in zip(*collected, strict=True)]
    assert whole is not None
    assert (sums[0][0] / sums[0][1]).item() == pytest.approx(whole.nats_per_token, abs=1e-6)
    assert sums[0][1] == whole.tokens
    assert torch.cat(sums[1:]).eq(0).double().mean().item() == pytest.approx(whole.never_chosen)


def test_never_chosen_and_balance_count_the_choices() -> None:
    model, windows = tiny_model(), stream(16 * 4).windows(16)
    for block in model.model.layers:
        controller = block.feed_forward.controller
        torch.nn.init.zeros_(controller.first)
        with torch.no_grad():
            controller.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]).repeat(4))
    figures = evaluate(model, windows, 1.0)
    assert figures is not None
    assert (figures.never_chosen, figures.balance) == (0.75, 0.0)
    assert not any(block.feed_forward.controller._forward_hooks for block in model.model.layers)

    dense = tiny_model(feed_forward={"kind": "dense", "d_ff": 16})
    figures = evaluate(dense, windows, 1.0)
    assert figures is not None
    assert (figures.never_chosen, figures.balance) == (None, None)


def test_evaluation_draws_no_random_number() -> None:
    model = tiny_model(dropout=0.5).train()
    state = torch.get_rng_state()
    evaluate(model, stream(64).windows(16), 1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_weight_decay_spares_what_is_no_matrix_of_the_network(positions: str) -> None:
    model = tiny_model(positions=positions)
    names = trainer.LanguageModelTrainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert names
    assert all(name.endswith((".weight", "feed_forward.up", "feed_forward.down")) for name in names)
    assert not [name for name in names if "controller" in name or "embedding" in name or "norm" in name]
    assert any("attention" in name for name in names)
    assert "model.layers.0.feed_forward.up" in names
    mixture = tiny_model(feed_forward={"kind": "mixture", "d_ff": 16, "experts": 4})
    names = trainer.LanguageModelTrainer.get_decay_parameter_names(None, mixture)  # type: ignore[arg-type]
    assert not [name for name in names if "router" in name]


@pytest.mark.parametrize(
    ("schedule", "name"),
    [("cosine", "cosine_with_min_lr"), ("linear", "linear"), ("inverse_sqrt", "inverse_sqrt")],
)
def test_schedules_by_their_recipe_names(
    tiny: LoadedRecipe, tmp_path: Path, schedule: str, name: str
) -> None:
    assert tiny.recipe.train
    train = tiny.recipe.train.model_copy(update={"lr_scheduler_type": schedule, "min_lr_rate": 0.25})
    arguments = trainer.training_arguments(train, 5, tmp_path)
    assert arguments.lr_scheduler_type == name
    assert (arguments.lr_scheduler_kwargs or {}).get("min_lr_rate") == (
        0.25 if schedule == "cosine" else None
    )
    assert (arguments.seed, arguments.data_seed) == (5, 5)


def test_curves_go_where_the_recipe_says(tiny: LoadedRecipe, tmp_path: Path) -> None:
    assert tiny.recipe.train
    assert tiny.recipe.train.report_to == ["tensorboard"]
    train = tiny.recipe.train.model_copy(update={"report_to": ["tensorboard", "wandb"]})
    arguments = trainer.training_arguments(train, 5, tmp_path / "mine" / "checkpoints")
    assert (arguments.report_to, arguments.run_name) == (["wandb"], "mine")  # TensorBoard is the journal's


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_missing_reporter_is_found_before_training(
    tiny: LoadedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    monkeypatch.setattr(plan, "find_spec", lambda name: None if name == "wandb" else name)
    changed = load(str(tiny.path), ["train.report_to=[tensorboard, wandb]"])
    message = r"train\.report_to: wandb is not installed; pip install wandb, or leave it out of the list"
    with pytest.raises(Failure, match=message):
        command.run(changed, output=tmp_path / "run", dry_run=dry_run)
    assert not list(tmp_path.iterdir())


def test_a_run_without_reporters_has_no_folder_of_theirs(tiny: LoadedRecipe, tmp_path: Path) -> None:
    changed = load(str(tiny.path), ["train.report_to=[]", "train.max_steps=1"])
    assert command.run(changed, output=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 4, 30):
        written = tmp_path / ".unfinished" / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "weights").write_text(str(step))
        checkpoint.prune(tmp_path, checkpoint.seal(written, tmp_path), keep=2)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-30"]
    assert checkpoint.newest_sound(tmp_path) == (tmp_path / "checkpoint-30", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", ["labels", "all batches", "none"])
def test_the_loss_is_that_of_transformers(
    dtype: torch.dtype, counts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "AT_ONCE", 70)  # 2 tokens at a time
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 9, 32)).to(dtype)
    labels = torch.randint(0, 32, (3, 9))
    labels[0, 2:5] = labels[2] = -100
    if counts == "none":
        labels.fill_(-100)
    arguments = {"num_items_in_batch": torch.tensor(40)} if counts == "all batches" else {}
    found = []
    for loss in (cross_entropy.token_loss, ForCausalLMLoss):
        z = logits.clone().requires_grad_()
        value = loss(z, labels, 32, **arguments)
        (3 * value).backward()
        found.append((value.detach(), z.grad))
    (ours, of_ours), (theirs, of_theirs) = found
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert of_ours.dtype == dtype
    if counts != "none":
        rounding = 1e-7 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(of_ours, of_theirs, atol=1e-8, rtol=rounding * 10)


@pytest.mark.parametrize("length", [1, 40, 128, 300])
def test_attention_by_products_is_attention(length: int) -> None:
    """In bfloat16, and on short texts alone; everything else is left to PyTorch."""
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(4, 2, 3, length, 16)
    found = []
    for attend in (
        lambda q, k, v: attention.attend_by_products(q, k, v, 0.3),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
    ):
        inputs = [value.clone().requires_grad_() for value in (q, k, v)]
        y = attend(*inputs)
        y.backward(dy.to(y.dtype))
        found.append([y.detach(), *(value.grad for value in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm() + 1e-5
    assert not attention.by_products(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.by_products(q, k)
        assert not attention.by_products(q, k[:, :1])
        assert not attention.by_products(*torch.zeros(2, 1, 1, 513, 16))


FAULTS = """
import ctypes, resource
from sparsecli.train.memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, second = faults(), faults()
keep_freed_memory()
faults()
print(first, second, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone")
def test_freed_memory_stays_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, second, kept = map(int, done.stdout.split())
    assert min(first, second) > 20  # the system hands out new pages each time; huge ones count once
    assert kept < min(first, second) / 4
