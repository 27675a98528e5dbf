"""Models of images: their layers, their data, and everything that a run of them can be used for."""

from __future__ import annotations

import gc
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_models import fetched
from PIL import Image
from safetensors.torch import load_file
from shipped_runs import run
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from sparsecli.bench import host
from sparsecli.console import Failure, RecipeError
from sparsecli.data.images import ImageExamples, prepare_images
from sparsecli.model.auto import build_classifier
from sparsecli.model.layers.patches import PatchConvolution, PatchGrid
from sparsecli.model.loading import load_classifier
from sparsecli.model.sizes import count_parameters
from sparsecli.model.tensors import vision_tensor_shapes
from sparsecli.recipe.data import DigitsImages, StoredImages
from sparsecli.recipe.loader import parse
from sparsecli.spec.vision import VisionSpec
from sparsecli.study import command as study
from sparsecli.train import journal

SIZE = 6
MODEL = """
model:
  kind: vision
  image_size: 6
  patch_size: 2
  classes: 3
  d_model: 16
  layers: 2
  heads: 2
  feed_forward: {kind: sparse, d_ff: 32, block_size: 8, units_per_block: 2, rank: 4, hard_fraction: 1.0}
  attention: {projection: multiplicative_conv, modules: 4}
"""
RECIPE = f"""
{MODEL}
data: {{source: images, path: images.npz}}
train:
  max_steps: 30
  per_device_train_batch_size: 8
  learning_rate: 0.01
  logging_steps: 10
  eval_steps: 30
  save_steps: 15
study:
  learning_rates: [1.0e-2]
  seeds: [0, 1]
  variants:
    - name: dense
      model: {{feed_forward: {{kind: dense, d_ff: 16}}, attention: {{}}}}
    - name: sparse
bench: {{dtypes: [float32], batch: 4, rounds: 1, tokens_per_round: 2, warmup_tokens: 0}}
"""


def spec(**changes: object) -> VisionSpec:
    model = parse(MODEL, "tiny.yaml").model
    assert isinstance(model, VisionSpec)
    return VisionSpec.model_validate({**model.model_dump(), **changes})


def stripes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy grey images with a bright stripe that tells the class: (n, 6, 6), uint8, and (n,)."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, count)
    pixels = random.integers(0, 60, (count, SIZE, SIZE)).astype(np.uint8)
    for image, label in zip(pixels, classes, strict=True):
        image[2 * label : 2 * label + 2] += 180
    return pixels, classes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with images and a recipe, and measurements that do not wait."""
    folder = tmp_path_factory.mktemp("vision")
    pixels, classes = stripes(300)
    np.savez(folder / "images.npz", x_train=pixels, y_train=classes)
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "alone.yaml").write_text(RECIPE[: RECIPE.index("study:")])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(journal, "draw_loss", lambda *_: None)
        patch.setattr(study, "draw", lambda *_: None)
        patch.setattr(host, "bandwidth", lambda **_: 20.0)
        patch.setattr(host, "BUSY_SECONDS", 0.01)
        yield folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    run("train", "alone.yaml", "--output", "run")
    return place / "run"


# -- the architecture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("image_size: 7", "model.image_size: 7 is not a multiple of patch_size 2; nearest: 6 and 8"),
        ("heads: 3", "model.d_model: 16 is not a multiple of heads 3; nearest: 15 and 18"),
        ("rotary_base: 3.0", "model.rotary_base: unknown key for kind: vision"),
        ("attention: {window: 3}", "model.attention.window: is for models of text"),
        ("attention: {projection: dense_conv, kernel: 2}", "model.attention.kernel: 2 is even"),
        (
            "feed_forward: {kind: selector, d_ff: 32}",
            "model.feed_forward.kind: selector is for models of text",
        ),
        ("kind: visoin", "model.kind: expected vision, or no kind for a model of text, got 'visoin'"),
    ],
)
def test_what_does_not_fit_a_model_of_images(changes: str, message: str) -> None:
    key = changes.partition(":")[0]
    lines = [line for line in MODEL.splitlines() if not line.strip().startswith(f"{key}:")]
    with pytest.raises(RecipeError) as caught:
        parse("\n".join([*lines, f"  {changes}"]), "tiny.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("data: {source: stdlib}", "data.source: a model of images needs images: digits or images"),
        ("data: {source: digits}\nmodel: {d_model: 16, layers: 1, heads: 1, max_positions: 8, "
         "feed_forward: {kind: dense, d_ff: 8}, vocabulary: {kind: dense, size: 8}}",
         "model.kind: missing; images need a model of kind: vision"),
        ("train: {max_steps: 1, init_from: runs/a}", "train.init_from: is for models of text"),
        ("bench: {variants: [{name: a, group: dense, model: {residual: single}}]}",
         "bench.variants[0].model.residual: is for models of text"),
        ("convert: {budget: loss +2 %}", "convert: a conversion needs a model of text"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_go_with_images(changes: str, message: str) -> None:
    text = changes if "model: {d_model" in changes else MODEL + changes
    with pytest.raises(RecipeError) as caught:
        parse(text, "tiny.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("kernel_modules", [1, 3])
@pytest.mark.parametrize("leading", [0, 1])
def test_the_convolution_is_a_sum_over_neighbours_on_all_sides(kernel_modules: int, leading: int) -> None:
    torch.manual_seed(0)
    side, modules, width = 3, 4, 2
    layer = PatchConvolution(width, 3, kernel_modules)
    x = torch.randn(2, leading + side**2, modules, width)
    y = layer(x, PatchGrid(side, leading))
    margin = kernel_modules // 2
    for row, column, module in np.ndindex(side, side, modules):
        expected = layer.bias.expand(2, -1)
        for i, j, m in np.ndindex(3, 3, kernel_modules):
            r, c, s = row + i - 1, column + j - 1, module + m - margin
            if 0 <= r < side and 0 <= c < side and 0 <= s < modules:
                expected = expected + x[:, leading + r * side + c, s] @ layer.weight[:, i, j, m].T
        torch.testing.assert_close(y[:, leading + row * side + column, module], expected)
    if leading:  # a class token has no neighbours but its own modules
        padded = F.pad(x[:, 0], (0, 0, margin, margin))
        expected = layer.bias.expand(2, modules, -1)
        for m in range(kernel_modules):
            expected = expected + padded[:, m : m + modules] @ layer.weight[:, 1, 1, m].T
        torch.testing.assert_close(y[:, 0], expected)


def test_attention_looks_both_ways() -> None:
    """A change of the last patch reaches the first in the first layer."""
    torch.manual_seed(0)
    model = build_classifier(spec(layers=1)).eval()
    pixels = torch.randn(1, 3, SIZE, SIZE)
    changed = pixels.clone()
    changed[..., -1, -1] += 3
    before, after = (model.model(each).last_hidden_state for each in (pixels, changed))
    assert (before - after).abs().amax(dim=-1).gt(1e-6).all()


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
@pytest.mark.parametrize("projection", ["dense", "multiplicative", "dense_conv", "multiplicative_conv"])
def test_tensors_have_the_names_and_shapes_that_are_expected(pooling: str, projection: str) -> None:
    given = spec(pooling=pooling, attention={"projection": projection, "modules": 4})
    model = build_classifier(given)
    assert vision_tensor_shapes(given) == {name: tuple(each.shape) for name, each in model.named_parameters()}
    loss = model(torch.randn(2, 3, SIZE, SIZE), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_patch_reads_the_chosen_units_alone() -> None:
    sparse, dense = (
        count_parameters(spec()),
        count_parameters(spec(feed_forward={"kind": "dense", "d_ff": 32})),
    )
    assert dense.total - dense.active == 9 * 16  # positions of the other tokens
    assert sparse.total - sparse.active == 9 * 16 + 2 * (2 * 32 * 16 * 3 // 4)


# -- images --------------------------------------------------------------------------------------------------


def pixels_of(examples: object) -> set[bytes]:
    assert isinstance(examples, ImageExamples)
    return {image.tobytes() for image in examples.images.pixels}


def test_splits_share_no_image(place: Path) -> None:
    data = StoredImages(source="images", path="images.npz")
    with_tuning, without = prepare_images(data, SIZE, 3, tuning=True), prepare_images(data, SIZE, 3)
    splits = [pixels_of(each) for each in (with_tuning.train, with_tuning.held_out, with_tuning.tuning)]
    assert sum(map(len, splits)) == 300 == len(set.union(*splits))
    assert 40 <= len(splits[1]) <= 80
    assert pixels_of(without.train) == splits[0]
    assert without.tuning is None
    assert without.fingerprint == with_tuning.fingerprint
    few = data.model_copy(update={"held_out_images": 5})
    assert pixels_of(prepare_images(few, SIZE, 3).held_out) < splits[1]


def test_all_files_hold_the_same_images(place: Path) -> None:
    """Class folders, MNIST's files and arrays."""
    pixels, classes = stripes(40)
    np.savez(
        place / "both.npz", x_train=pixels[:30], y_train=classes[:30], x_test=pixels[30:], y_test=classes[30:]
    )
    (place / "idx").mkdir()
    for split, chosen in (("train", slice(30)), ("t10k", slice(30, None))):
        shape = np.array(pixels[chosen].shape, dtype=">u4").tobytes()
        file = place / "idx" / f"{split}-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(b"\0\0\x08\x03" + shape + pixels[chosen].tobytes()))
        labels = classes[chosen].astype(np.uint8)
        file = place / "idx" / f"{split}-labels-idx1-ubyte"
        file.write_bytes(b"\0\0\x08\x01" + np.array([len(labels)], dtype=">u4").tobytes() + labels.tobytes())
    for index, (image, label) in enumerate(zip(pixels, classes, strict=True)):
        folder = place / "folders" / ("train" if index < 30 else "test") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    found = [
        prepare_images(StoredImages(source="images", path=path), SIZE, 3, tuning=True)
        for path in ("both.npz", "idx", "folders")
    ]
    for splits in ([each.train for each in found], [each.held_out for each in found]):
        assert pixels_of(splits[0]) == pixels_of(splits[1]) == pixels_of(splits[2])
    assert len(found[0].held_out) == 10


def test_the_image_processor_makes_what_training_reads(place: Path) -> None:
    """Of grey images of another size, too."""
    Image.fromarray(stripes(1)[0][0]).resize((11, 9)).save(place / "one.png")
    (place / "single" / "a").mkdir(parents=True)
    for number in range(40):
        image = np.full((9, 11), number, dtype=np.uint8)
        Image.fromarray(image).save(place / "single" / "a" / f"{number}.png")
    shutil.copy(place / "one.png", place / "single" / "a" / "one.png")
    prepared = prepare_images(StoredImages(source="images", path="single"), SIZE, 1, tuning=True)
    with Image.open(place / "one.png") as image:
        expected = prepared.processor(image, return_tensors="pt")["pixel_values"]
    batches = [
        split.collate([split[index] for index in range(len(split))])["pixel_values"]
        for split in (prepared.train, prepared.held_out, prepared.tuning)
        if split is not None
    ]
    assert (torch.cat(batches) == expected).all(dim=(1, 2, 3)).sum() == 1


def test_digits() -> None:
    pytest.importorskip("sklearn")
    prepared = prepare_images(DigitsImages(source="digits"), 8, 10, tuning=True)
    assert prepared.tuning
    assert len(prepared.train) + len(prepared.held_out) + len(prepared.tuning) == 1797
    batch = prepared.train.collate([prepared.train[index] for index in range(64)])["pixel_values"]
    assert batch.shape == (64, 3, 8, 8)
    assert (batch.min(), batch.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "no such folder or .npz file"),
        ("text.npz", b"text", "does not load"),
        ("floats.npz", {"x_train": np.zeros((2, 6, 6)), "y_train": np.zeros(2, int)}, "images are float64"),
        ("short.npz", {"x_train": np.zeros((2, 6, 6), np.uint8), "y_train": np.zeros(3, int)}, "a class from 0"),
        ("half.npz", {"x_train": np.zeros((2, 6, 6), np.uint8)}, "has no y_train"),
        ("many.npz", {"x_train": np.zeros((2, 6, 6), np.uint8), "y_train": np.array([0, 7])},
         "the images have 8 classes, model.classes is 3"),
        ("few.npz", {"x_train": np.zeros((2, 6, 6), np.uint8), "y_train": np.array([0, 2])}, "no image is left"),
        ("folder/a/bad.png", b"text", "is not an image that can be read"),
        ("empty/note.txt", b"text", "holds no folders of classes"),
        ("cut/train-images-idx3-ubyte", b"\0\0\x08\x03" + bytes(12) + b"x", "has no train-labels-idx1-ubyte"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_read(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    source = tmp_path / Path(name).parts[0]
    with pytest.raises(Failure, match=message):
        prepare_images(StoredImages(source="images", path=str(source)), SIZE, 3)


# -- a run ---------------------------------------------------------------------------------------------------


def test_training_learns_and_reports_the_accuracy(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((trained / "run.json").read_text())
    result = facts["result"]
    assert result["accuracy"] > 0.9
    assert result["bits_per_byte"] is None
    assert result["images_per_second"] > 0
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["images"] == 30 * 8
    assert rows[-1]["accuracy"] == result["accuracy"]
    card = (trained / "model" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert f"| held-out accuracy | {result['accuracy']:.2%} |" in card


def test_transformers_reads_the_folder(trained: Path) -> None:
    folder = trained / "model"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).id2label == {0: "0", 1: "1", 2: "2"}
    pixels, classes = stripes(32, seed=9)
    images = [Image.fromarray(image) for image in pixels]
    inputs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    output = model.eval()(**inputs, labels=torch.from_numpy(classes), output_hidden_states=True)
    assert (output.logits.argmax(-1).numpy() == classes).mean() > 0.8
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.from_numpy(classes)))
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], output.logits)
    states = AutoModel.from_pretrained(folder).eval()(**inputs)
    torch.testing.assert_close(states.last_hidden_state, output.hidden_states[-1])
    with pytest.raises(ValueError, match="images are 3 x 8 x 8, this model reads 3 x 6 x 6"):
        model(torch.zeros(1, 3, 8, 8))


def test_a_resumed_run_ends_with_the_same_weights(trained: Path, place: Path) -> None:
    again = place / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "checkpoint-30")
    facts = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**facts, "result": None}))
    run("train", "alone.yaml", "--output", "again", "--resume", "auto")
    expected, found = (load_file(each / "model" / "model.safetensors") for each in (trained, again))
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((trained / "run.json").read_text())["result"]
    run("evaluate", "--model", "run", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == result["accuracy"]
    assert found["nats_per_image"] == pytest.approx(result["held_out_loss"])
    run("evaluate", "alone.yaml", "--model", "run", "--dtype", "bfloat16")
    assert "accuracy" in capsys.readouterr().out


def test_evaluate_a_model_on_the_hub(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched(trained / "model", "someone/stripes", tmp_path, monkeypatch)
    run("evaluate", "alone.yaml", "--model", "someone/stripes", "--json")
    result = json.loads((trained / "run.json").read_text())["result"]
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["accuracy"]


def test_the_command_on_the_card_works(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (trained / "model" / "README.md").read_text()
    assert "with the recipe below as recipe.yaml" in card
    command = re.search("^sparsecli (.+)", card, re.MULTILINE)
    recipe = re.search("```yaml\n(.+?)```", card, re.DOTALL)
    assert command
    assert recipe
    monkeypatch.chdir(trained / "model")
    path = trained.parent / "recipe.yaml"
    path.write_text(recipe[1].replace("images.npz", str(trained.parent / "images.npz")))
    run(*command[1].replace("recipe.yaml", str(path)).split())
    assert "accuracy" in capsys.readouterr().out


def test_bench_of_runs_and_of_random_weights(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((trained / "run.json").read_text())["result"]
    run(
        "bench",
        "--model",
        "run",
        "--dtype",
        "float32",
        "--batch",
        "1,2",
        "--rounds",
        "1",
        "--profile",
        "--json",
    )
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["unit"] == "image"
    assert [row["batch"] for row in found["rows"]] == [1, 2]
    assert found["rows"][0]["held_out_accuracy"] == result["accuracy"]
    assert {"attention", "feed-forward", "head"} <= found["rows"][0]["parts"].keys()
    variants = "bench.variants=[{name: all, group: sparse}]"
    run("bench", "tiny.yaml", variants, "--format", "markdown")
    table = capsys.readouterr().out
    assert "images / s" in table
    assert "ms / image" in table
    assert "token" not in table


def test_a_study_compares_accuracies(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes longer than such a short run
    short = ("train.max_steps=10", "train.save_steps=10", "train.eval_steps=10")
    run("train", "tiny.yaml", *short, "--output", "study", "--dry-run")
    run("train", "tiny.yaml", *short, "--output", "study")
    assert "images" in capsys.readouterr().out
    table = (place / "study" / "study.md").read_text()
    assert "held-out accuracy" in table
    assert "80 training images" in table
    assert "token" not in table
    rows = json.loads((place / "study" / "study.json").read_text())["rows"]
    for row in rows:
        assert len(row["accuracies"]) == 2
        assert row["accuracy"] == pytest.approx(sum(row["accuracies"].values()) / 2)
    assert "accuracy_seed_1" in (place / "study" / "study.csv").read_text()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--model", "run", "--prompt", "a"],
        ["serve", "--model", "run"],
        ["sparsify-convert", "quickstart-convert", "--model", "run"],
        ["pack", "run", "--output", "packed"],
        ["export", "run", "--output", "exported"],
        ["import", "run", "--output", "imported"],
    ],
    ids=lambda command: command[0],
)
def test_other_commands_refuse(
    trained: Path, place: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        run(*command)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is a model of images, and this is for models of text" in error
    assert not (place / command[-1]).exists() or command[-1] in ("run",)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench", "--model", "run", "--context", "8"], "--context: is for models of text"),
        (["bench", "--model", "run", "--backend", "native"], "--backend native: is for models of text"),
        (["evaluate", "--model", "run", "--text", "a.txt"], "--text: is for models of text"),
        (["evaluate", "--model", "run", "--dtype", "int8"], "--dtype: int8 is for models of text"),
    ],
)
def test_options_that_are_for_text(
    trained: Path, command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").touch()
    with pytest.raises(AssertionError):
        run(*command)
    assert message in capsys.readouterr().err


def test_a_damaged_folder(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 32}))
    with pytest.raises(Failure, match=r"tensor .* is .*, config\.json asks for"):
        load_classifier(folder)
    (folder / "config.json").write_text(json.dumps({**config, "patch_size": 5}))
    with pytest.raises(Failure, match="image_size: 6 is not a multiple of patch_size 5"):
        load_classifier(folder)


def test_a_batch_that_images_do_not_fill(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        run("train", "alone.yaml", "train.per_device_train_batch_size=999", "--output", "unfilled")
    assert "training images do not fill a batch of 999" in capsys.readouterr().err
