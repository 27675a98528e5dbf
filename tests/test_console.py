"""Where text goes, what a failure carries, and that a log gets lines instead of a bar."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest

from sparsecli import console


@pytest.fixture(autouse=True)
def _fresh_consoles():
    console._stdout.cache_clear()
    console._stderr.cache_clear()
    yield
    console._stdout.cache_clear()
    console._stderr.cache_clear()


def test_data_goes_to_stdout_and_talk_to_stderr(capsys):
    console.out("data")
    console.say("talk")
    console.warn("careful")
    captured = capsys.readouterr()
    assert captured.out == "data\n"
    assert captured.err == "talk\nwarning: careful\n"


def test_text_is_never_markup(capsys):
    console.say("[red]kept[/red] :smile: [/]")
    assert capsys.readouterr().err == "[red]kept[/red] :smile: [/]\n"


def test_text_cannot_drive_the_terminal(capsys):
    console.say("a\x1b[2Jb\rc")
    assert capsys.readouterr().err == "a\\x1b[2Jb\\x0dc\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


HOSTILE = "a\x1b[2Jb\x07\x9b31mc\td"


def test_data_cannot_drive_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console.out(HOSTILE)
    console.json_out([HOSTILE])
    console.print_table([HOSTILE, "n"], [[HOSTILE, 1]], title=HOSTILE)
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())  # styles of rich
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert shown.startswith("a\\x1b[2Jb\\x07\\x9b31mc\td\n")
    assert shown.count("a\\x1b[2Jb") == 4  # JSON has escapes of its own


def test_a_pipe_gets_data_as_it_is(capsys):
    console.out(HOSTILE)
    assert capsys.readouterr().out == HOSTILE + "\n"
    console.print_table(["text"], [["a\x1b[2Jb"]])
    assert "a\x1b[2Jb" in capsys.readouterr().out


def test_long_talk_is_not_folded(capsys):
    console.say("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_of_many_processes_the_first_talks_and_each_has_its_errors(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.say("talk")
    console.warn("careful")
    console.fail(console.Stopped("stopped at step 3"))
    with console.progress("training", 1) as bar:
        bar.advance()
    console.fail(console.Failure("what"))
    assert capsys.readouterr().err == "error: what\n"
    monkeypatch.setenv("RANK", "0")
    console.fail(console.Stopped("stopped at step 3"))
    assert capsys.readouterr().err == "stopped at step 3\n"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (console.Failure, 1),
        (console.RecipeError, 2),
        (console.Regression, 3),
        (console.Mismatch, 4),
        (console.Stopped, 75),
    ],
)
def test_exit_codes(kind, code):
    failure = kind("what")
    assert (failure.message, failure.exit_code, str(failure)) == ("what", code, "what")
    assert kind("what", exit_code=130).exit_code == 130
    assert kind.exit_code == code


def test_every_line_of_a_failure_is_marked(capsys):
    console.fail(console.RecipeError("a.yaml:1:1: one\na.yaml:2:1: two"))
    assert capsys.readouterr().err == "error: a.yaml:1:1: one\nerror: a.yaml:2:1: two\n"


def test_stopping_is_not_an_error(capsys):
    console.fail(console.Stopped("stopped at step 3"))
    assert capsys.readouterr().err == "stopped at step 3\n"


def test_table_aligns_numbers_and_keeps_rows_whole(capsys):
    console.print_table(["name", "n"], [["x" * 150, 5], ["[b]", "12,345"], ["y", None]], title="T")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "T"
    row = {line.split()[0]: line for line in lines if line.strip()}
    assert row["[b]"].rstrip().endswith("  12,345")
    assert row["x" * 150].rstrip().endswith("       5")
    assert row["y"].rstrip().endswith("       —")


def test_json_is_strict(capsys):
    console.json_out({"a": [1, None, "é"]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None, "é"]}
    with pytest.raises(ValueError, match="JSON"):
        console.json_out(float("nan"))


def test_progress_in_a_log_is_plain_lines(capsys, monkeypatch):
    clock = iter([0.0, 3.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("train", total=4) as bar:
        for loss in (4.0, 3.0, 2.0, 1.0):
            bar.advance(loss=loss)
    assert capsys.readouterr().err.splitlines() == [
        "train: 2/4, loss 3, 11 s, 16 s left",  # the first step does not count
        "train: 4/4, loss 1, 13 s",
    ]


def test_the_time_left_is_that_of_recent_steps(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 50.0, 100.0, 150.0, 160.0, 170.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("train", total=200) as bar:
        bar.advance(100)  # a resumed run
        for _ in range(4):
            bar.advance()
        bar.advance(seconds_left=7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 101/200, 50 s, 4851 s left"
    assert lines[-2] == "train: 104/200, 160 s, 2880 s left"  # 60 s for two steps
    assert lines[-1] == "train: 105/200, 170 s, 7 s left"


def test_progress_without_a_total(capsys, monkeypatch):
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("read", total=None) as bar:
        bar.advance(7)
    assert capsys.readouterr().err == "read: 7, 20 s\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress("[train]", total=2) as bar:
        bar.advance(2, loss=1.5)
        console.say("beside the bar")
    shown = terminal.getvalue()
    assert "[train]" in shown
    assert "2/2" in shown
    assert "loss 1.5" in shown
    assert "beside the bar" in shown


def test_no_color_is_honoured():
    show = "from sparsecli import console; console.warn('x')"
    environment = {"TERM": "xterm", "FORCE_COLOR": "1", "PATH": "/usr/bin"}
    coloured, plain = (
        subprocess.run(
            [sys.executable, "-c", show], env=environment | extra, capture_output=True, check=True
        ).stderr
        for extra in ({}, {"NO_COLOR": "1"})
    )
    assert b"\x1b[33m" in coloured
    assert b"\x1b[33m" not in plain


def test_importing_is_light():
    check = "import sys, sparsecli.console; print(sorted({'rich', 'typer', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, check=True).stdout == b"[]\n"
