"""`sparsecli bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsecli.cli.options import (
    AsJson,
    DryRun,
    Format,
    Html,
    OptionalRecipe,
    Overrides,
    Plot,
    Saved,
    Seed,
    check_alone,
    numbers,
    percent,
    shift,
)
from sparsecli.console import Failure

app = typer.Typer()


@app.command(
    epilog="Example: sparsecli bench bench-800m --dtype bfloat16 --against base.json --fail-above 5%"
)
def bench(
    arguments: typer.Context,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    dense: Annotated[bool, typer.Option("--dense", help="Only dense variants.")] = False,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Measure only sparse variants; with --dense, both.")
    ] = False,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="Measure only mixtures; without these three, all.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR", help="A trained run or a GGUF file instead of random weights; may be repeated."
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Measure only this variant; may be repeated.", show_default=False),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="native or torch; may be repeated.", show_default=False),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another program to measure too; may be repeated.", show_default=False
        ),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            metavar="BACKEND:TYPE",
            help="Also show the speed-up over this dense row, e.g. torch:bfloat16.",
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
        typer.Option(metavar="N", help="Also measure the prefill of N tokens.", show_default=False),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Time the parts of a decode step.")] = False,
    from_disk: Annotated[
        bool, typer.Option("--from-disk", help="Read sparse units from disk, uncached.")
    ] = False,
    disk_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the temporary file.", show_default=False),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Rounds; a variant has one turn in each.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Measured tokens in a turn.")] = None,
    seed: Seed = None,
    format: Annotated[Format, typer.Option(help="Format of the result on stdout.")] = "table",
    json: AsJson = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the result here: .csv, .md, else JSON.", show_default=False
        ),
    ] = None,
    html: Html = None,
    plot: Plot = None,
    saved: Saved = None,
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
    """Compare the decoding speed of dense and sparse models.

    Without a recipe, the models are those of the paper's Table 1 at 800M parameters, with random weights.
    """
    if saved:
        own = {"saved", "format", "json", "output", "html", "plot", "against", "fail_above"}
        check_alone(arguments, "--from", own)
    recipe, overrides = shift(recipe, overrides)
    reports: dict[str, Any] = {
        "format": "json" if json else format,
        "output": output,
        "html": html,
        "plot": plot,
    }
    from sparsecli.report import files

    if fail_above is not None and against is None:
        raise Failure("--fail-above needs --against FILE, an earlier result in JSON", exit_code=2)
    for option, path in (("--against", against), ("--from", saved)):
        if path:
            files.check_readable(path, option)
    if output:
        files.check_writable(output, "--output")
    files.check_reports(html, plot)
    if saved:
        from sparsecli.bench import command

        command.show_saved(saved, against=against, fail_above=fail_above, **reports)
        return

    options = {
        "--backend": ("bench.backends", backend or None),
        "--peer": ("bench.peers", peer or None),
        "--dtype": ("bench.dtypes", dtype or None),
        "--threads": ("bench.threads", threads),
        "--context": ("bench.context", context),
        "--batch": ("bench.batch", batch),
        "--prefill": ("bench.prefill", prefill),
        "--profile": ("bench.profile", profile or None),
        "--from-disk": ("bench.from_disk", from_disk or None),
        "--rounds": ("bench.rounds", rounds),
        "--tokens": ("bench.tokens_per_round", tokens),
        "--seed": ("seed", seed),
    }
    from sparsecli.model.files import check_exists
    from sparsecli.recipe.loader import check_unread, load

    loaded = load(recipe or "bench-800m", overrides, options)
    if model:
        check_unread(overrides, "bench --model", {"model", "data", "train", "convert"})
    for reference in model or []:
        check_exists(reference)
    from sparsecli.bench import command

    command.run(
        loaded,
        dense=dense,
        sparse=sparse,
        mixture=mixture,
        names=variant or None,
        over=over,
        disk_folder=disk_folder,
        against=against,
        fail_above=fail_above,
        **reports,
        dry_run=dry_run,
        runs=model or [],
    )
