"""The report of a conversion as a page and as a figure: loss against time, bytes, units by layer, candidates."""

from __future__ import annotations

from pathlib import Path

from sparsecli.convert.report import (
    CANDIDATE_COLUMNS,
    MODEL_COLUMNS,
    STAGE_COLUMNS,
    TRIAL_COLUMNS,
    MeasuredModel,
    Report,
)
from sparsecli.report import figure, files
from sparsecli.report.page import Bar, Bars, Page, Plot, Point, Stacks, Table, groups_of, render


def write_html(report: Report, path: Path) -> None:
    """Write the page. Raises `Failure` if that fails."""
    files.write_text(path, render(page_of(report)))


def write_figure(report: Report, path: Path) -> None:
    """Write the figure, perplexity against time. Raises `Failure` if that fails."""
    with figure.style():
        drawn, (axes,) = figure.panels([3.4])
        figure.draw_plot(axes, loss_plot(report), groups_of(page_of(report)))
        figure.save(drawn, path)


def page_of(report: Report) -> Page:
    """Everything that the page shows."""
    facts = [fact for fact in report.facts() if fact[0] != "verdict"]
    if report.processor:
        facts.insert(0, ("processor", report.processor))
    sections: list[Table | Bars | Stacks | Plot | None] = [
        loss_plot(report),
        _time_bars(report),
        _share_bars(report),
        Table("Models", MODEL_COLUMNS, report.model_rows(), "Losses on held-out text; times are medians."),
        _layer_bars(report),
        Table("Stages of the conversion", STAGE_COLUMNS, report.stage_rows()) if report.stages else None,
        Table("Candidates of the search", CANDIDATE_COLUMNS, report.candidate_rows())
        if report.candidates
        else None,
        Table("Trials of the distillation", TRIAL_COLUMNS, trials)
        if (trials := report.trial_rows())
        else None,
    ]
    shown = [section for section in sections if section]
    return Page(f"{report.source} converted", report.verdict, facts, report.command, shown)


def loss_plot(report: Report) -> Plot:
    """Increase of perplexity over the dense model against time."""
    points = [
        Point(
            model.name,
            model.ms_per_token,
            100 * model.loss.perplexity_increase,
            f"{model.ms_per_token:.2f} ms, {model.loss.perplexity_increase:+z.2%}",
            _group(model),
            100 * (model.loss.standard_error or 0.0),
        )
        for model in report.models
    ]
    note = (
        "Lower and further left is better. The line connects the models that no other beats in both; bars are standard "
        "errors."
    )
    labels = "milliseconds per token", "increase of perplexity over dense (%)"
    return Plot("Perplexity against time", points, *labels, note)


def _time_bars(report: Report) -> Bars:
    first = report.models[0].ms_per_token
    bars = [
        Bar(
            model.name,
            model.ms_per_token,
            f"{model.ms_per_token:.2f} ms · {first / model.ms_per_token:.2f}x",
            _group(model),
        )
        for model in report.models
    ]
    return Bars("Milliseconds per token", bars, f"The factor is the speed-up over {report.models[0].name}.")


def _share_bars(report: Report) -> Bars:
    bars = []
    for model in report.models:
        read = model.bytes_per_token / (model.ms_per_token * 1e6) / report.bandwidth_gb_per_second
        bars.append(
            Bar(model.name, read, f"{read:.0%} · {model.bytes_per_token / 1e6:.1f} MB", _group(model))
        )
    note = (
        "The weights that a token reads, divided by its time, as a share of the "
        f"{report.bandwidth_gb_per_second:.1f} GB/s that this machine's memory reads (dashed line)."
    )
    return Bars("Share of the memory bandwidth", bars, note, limit=1.0)


def _layer_bars(report: Report) -> Bars | None:
    """Active units by layer, if they were counted and differ from all."""
    shares = report.kept_fraction_by_layer
    if not shares or min(shares) == 1:
        return None
    bars = [Bar(f"layer {index}", share, f"{share:.1%}", "converted") for index, share in enumerate(shares)]
    return Bars("Active feed-forward units by layer", bars, "As counted on held-out text.", limit=1.0)


def _group(model: MeasuredModel) -> str:
    return "converted" if model.converted else "another program" if model.peer else "dense"
