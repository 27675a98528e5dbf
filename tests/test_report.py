"""Pages and figures of results: what they show, that they need no network, and what cannot be written."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from small_benches import made_up, noisy
from test_convert_report import report
from typer.testing import CliRunner

from sparsecli import cli
from sparsecli.bench import command as bench
from sparsecli.bench import page as bench_page
from sparsecli.bench import render
from sparsecli.bench.result import BenchResult
from sparsecli.console import Failure
from sparsecli.convert import page as convert_page
from sparsecli.convert.report import Report
from sparsecli.report import figure, files, page


class Reader(HTMLParser):
    """Texts, tags that are not closed, and addresses of a document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def with_losses(result: BenchResult) -> BenchResult:
    rows = [
        row.model_copy(
            update={"held_out_loss": 3.5 + index / 10, "parts": {"head": 1.0, "rest": 0.5, "conv": 0.1}}
        )
        for index, row in enumerate(result.rows)
    ]
    return result.model_copy(update={"rows": rows})


def test_a_page_of_a_benchmark_has_every_row_and_needs_no_network(result: BenchResult) -> None:
    text = page.render(bench_page.page_of(with_losses(result)))
    found = Reader(text)
    assert found.open == []
    assert found.addresses == []
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert "url(" not in text
    titles = ["Milliseconds per token", "Loss against time", "Share of the memory bandwidth"]
    titles += ["Where a token's time goes", "All figures"]
    assert [text for text in found.texts if text in titles] == titles
    for row in result.rows:
        assert f"{render.milliseconds(row.ms_per_token.p50)} ms, loss" in text
    for fact in (result.machine.cpu, result.machine.isa, result.command):
        assert any(fact in text for text in found.texts)
    plain = page.render(bench_page.page_of(result))
    assert "Loss against time" not in plain
    assert "Where a token" not in plain


def test_texts_of_a_result_are_no_markup() -> None:
    name = "<script>alert(1)</script>"
    text = page.render(bench_page.page_of(made_up({name: noisy(10, 1)})))
    assert name not in text
    assert "&lt;script&gt;alert(1)" in text


def test_bars_are_as_long_as_their_values(result: BenchResult) -> None:
    chart = bench_page.time_bars(result)
    text = page.render(bench_page.page_of(result))
    widths = [float(each) for each in re.findall(r'<b class="c\d" style="width:([\d.]+)%"></b>', text)]
    expected = [100 * row.ms_per_token.p50 / chart.scale for row in result.rows]
    np.testing.assert_allclose(widths[: len(expected)], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(1, 5), (2, 4), (3, 4.5), (4, 1)], [0, 1, 3]),
        ([(2, 2), (1, 1)], [1]),
        ([(1, 2), (1, 1), (1, 3)], [1]),
        ([(1, 1), (1, 1)], [0]),
    ],
)
def test_the_frontier_has_what_no_other_beats(points: list[tuple[float, float]], best: list[int]) -> None:
    assert page.frontier(points) == best


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 143.2), (3.857, 4.01), (-0.2, 8.7), (5, 5), (0, 0), (1e-4, 2e-4), (-9, -3)]
)
def test_ticks_are_few_and_round_and_enclose_the_values(low: float, high: float) -> None:
    found = page.ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 2 <= len(found) <= page.MOST_TICKS + 1
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 10, [1, 2, 5, 10]),
        (2.2, 158, [2, 5, 10, 20, 50, 100, 200]),
        (0.03, 0.4, [0.02, 0.05, 0.1, 0.2, 0.5]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, expected: list[float]) -> None:
    assert page.log_ticks(low, high) == expected


@pytest.mark.parametrize(("times", "places"), [((1, 3), (0.25, 0.75)), ((1, 100), (1 / 8, 7 / 8))])
def test_points_that_lie_far_apart_have_a_logarithmic_axis(
    times: tuple[float, float], places: tuple[float, float]
) -> None:
    points = [page.Point(str(time), time, 1.0, "") for time in times]
    plot = page.Plot("", points, "", "")
    assert plot.logarithmic == (times[1] == 100)
    assert [plot.x_share(time) for time in times] == pytest.approx(places, abs=0.03)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("~1.72x", 1.72),
        ("819M", 819e6),
        ("16.9B", 16.9e9),
        ("0.118..0.322", 0.118),
        ("+1.80%", 1.8),
        ("-14 %", -14),
        ("32,704", 32704),
        ("int8", None),
        ("-", None),
    ],
)
def test_cells_are_sorted_by_their_number(text: str, value: float | None) -> None:
    assert page.leading_number(text) == pytest.approx(value)


def test_a_page_of_a_conversion(tmp_path: Path) -> None:
    converted = report(budget="loss +1 %")
    text = page.render(convert_page.page_of(converted))
    found = Reader(text)
    assert found.open == []
    assert found.addresses == []
    assert converted.verdict in found.texts
    for model in converted.models:
        assert model.name in found.texts
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps(converted.as_json()), encoding="utf-8")
    assert Report.read(saved) == converted


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": 3, "verdict": ""}', '{"schema": 2}', "[" * 9999]
)
def test_what_is_no_report_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(
        Failure, match=r"not a report of sparsify-convert with schema 3; name the report.json"
    ):
        Report.read(path)


def test_figures_are_the_same_bytes_every_time(result: BenchResult, tmp_path: Path) -> None:
    first, second = tmp_path / "one.svg", tmp_path / "two.svg"
    for path in (first, second):
        bench_page.write_figure(with_losses(result), path)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_figure_has_the_width_of_a_page(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    convert_page.write_figure(report(), path)
    pixels = imread(path)
    assert pixels.shape[1] == pytest.approx(300 * figure.WIDTH, abs=2)
    assert pixels.std() > 0.05


def test_a_saved_result_gives_every_form_without_a_measurement(
    result: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("result.json").write_text(render.as_json(result), encoding="utf-8")
    words = ["bench", "--from", "result.json", "--html", "page.html", "--plot", "figure.svg"]
    ended = CliRunner().invoke(cli.app, [*words, "--output", "table.md", "--format", "csv"])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.startswith(render.as_csv(result))
    assert Path("page.html").read_text(encoding="utf-8") == page.render(bench_page.page_of(result))
    assert Path("figure.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert Path("table.md").read_text(encoding="utf-8") == render.as_markdown(result) + "\n"


@pytest.mark.parametrize(
    ("factor", "share", "code"), [(1.0, "10%", 0), (2.0, "10%", 3), (2.0, "150%", 0), (0.5, "0", 0)]
)
def test_two_saved_results_are_compared(
    factor: float, share: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, milliseconds in (("before", 10.0), ("now", 10.0 * factor)):
        saved = made_up({"dense": noisy(milliseconds, 1)})
        Path(f"{name}.json").write_text(render.as_json(saved), encoding="utf-8")
    words = ["bench", "--from", "now.json", "--against", "before.json", "--fail-above", share]
    ended = CliRunner().invoke(cli.app, [*words, "--json"])
    assert getattr(ended.exception, "exit_code", ended.exit_code) == code
    (change,) = json.loads(ended.stdout)["comparison"]
    assert change["ratio"] == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "bench-17b", "--from", "x.json"], "leave out RECIPE"),
        (["bench", "--from", "x.json", "--dtype", "int8"], "leave out --dtype"),
        (["sparsify-convert", "--from", "x.json", "--model", "y"], "leave out --model"),
        (["sparsify-convert"], "RECIPE: missing; see sparsecli sparsify-convert --help"),
    ],
)
def test_what_a_saved_result_does_not_need_is_refused(words: list[str], message: str) -> None:
    error = CliRunner().invoke(cli.app, words).exception
    assert isinstance(error, Failure)
    assert message in error.message
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("html", "plot", "message", "code"),
    [
        ("nowhere/page.html", None, "the folder nowhere does not exist", 1),
        (".", None, "is a directory; name a file for --html", 1),
        (
            None,
            "figure.gif",
            "--plot: expected a file that ends with one of .png, .svg, .pdf, got figure.gif",
            2,
        ),
        (None, "nowhere/figure.png", "the folder nowhere does not exist", 1),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    html: str | None,
    plot: str | None,
    message: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "_measure", None)
    given = {"--html": html, "--plot": plot}
    words = [word for option, path in given.items() if path for word in (option, path)]
    error = CliRunner().invoke(cli.app, ["bench", *words]).exception
    assert isinstance(error, Failure)
    assert message in error.message
    assert error.exit_code == code


def test_a_file_system_that_takes_no_files_is_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(Failure, match=r"Read-only file system; choose another --html"):
        files.check_writable(tmp_path / "page.html", "--html")


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("earlier")

    def save(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(Failure, match=r"page\.html: cannot be written: No space left on device"):
        files.write(path, save)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]
