"""The command line: arguments in, exit code out. What a command does is in the module that it imports."""

from __future__ import annotations

import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from sparsecli import __version__, console
from sparsecli.arguments import (
    AsJson,
    DryRun,
    Dtype,
    Format,
    Model,
    OptionalRecipe,
    Output,
    Overrides,
    RecipeArgument,
    Seed,
    Threads,
    WeightDtype,
    numbers,
    percent,
)
from sparsecli.console import Failure, RecipeError
from sparsecli.prompt import read_prompt
from sparsecli.recipe_cli import recipes

if TYPE_CHECKING:
    from sparsecli.recipe.loader import LoadedRecipe
    from sparsecli.recipe.schema import GenerateSpec

app = typer.Typer(
    name="sparsecli",
    help="Train, convert, run and measure sparse Transformers on plain CPUs.",
    epilog="Start with: sparsecli train quickstart",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes, name="recipes")

debug = False
"""Whether errors show where they come from; set by `--debug`."""


def main() -> None:
    """Entry point: every error ends as one clear line and an exit code."""
    code = None
    try:
        code = app(prog_name="sparsecli", standalone_mode=False)
    except Failure as failure:
        _end(failure)
    except TyperException as error:
        _end(_usage(error))
    except KeyboardInterrupt:
        _end(Failure("interrupted", exit_code=130))
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        _end(Failure(f"{error.filename}: {reason}" if error.filename else reason))
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the words are PyTorch's
            _end(Failure("memory does not suffice; use a smaller model, context or batch"))
        lines = str(error).strip().splitlines() or [""]
        name = type(error).__name__
        _end(Failure(f"unexpected {name}: {lines[0]} (`sparsecli --debug ...` shows where it comes from)"))
    sys.exit(code)


def _usage(error: TyperException) -> Failure:
    """What is wrong with the command line, in the words of our own checks."""
    said = error.format_message().replace(": Input should be ", ": expected a number ").rstrip(".")
    if len(said.splitlines()) > 1:  # the help, where there is no argument at all
        console.say(said)
        sys.exit(error.exit_code)
    if wrong := re.fullmatch(r"Invalid value for '(.+?)': (?:Value error, )?(.+)", said):
        return Failure(f"{wrong[1]}: {wrong[2][0].lower()}{wrong[2][1:]}", error.exit_code)
    context = getattr(error, "ctx", None)
    helps = f"; {context.command_path} -h shows what there is" if context else ""
    return Failure(f"{said[0].lower()}{said[1:]}{helps}", error.exit_code)


def _end(failure: Failure) -> None:
    if debug:
        console.say(traceback.format_exc())
    console.fail(failure)
    # What stdout still holds cannot be written when it is full or gone; Python would complain once more on exit.
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(failure.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        console.out(f"sparsecli {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    show_traceback: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    global debug
    debug = show_traceback


def _load(reference: str, overrides: list[str] | None, seed: int | None = None) -> LoadedRecipe:
    from sparsecli.recipe.loader import load

    return load(reference, [*(overrides or []), *([] if seed is None else [f"seed={seed}"])])


def _shift(reference: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Where the recipe may be left out, the first override stands in its place."""
    if reference and "=" in reference and not Path(reference).exists():
        return None, [reference, *(overrides or [])]
    return reference, overrides or []


# -- commands ------------------------------------------------------------------------------------------------


@app.command(epilog="Example: sparsecli train quickstart train.max_steps=200 --output runs/short")
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Output = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto", help="auto: go on from the newest whole checkpoint.", show_default=False
        ),
    ] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model.

    The recipe needs model, data and train blocks. Runs unchanged under torchrun and accelerate launch.
    """
    loaded = _load(recipe, overrides, seed)
    from sparsecli.train import command

    command.run(loaded, output=output or loaded.output, resume=resume, dry_run=dry_run)


@app.command("sparsify-convert", epilog="Example: sparsecli sparsify-convert quickstart-convert --dry-run")
def sparsify_convert(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A run, a model's folder, a name on the Hugging Face hub, or a GGUF file.",
            show_default=False,
        ),
    ] = None,
    output: Output = None,
    seed: Seed = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="llama.cpp: the dense model there, beside our rows.", show_default=False
        ),
    ] = None,
    dry_run: DryRun = False,
    format: Annotated[Format, typer.Option(help="Of the report on stdout.")] = "table",
    json: AsJson = False,
) -> None:
    """Make a dense model cheaper to decode.

    In fewer bits, or with fewer units a token; what that costs is measured. The recipe needs a convert block; without
    a data block, the text is that of the dense run, else Python's standard library.
    """
    loaded = _load(recipe, overrides, seed)
    from sparsecli.convert import command
    from sparsecli.recipe.loader import check_unread

    check_unread(overrides or (), "sparsify-convert", {"model", "train"})

    command.run(
        loaded,
        model=model,
        output=output or loaded.output,
        peers=peer or None,
        dry_run=dry_run,
        format="json" if json else format,
    )


@app.command(epilog='Example: sparsecli generate --model runs/quickstart --prompt "def " --temperature 0')
def generate(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to go on from; - reads stdin.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File that holds the prompt.", show_default=False)
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="Text for a model with an encoder; - is stdin.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after so many tokens (128).")
    ] = None,
    temperature: Annotated[float | None, typer.Option(metavar="X", help="0 is greedy (0.8).")] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", help="Among the k likeliest tokens; 0 is all (0).")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="X", help="Among the likeliest tokens of this probability (0.95).")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="X", help="None below this share of the likeliest (0).")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Above 1: repeat less (1).")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text that ends it; may be repeated.")
    ] = None,
    seed: Seed = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template, where it has one.")
    ] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Show speeds of prefill and decode.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object in place of a stream.")] = False,
    backend: Annotated[
        Literal["auto", "native", "torch"], typer.Option(help="What decodes; auto: native where it can.")
    ] = "auto",
    dtype: Annotated[
        WeightDtype | None, typer.Option(help="Weight type; float32, or as packed.", show_default=False)
    ] = None,
    cache_dtype: Annotated[
        Dtype | None, typer.Option(help="Of keys and values; by --dtype.", show_default=False)
    ] = None,
    threads: Threads = None,
) -> None:
    """Go on from a prompt, or summarize an input.

    The prompt comes from --prompt, --prompt-file, a pipe, or the recipe; for a model with an encoder it is the
    input, as --input is. Without --model it is the recipe's run that speaks, else the newest finished run under
    runs/. Options that are not given are the recipe's, else those that the run was made with.
    """
    recipe, overrides = _shift(recipe, overrides)
    if overrides and not recipe:
        raise RecipeError(f"{overrides[0]}: an override needs a recipe to change; name one first")
    loaded = _load(recipe, overrides, seed) if recipe else None
    from sparsecli.recipe.loader import check_unread, with_options

    check_unread(overrides, "generate", {"model", "data", "train", "convert", "bench"})
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
    }
    found = None if loaded else _find(model)
    defaults = loaded.recipe.generate if loaded else _options_of(found)
    options = with_options(defaults, {name: value for name, value in given.items() if value is not None})
    text = read_prompt(prompt, prompt_file, input_file, options.prompt)
    from sparsecli import generate as implementation

    implementation.run(
        loaded,
        model=str(found) if found else model,
        prompt=text,
        is_input=input_file is not None,
        options=options,
        seed=loaded.recipe.seed if loaded else seed or 0,
        stats=stats,
        json=json,
        backend=backend,
        dtype=dtype,
        cache_dtype=cache_dtype,
        threads=threads,
        chat=chat,
    )


def _find(model: str | None) -> Path | None:
    """The folder of the model that speaks; None where there is none, which is said once all options are right."""
    from sparsecli.model.files import find_model

    try:
        return find_model(model)
    except Failure:
        return None


def _options_of(folder: Path | None) -> GenerateSpec:
    """The `generate:` block of the run that speaks, without its prompt; the defaults where it is none of our runs."""
    from sparsecli.model.files import recipe_of
    from sparsecli.recipe.loader import load
    from sparsecli.recipe.schema import GenerateSpec

    stored = recipe_of(folder) if folder else None
    return load(str(stored)).recipe.generate.model_copy(update={"prompt": None}) if stored else GenerateSpec()


@app.command(
    "import", epilog="Example: sparsecli import HuggingFaceTB/SmolLM2-135M-Instruct --output smollm2"
)
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face folder, a name on the hub, or a GGUF file.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to.", show_default=False)],
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.", show_default=False),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Take in a dense model of another architecture.

    Llama, Mistral, Qwen 2 and 3, Gemma, GPT-2, OPT and GPT-NeoX; the result computes exactly what the original does.
    """
    from sparsecli.interchange import importing

    importing.run(source=source, output=output, revision=revision, dry_run=dry_run)


@app.command(epilog="Example: sparsecli export smollm2 --output smollm2-hf")
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run or a model folder.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to.", show_default=False)],
) -> None:
    """Write an imported model in its own architecture.

    The output is a Hugging Face folder that transformers loads by itself. The model must still be dense.
    """
    from sparsecli.interchange import exporting

    exporting.run(model=model, output=output)


@app.command(epilog="Example: sparsecli pack runs/quickstart --dtype int8")
def pack(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A run or a model folder.", show_default=False)
    ] = None,
    output: Output = None,
    dtype: Annotated[WeightDtype, typer.Option(help="Weight type.")] = "bfloat16",
    dry_run: DryRun = False,
) -> None:
    """Pack a model's weights for the native engine.

    The output is a model folder that `generate` loads as it is, by default beside the model, with the type
    at the end of its name. Without MODEL: the newest finished run under runs/.
    """
    from sparsecli import pack as implementation

    implementation.run(model=model, output=output, dtype=dtype, dry_run=dry_run)


@app.command(
    epilog="Example: sparsecli bench bench-800m --dtype bfloat16 --against base.json --fail-above 5%"
)
def bench(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    dense: Annotated[bool, typer.Option("--dense", help="Only dense variants.")] = False,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Only sparse variants; with --dense, both.")
    ] = False,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="Only mixtures of experts; without these three, all.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="A trained run in place of random weights; may be repeated."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this variant; may be repeated.", show_default=False),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="native or torch; may be repeated.", show_default=False),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another program beside ours; may be repeated.", show_default=False
        ),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            metavar="BACKEND:TYPE",
            help="Also the speed-up over that dense row: torch:bfloat16.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE", help="float32, bfloat16, int8 or int4; may be repeated.", show_default=False
        ),
    ] = None,
    threads: Annotated[
        Any, typer.Option(parser=numbers, metavar="N,...", help="CPU threads.", show_default=False)
    ] = None,
    context: Annotated[
        Any,
        typer.Option(
            parser=numbers, metavar="N,...", help="Tokens in the cache at the start.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        Any, typer.Option(parser=numbers, metavar="N,...", help="Sequences at once.", show_default=False)
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also read a prompt of N tokens.", show_default=False),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Time the parts of a token.")] = False,
    from_disk: Annotated[
        bool, typer.Option("--from-disk", help="Read sparse units from a file, cold.")
    ] = False,
    disk_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where that file lies for the time.", show_default=False),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Turns of every variant.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Measured tokens of a turn.")] = None,
    seed: Seed = None,
    format: Annotated[Format, typer.Option(help="Of the result on stdout.")] = "table",
    json: AsJson = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the result here: .csv, .md, else JSON.", show_default=False
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An earlier result (JSON) to compare with.", show_default=False),
    ] = None,
    fail_above: Annotated[
        Any,
        typer.Option(
            parser=percent, metavar="PERCENT", help="Exit 3 when slower than that.", show_default=False
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Measure decoding, dense against sparse.

    Without a recipe: the paper's Table 1 at 800M parameters, one token at a time, random weights.
    """
    recipe, overrides = _shift(recipe, overrides)
    loaded = _load(recipe or "bench-800m", overrides, seed)
    from sparsecli.bench import command
    from sparsecli.recipe.loader import check_unread

    if model:
        check_unread(overrides, "bench --model", {"model", "data", "train", "convert"})

    command.run(
        loaded,
        dense=dense,
        sparse=sparse,
        mixture=mixture,
        names=variant or None,
        backends=backend or None,
        peers=peer or None,
        over=over,
        dtypes=dtype or None,
        threads=threads,
        context=context,
        batch=batch,
        prefill=prefill,
        profile=profile,
        from_disk=from_disk,
        disk_folder=disk_folder,
        rounds=rounds,
        tokens=tokens,
        format="json" if json else format,
        against=against,
        fail_above=fail_above,
        output=output,
        dry_run=dry_run,
        models=model or [],
    )


@app.command()
def doctor(
    format: Annotated[Literal["table", "json"], typer.Option(help="Of the answer on stdout.")] = "table",
    json: AsJson = False,
) -> None:
    """Say what this machine and this installation can do."""
    from sparsecli import doctor as implementation

    implementation.run("json" if json else format)
