"""lm-evaluation-harness on the engine: the figures of its own `hf`, and of `evaluate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparsecli.console import Failure
from sparsecli.decode.native import binding

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)
TEXT = "3 and 4 and 5 and 7"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A task of each kind that the harness has, on files."""
    from lm_eval.tasks import TaskManager

    place = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": f"{n} and {n + 1} and", "choices": [" 5", " and", f" {n}"], "answer": n % 3}
        for n in range(6)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {place}/rows.jsonl}}}}\ntest_split: test\n"
    (place / "choices.yaml").write_text(
        f"task: choices\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{text}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (place / "rolling.yaml").write_text(
        f"task: rolling\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text * 12}}'\nmetric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n"
    )
    (place / "written.yaml").write_text(
        f"task: written\n{common}output_type: generate_until\ndoc_to_text: '{{{{text}}}}'\ndoc_to_target: '5'\n"
        "generation_kwargs: {until: ['9'], max_gen_toks: 6, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    )
    return TaskManager(include_path=str(place), include_defaults=False)


def results(tasks: Any, model: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=["choices", "rolling", "written"], task_manager=tasks,
        log_samples=True, verbosity="ERROR",
    )  # fmt: skip
    answers = [sample["resps"] for name in ("choices", "written") for sample in found["samples"][name]]
    return found["results"], answers


def test_the_engine_has_the_figures_of_the_harness_own_model(
    finished: tuple[Path, object], tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import sparsecli.evaluate.harness  # noqa: F401  registers

    ours, texts = results(tasks, "sparsecli", {"model": str(finished[0]), "threads": 1})
    folder = str(finished[0] / "model")
    theirs, expected = results(tasks, "hf", {"pretrained": folder, "dtype": "float32", "device": "cpu"})
    for task in ("choices", "rolling", "written"):
        for name, value in theirs[task].items():
            if isinstance(value, float):
                assert ours[task][name] == pytest.approx(value, rel=1e-4), (task, name)
    flat, flat_expected = (json.loads(json.dumps(each)) for each in (texts, expected))
    for mine, other in zip(flat, flat_expected, strict=True):
        for (a,), (b,) in zip(mine, other, strict=True):
            if isinstance(a, str):
                assert a == b
            else:
                assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-4)
                assert str(a[1]) == str(b[1])


def test_rolling_likelihoods_are_those_of_evaluate(finished: tuple[Path, object]) -> None:
    """A text that fits into one window, behind the token that the harness puts before it."""
    from lm_eval.api.instance import Instance

    from sparsecli.evaluate.harness import HarnessModel
    from sparsecli.model.loading import load_model

    model = HarnessModel(model=str(finished[0]), threads=1)
    request = Instance("loglikelihood_rolling", {}, (TEXT,), 0)
    (found,) = model.loglikelihood_rolling([request])
    network, tokenizer = load_model(finished[0] / "model")
    import torch

    ids = torch.tensor([[model.prefix_token_id, *tokenizer(TEXT).input_ids]])
    with torch.inference_mode():
        loss = float(network(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert found == pytest.approx(-loss, rel=1e-5)
    assert math.isfinite(found)


def test_what_a_task_asks_for_and_the_engine_has_not_is_refused(finished: tuple[Path, object]) -> None:
    from lm_eval.api.instance import Instance

    from sparsecli.evaluate.harness import HarnessModel

    model = HarnessModel(model=str(finished[0]), threads=1)
    request = Instance("generate_until", {}, ("3 and", {"until": ["x"], "num_beams": 4}), 0)
    with pytest.raises(Failure, match="generation_kwargs: num_beams: not supported"):
        model.generate_until([request])
