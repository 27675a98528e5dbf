"""transformers loads our folders in a process that never imports sparsecli itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from foreign_models import LLAMA, build, save

from sparsecli.interchange.importing import run
from sparsecli.model import (
    ScalingTransformerForConditionalGeneration,
    TerraformerConfig,
    TerraformerForConditionalGeneration,
    auto,
)
from sparsecli.model.remote_code import REMOTE_CODE
from sparsecli.spec.vision import VisionSpec

SIZES = {
    "d_model": 16,
    "layers": 1,
    "heads": 2,
    "max_positions": 32,
    "vocabulary": {"kind": "dense", "size": 64},
}
PROGRAM = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSeq2SeqLM
from transformers import AutoTokenizer, pipeline

trained, imported, encoder_decoder, images, terraformer, again = sys.argv[1:]
assert "sparsecli" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(trained)
except ValueError as error:
    print(str(error).splitlines()[-1])
for auto, folder in (
    (AutoModelForCausalLM, trained),
    (AutoModelForCausalLM, imported),
    (AutoModelForSeq2SeqLM, encoder_decoder),
    (AutoModelForImageClassification, images),
    (AutoModelForSeq2SeqLM, terraformer),
    (AutoModel, terraformer),
):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    print(type(model).__module__, type(model).__name__)
model.save_pretrained(again)
print(type(AutoTokenizer.from_pretrained(trained)).__name__)
write = pipeline("text-generation", trained, trust_remote_code=True)
print(len(write("1 and", max_new_tokens=4, do_sample=False)[0]["generated_text"]) > 5)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import")
    run(source=str(save(build("llama", **LLAMA), folder / "theirs")), output=folder / "ours")
    return folder / "ours"


def python(program: str, *arguments: Path, path: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=cache, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def test_every_model_folder_names_the_classes_and_has_the_file(
    finished: tuple[Path, object], imported: Path, tmp_path: Path
) -> None:
    terraformer = tmp_path / "terraformer"
    TerraformerConfig(**SIZES).save_pretrained(terraformer)
    for folder in (finished[0] / "model", imported, terraformer):
        source = (folder / REMOTE_CODE).read_text()
        namespace: dict[str, type] = {}
        exec(compile(source, REMOTE_CODE, "exec"), namespace)
        fields = json.loads((folder / "config.json").read_text())
        network = auto.NETWORKS[fields["model_type"]]
        found = {
            name: namespace[place.removeprefix("sparsecli_model.")]
            for name, place in fields["auto_map"].items()
        }
        heads = {"AutoModelForCausalLM", "AutoModelForSeq2SeqLM"} & found.keys()
        assert [found[name] for name in heads] == [network]
        assert found["AutoConfig"] is network.config_class
        assert found["AutoModel"] is network.model_class


def test_transformers_loads_them_without_an_import_of_ours(
    finished: tuple[Path, object], imported: Path, tmp_path: Path
) -> None:
    for name, network in (
        ("encoder-decoder", ScalingTransformerForConditionalGeneration),
        ("terraformer", TerraformerForConditionalGeneration),
    ):
        network(network.config_class(**SIZES)).save_pretrained(tmp_path / name)
    images = {
        "kind": "vision",
        "image_size": 8,
        "patch_size": 4,
        "classes": 3,
        "d_model": 16,
        "layers": 1,
        "heads": 2,
    }
    spec = VisionSpec.model_validate(images | {"feed_forward": {"kind": "dense", "d_ff": 16}})
    auto.build_classifier(spec).save_pretrained(tmp_path / "images")
    made = [tmp_path / name for name in ("encoder-decoder", "images", "terraformer")]
    folders = [finished[0] / "model", imported, *made]
    ended = python(
        PROGRAM, *folders, tmp_path / "again", path=str(Path(auto.__file__).parents[2]), cache=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line.partition("[y/N] ")[2] or line for line in ended.stdout.splitlines()]
    assert "Please pass the argument `trust_remote_code=True` to allow custom code to be run." in lines
    for name in (
        *("causal_lm ScalingTransformerForCausalLM", "terraformer TerraformerForConditionalGeneration"),
        *("encoder_decoder ScalingTransformerForConditionalGeneration", "terraformer TerraformerModel"),
        "vision ScalingTransformerForImageClassification",
    ):
        assert f"sparsecli.model.{name}" in lines
    assert lines[-1] == "True"
    # Saved again, a folder holds our small file, not copies of the package's modules.
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == [REMOTE_CODE]


@pytest.mark.slow
def test_without_sparsecli_a_line_says_what_to_install(finished: tuple[Path, object], tmp_path: Path) -> None:
    hidden = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'sparsecli':\n"
        "            raise ModuleNotFoundError('No module named sparsecli')\n"
        "sys.meta_path.insert(0, Hidden)\n"
    )
    load = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(finished[0] / 'model')!r}, trust_remote_code=True)"
    )
    ended = python(hidden + load, path="", cache=tmp_path)
    assert ended.returncode == 1
    assert "Run `pip install sparsecli`" in ended.stderr.splitlines()[-1]
