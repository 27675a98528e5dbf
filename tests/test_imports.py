"""Imports run one way, printing happens in one place, and `import sparsecli` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsecli

ROOT = Path(sparsecli.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# What a module may import of ours, by the longest prefix of its name. Lazy imports count like any other.
LAYERS = {
    "sparsecli": set(),
    "sparsecli.console": set(),
    "sparsecli.spec": {"sparsecli.spec"},
    "sparsecli.model.layers": {
        *("sparsecli.model.layers", "sparsecli.spec"),
        *("sparsecli.model.quantization", "sparsecli.model.gguf_types"),
    },
    "sparsecli.model.layers.native_units": {
        *("sparsecli.model.layers", "sparsecli.console"),
        "sparsecli.decode.native.binding",
    },
    "sparsecli.model.quantization": set(),
    "sparsecli.model.gguf_types": set(),
    "sparsecli.model": {"sparsecli.model", "sparsecli.spec", "sparsecli.console"},
    "sparsecli.recipe": {"sparsecli.recipe", "sparsecli.spec", "sparsecli.console"},
    "sparsecli.recipe.commands": {
        *("sparsecli.recipe", "sparsecli.console"),
        *("sparsecli.model", "sparsecli.spec"),
    },
    "sparsecli.data": {
        *("sparsecli.data", "sparsecli.console", "sparsecli.recipe"),
        "sparsecli.spec.vocabulary",  # token ids
    },
}
BELOW_COMMANDS = {
    "sparsecli",  # its version
    "sparsecli.console",
    "sparsecli.recipe",
    "sparsecli.spec",
    "sparsecli.model",
    "sparsecli.data",
}
LAYERS |= {
    "sparsecli.decode": {"sparsecli.decode", "sparsecli.console", "sparsecli.spec"},
    "sparsecli.decode.packed": {
        *("sparsecli.decode.packed", "sparsecli.console", "sparsecli.spec"),
        *("sparsecli.model.quantization", "sparsecli.model.gguf_types", "sparsecli.model.rotary"),
    },
    "sparsecli.decode.packed.folder": {
        *("sparsecli.decode.packed", "sparsecli.console"),
        *("sparsecli.spec", "sparsecli.model.files"),
    },
    "sparsecli.decode.native.binding": {"sparsecli.console"},
    "sparsecli.decode.native.rounding": {"sparsecli.decode.native"},
    "sparsecli.decode.native.gguf": {"sparsecli.decode.native", "sparsecli.model.gguf_types"},
    "sparsecli.decode.native.shape": {
        *("sparsecli.decode.native", "sparsecli.decode.packed"),
        "sparsecli.spec",
        "sparsecli.decode.native.gguf",
    },
    "sparsecli.decode.lsh_rotations": {
        *("sparsecli.spec", "sparsecli.model.layers.lsh"),  # rotations are PyTorch's
    },
    "sparsecli.decode.reference": {
        *("sparsecli.decode.reference", "sparsecli.decode.packed"),
        *("sparsecli.decode.kv_state", "sparsecli.decode.lsh_rotations"),
        *("sparsecli.model.quantization", "sparsecli.model.gguf_types"),
    },
    "sparsecli.evaluate": BELOW_COMMANDS
    | {f"sparsecli.{name}" for name in ("evaluate", "generate", "decode", "interchange")},
    "sparsecli.evaluate.losses": {
        *("sparsecli.console", "sparsecli.data", "sparsecli.decode", "sparsecli.model")
    },
    "sparsecli.train": BELOW_COMMANDS | {"sparsecli.train", "sparsecli.evaluate.losses"},
    "sparsecli.generate": BELOW_COMMANDS
    | {"sparsecli.generate", "sparsecli.decode", "sparsecli.interchange.model_folder"},
    "sparsecli.serve": BELOW_COMMANDS
    | {"sparsecli.serve", "sparsecli.generate", "sparsecli.decode", "sparsecli.interchange.model_folder"},
    "sparsecli.generate.decoder": set(),
    "sparsecli.generate.chat": {"sparsecli.console"},  # it runs in a process of its own
    "sparsecli.generate.sampling": {"sparsecli.console", "sparsecli.recipe"},
    "sparsecli.pack": {"sparsecli.console", "sparsecli.model", "sparsecli.spec", "sparsecli.decode"},
    "sparsecli.interchange.kept_imports": {
        *("sparsecli", "sparsecli.interchange", "sparsecli.console"),
        *("sparsecli.model.files", "sparsecli.model.outputs"),
    },
    "sparsecli.interchange": {
        "sparsecli.interchange",
        "sparsecli.console",
        "sparsecli.model",
        "sparsecli.spec",
        "sparsecli.decode.native.gguf",
    },
    "sparsecli.bench": BELOW_COMMANDS
    | {
        f"sparsecli.{name}"
        for name in ("bench", "train", "decode", "interchange", "generate.decoder", "report")
    },
    "sparsecli.bench.result": {"sparsecli.decode.packed", "sparsecli.recipe"},
    "sparsecli.bench.decoders": {
        *("sparsecli.bench.decoders", "sparsecli.bench.random_weights"),
        *("sparsecli.model", "sparsecli.spec", "sparsecli.decode"),
    },
    "sparsecli.bench.peers": {
        *("sparsecli.bench.peers", "sparsecli.bench.variants", "sparsecli.bench.random_weights"),
        *("sparsecli.console", "sparsecli.model", "sparsecli.spec"),
        "sparsecli.interchange.gguf_reader",
    },
    "sparsecli.convert": BELOW_COMMANDS
    | {
        f"sparsecli.{name}"
        for name in ("convert", "evaluate", "train", "bench", "decode", "interchange", "report")
    },
    "sparsecli.convert.methods": {
        *("sparsecli.convert.methods", "sparsecli.console", "sparsecli.model", "sparsecli.spec"),
        "sparsecli.train.controllers",
        "sparsecli.decode.native.rounding",
    },
    "sparsecli.study": BELOW_COMMANDS
    | {f"sparsecli.{name}" for name in ("study", "train", "bench", "convert", "decode", "evaluate")},
    "sparsecli.report": {"sparsecli.report", "sparsecli.console"},
    "sparsecli.doctor": BELOW_COMMANDS | {"sparsecli.bench", "sparsecli.decode"},
    "sparsecli.cli": {
        "sparsecli",
        "sparsecli.cli",
        "sparsecli.console",
        "sparsecli.recipe",
        # What can be refused before PyTorch is loaded.
        *(
            "sparsecli.model.files",
            "sparsecli.model.outputs",
            "sparsecli.report.files",
            "sparsecli.data.corpus",
            "sparsecli.data.places",
        ),
    }
    | {
        f"sparsecli.{name}"
        for name in (
            "train",
            "generate",
            "serve",
            "evaluate",
            "pack",
            "bench",
            "convert",
            "doctor",
            "interchange",
            "study",
        )
    },
    "sparsecli.__main__": {"sparsecli.cli"},
}

LIGHT = ["sparsecli", "sparsecli.console", "sparsecli.model"]
LIGHT += [name for name in MODULES if name.startswith(("sparsecli.cli", "sparsecli.recipe"))]
HEAVY = {"torch", "transformers", "numpy", "datasets", "tokenizers", "safetensors", "accelerate"}


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports; `from sparsecli import cli` counts as `sparsecli.cli`."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def strays(name: str) -> list[str]:
    prefix = max((prefix for prefix in LAYERS if within(name, prefix)), key=len)
    assert prefix != "sparsecli" or name == "sparsecli", f"{name}: give it a place in LAYERS"
    # "sparsecli" itself stands for its own file alone, not for everything below it.
    return [
        imported
        for imported in imports(MODULES[name])
        if within(imported, "sparsecli")
        and not any(imported == ok if ok == "sparsecli" else within(imported, ok) for ok in LAYERS[prefix])
    ]


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    assert strays(name) == []


def test_a_wrong_import_is_noticed(tmp_path, monkeypatch):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from sparsecli.train import command\n    from sparsecli import cli\n")
    monkeypatch.setitem(MODULES, "sparsecli.model.layers.wrong", wrong)
    assert strays("sparsecli.model.layers.wrong") == ["sparsecli.train.command", "sparsecli.cli"]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name):
    assert (
        not {imported.partition(".")[0] for imported in imports(MODULES[name], top_level_only=True)} & HEAVY
    )


def printing(path: Path) -> list[int]:
    """Lines that print, or write to the standard streams."""
    tree = ast.parse(path.read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if (isinstance(call, ast.Name) and call.id == "print")
        or ast.unparse(call) in ("sys.stdout.write", "sys.stderr.write", "typer.echo", "rich.print")
    ]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "sparsecli.console"])
def test_only_the_console_prints(name):
    assert printing(MODULES[name]) == []


def test_printing_is_noticed(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import sys\nprint(1)\nsys.stderr.write('x')\n")
    assert printing(wrong) == [2, 3]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_sparsecli_is_light():
    heavy = python(
        "import sys, sparsecli, sparsecli.model\n"
        "print({'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules))"
    )
    assert heavy == "set()\n"


def test_decoding_and_generating_import_neither_torch_nor_transformers():
    heavy = python(
        "import sys, sparsecli.decode.engine, sparsecli.generate.command, sparsecli.pack\n"
        "print({'torch', 'transformers', 'jinja2', 'rich'} & set(sys.modules))"
    )
    assert heavy == "set()\n"


def test_a_missing_model_is_refused_before_heavy_imports():
    commands = [
        *("generate --model no/where --prompt x", "evaluate --model no/where", "serve --model no/where"),
        *("bench --model no/where", "export no/where --output x", "push no/where a/b", "pack no/where"),
        *("import no/where/x --output x", "sparsify-convert convert-smollm2 --model no/where --output x"),
    ]
    refused = python(
        "import os, sys, sparsecli.cli\n"
        "os.environ['HF_HUB_OFFLINE'], sys.stderr = '1', sys.stdout\n"
        f"for command in {commands}:\n"
        "    sys.argv = ['sparsecli', *command.split()]\n"
        "    try:\n"
        "        sparsecli.cli.main()\n"
        "    except SystemExit as end:\n"
        "        assert (end.code, 'torch' in sys.modules) == (1, False), command\n"
    ).splitlines()
    assert len(refused) == len(commands)
    assert all(line.startswith("error: no/where") and ": no such f" in line for line in refused)


ORDERS = [
    "import sparsecli.model.auto; from transformers import AutoConfig, AutoModelForCausalLM",
    "from transformers import AutoConfig, AutoModelForCausalLM; import sparsecli.model.auto",
    "from sparsecli.model import TerraformerConfig; from transformers import AutoConfig, AutoModelForCausalLM",
]


@pytest.mark.slow
def test_auto_classes_know_the_models_in_every_order():
    """Each in a process of its own, which begins where torch is loaded: that takes the most time."""
    made = python(
        "import os, torch.distributed.tensor, torch.export\n"
        f"for first in {ORDERS}:\n"
        "    if os.fork():\n"
        "        assert os.wait()[1] == 0, first\n"
        "        continue\n"
        "    exec(first)\n"
        "    from transformers import AutoModelForSeq2SeqLM\n"
        "    autos = {'scaling_transformer': AutoModelForCausalLM, 'terraformer': AutoModelForSeq2SeqLM}\n"
        "    for name, auto in autos.items():\n"
        "        config = AutoConfig.for_model(name)\n"
        "        print(type(config).__module__, auto._model_mapping[type(config)].__module__, flush=True)\n"
        "    os._exit(0)"  # without a second for taking all modules down
    )
    assert made.split() == len(ORDERS) * [
        *("sparsecli.model.configuration", "sparsecli.model.causal_lm"),
        *("sparsecli.model.configuration", "sparsecli.model.terraformer"),
    ]
