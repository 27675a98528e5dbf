"""Gives commands damaged and forged files: each is read, or refused in one line with the documented exit code.

    make fuzz                               # or: PYTHONPATH=tests python -m robustness.fuzz --inputs 10000 --seed 0

Each input may take a second of processor time and 300 MB more than the command before it. The commands run in worker
processes, so that a crash of native code, or a hang, ends a worker and not the search. Then single bytes are flipped in
a packed file and in a checkpoint, all of which must be found. Inputs that break a promise are kept under build/fuzz.
Exit code 1: a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import selectors
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustness import mutations
from robustness.processes import UNEXPECTED, Command, call, fork, run, warm, workplace
from typer.main import get_command

from sparsecli import cli, console

SECONDS, MEGABYTES = 1.0, 300
"""What one input may take: processor time, and memory beyond that of the worker."""
ADDRESS_SPACE = 2 << 30
"""Bytes that one input may ask for, whether it uses them or not."""
HUNG = 60.0
"""Seconds of a silent worker after which it is killed; others may use the processors."""
CODES = (0, 1, 2, 4)
KEPT = Path("build/fuzz")
Mutator = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Kind:
    """A file that is changed, and the commands that read it.

    Attributes:
        folder: a folder with the file, which is copied for every worker.
        file: its name in there.
        commands: arguments in the folder's copy; an input is given to one of them.
        weight: how often it is chosen.
    """

    name: str
    folder: Path
    file: str
    mutate: Mutator
    commands: tuple[tuple[str, ...], ...]
    weight: int = 1


# -- the files -----------------------------------------------------------------------------------------------


def make_files(folder: Path) -> None:
    """Write every kind of file that is changed, with our own commands. Run in a forked process."""
    import yaml
    from foreign_models import LLAMA, build, save
    from small_runs import write_recipe
    from test_damaged_files import MODEL
    from test_interchange import write_gguf, write_model

    from sparsecli.decode.packed.file import save as save_packed
    from sparsecli.decode.packed.folder import pack_folder
    from sparsecli.decode.packed.precision import Precision
    from sparsecli.model.auto import build_network
    from sparsecli.model.files import INDEX, PACKED, WEIGHTS
    from sparsecli.recipe import loader

    spec = loader.parse(yaml.dump({"model": MODEL}), "r.yaml").model
    assert spec
    save(build_network(spec), folder / "ours")
    shutil.copytree(folder / "ours", folder / "packed")
    (folder / "packed" / WEIGHTS).unlink()
    save_packed(pack_folder(folder / "ours", spec, Precision.of("int8")), folder / "packed" / PACKED)
    shutil.copytree(folder / "ours", folder / "sharded")
    (folder / "sharded" / WEIGHTS).rename(folder / "sharded" / "shard.safetensors")
    names = mutations.header_of((folder / "ours" / WEIGHTS).read_bytes()).keys() - {"__metadata__"}
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(sorted(names), "shard.safetensors")})
    (folder / "sharded" / INDEX).write_text(index)

    llama = build("llama", **LLAMA)
    save(llama, folder / "theirs")
    (folder / "gguf").mkdir()
    quantizable = build("llama", **LLAMA | {"intermediate_size": 64})
    save(quantizable, folder / "quantizable")
    write_gguf(
        quantizable, folder / "quantizable", folder / "gguf" / "model.gguf", quantized=["Q4_0", "Q8_0"]
    )
    shutil.copytree(folder / "theirs", folder / "pieces")
    for path in (folder / "pieces").glob("tokenizer*"):
        path.unlink()
    write_model(folder / "pieces" / "tokenizer.model")

    (folder / "recipe").mkdir()
    write_recipe(folder / "recipe")
    (folder / "prompts").mkdir()
    prompts = [{"prompt": "a", "max_new_tokens": 1}, {"prompt": "some text"}, "text"]
    (folder / "prompts" / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    shutil.copytree(folder / "ours", folder / "prompts" / "model")


def kinds(folder: Path) -> list[Kind]:
    """Every kind of file, written below `folder`."""
    call(lambda: make_files(folder), folder / "log")
    recipe = folder / "recipe" / "tiny.yaml"
    finished = folder / "run"
    changes = ["train.max_steps=2", "train.save_steps=2", "train.eval_steps=2"]
    run(["train", recipe, *changes, "--output", finished / "run"], folder / "log")
    shutil.copy(recipe, finished / "tiny.yaml")
    result = folder / "result" / "files"  # as the copies are called: their rows are compared by name
    result.mkdir(parents=True)
    shutil.copytree(finished / "run" / "model", result / "model")
    measure = ("bench", "quickstart", "--model", "model", "--threads", "1", "--context", "4", "--rounds", "1",
               "--tokens", "1")  # fmt: skip
    os.chdir(result)
    run([*measure, "--output", "old.json"], folder / "log")
    os.chdir(folder)

    def generate(model: str, *options: str) -> tuple[str, ...]:
        return ("generate", "--model", model, "--prompt", "text", "--max-new-tokens", "2", "--temperature", "0",
                "--threads", "1", "--no-keep", *options)  # fmt: skip

    native, torch = generate(".", "--backend", "native"), generate(".", "--backend", "torch")
    # Templates are rendered in a process of their own, whose start takes longer than the rest.
    plain_native, plain_torch = (*native, "--no-template"), (*torch, "--no-template")
    bring = ("import", ".", "--output", "../imported")
    resume = ("train", "tiny.yaml", *changes, "--output", "run", "--resume", "auto")
    compare = (*measure, "--against", "old.json", "--dry-run")
    of_json, of_bytes, of_yaml = either(mutations.changed_text), mutations.rewritten, changed_recipe
    header = either(mutations.changed_header)

    def gguf(content: bytes, draw: random.Random) -> bytes:
        within = content.index(b"output_norm.weight") + 400 if draw.random() < 0.8 else None
        return mutations.rewritten(content, draw, within)

    def packed(content: bytes, draw: random.Random) -> bytes:
        return (
            mutations.changed_header(content, draw, sealed=True)
            if draw.random() < 0.7
            else of_bytes(content, draw)
        )

    return [
        Kind("recipe", folder / "recipe", "tiny.yaml", of_yaml, (
            ("recipes", "check", "tiny.yaml"), ("train", "tiny.yaml", "--dry-run", "--output", "new")), 3),
        Kind("config.json", folder / "ours", "config.json", of_json, (plain_native, plain_torch), 2),
        Kind("safetensors", folder / "ours", "model.safetensors", header, (plain_native, plain_torch), 2),
        Kind("spk", folder / "packed", "model.spk", packed, (plain_native,), 4),
        Kind("index of shards", folder / "sharded", "model.safetensors.index.json", of_json, (plain_native,)),
        Kind("tokenizer.json", folder / "ours", "tokenizer.json", of_json, (native, torch), 2),
        Kind("tokenizer_config.json", folder / "ours", "tokenizer_config.json", of_json, (native, torch)),
        Kind("gguf", folder / "gguf", "model.gguf", gguf, (
            ("import", "model.gguf", "--output", "../imported"), generate("model.gguf")), 4),
        Kind("config.json to import", folder / "theirs", "config.json", of_json, (bring,), 2),
        Kind("safetensors to import", folder / "theirs", "model.safetensors", header, (bring,)),
        Kind("tokenizer.model", folder / "pieces", "tokenizer.model", of_bytes, (bring,)),
        Kind("run.json", finished, "run/run.json", of_json, (resume,)),
        Kind("metrics.jsonl", finished, "run/metrics.jsonl", of_bytes, (resume,)),
        Kind("result of bench", result, "old.json", of_json, (compare,)),
        Kind("prompts", folder / "prompts", "prompts.jsonl", lines_of_json, (
            ("generate", "--model", "model", "--prompts", "prompts.jsonl", "--threads", "1"),)),
    ]  # fmt: skip


def either(mutate: Mutator) -> Mutator:
    """Mostly `mutate`; else changed bytes."""
    return lambda content, draw: (mutate if draw.random() < 0.7 else mutations.rewritten)(content, draw)


def changed_recipe(content: bytes, draw: random.Random) -> bytes:
    """A recipe with changed values, changed text, or with what only YAML has."""
    import yaml

    tricks = (
        b"a: &a [x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\ne: &e [*d, *d, *d, *d]\n"
        b"f: &f [*e, *e, *e, *e]\ng: &g [*f, *f, *f, *f]\nh: &h [*g, *g, *g, *g]\ni: [*h, *h, *h, *h]\n",
        b"seed: !!python/object/apply:os.system [id]\n", b"<<: *missing\n", b"a: &a [*a]\n", b"\tseed: 1\n",
        b"seed: 0x7fffffffffffffffffff\n", b"seed: .nan\n", b"? [a, b]\n: 1\n", b"--- 1\n--- 2\n", b"seed: 1:20:30\n",
        b"output: ../../../\x07\n", b"seed: 2026-01-01\n", b"seed: " + b"9" * 5000 + b"\n", b"{" * 2000,
    )  # fmt: skip
    chance = draw.random()
    if chance < 0.15:
        return draw.choice(tricks) + (content if draw.random() < 0.5 else b"")
    if chance < 0.4:
        return mutations.rewritten(content, draw)
    value = mutations.changed(yaml.safe_load(content), draw, mutations.STRANGER)
    return yaml.dump(value, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")


def lines_of_json(content: bytes, draw: random.Random) -> bytes:
    """Prompts of which one is changed."""
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = either(mutations.changed_text)(lines[at], draw) if lines[at][:1] == b"{" else draw.choice(
        [b"\xff", b"[]", b"1", b"null", b'"\\ud800"', b"[" * 5000, b"", b'"' + b"a" * 10000 + b'"'])  # fmt: skip
    return b"\n".join(lines)


# -- one input -----------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of one input."""

    index: int
    kind: str
    ended: str
    """read, refused, or what promise it broke"""
    seconds: float = 0.0
    megabytes: float = 0.0


def input_of(kind: Kind, seed: int, index: int) -> tuple[bytes, tuple[str, ...]]:
    """The changed file and the command of an input."""
    draw = random.Random(f"{seed} {index}")
    content = kind.mutate((kind.folder / kind.file).read_bytes(), draw)
    return content, draw.choice(kind.commands)


def try_input(
    kind: Kind, place: Path, content: bytes, arguments: Sequence[str], log: int
) -> tuple[str, float, float]:
    """Give a command an input, in this process: how it ended, processor seconds, and MB beyond those before."""
    target = place / kind.file
    whole = target.read_bytes()
    target.write_bytes(content)
    os.ftruncate(log, 0)
    os.chdir(place)
    sys.argv = ["sparsecli", *arguments]
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the most memory is counted from here
    size, before, _ = memory()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
    begun, code = time.process_time(), -1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seconds, megabytes = time.process_time() - begun, (memory()[2] - before) / 1e6
    target.write_bytes(whole)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    said = os.pread(log, 1 << 20, 0).decode(errors="replace")
    imported = place.parent / "imported"
    left = imported.exists() or any(place.parent.glob("imported.*"))
    if left:
        for path in (imported, *place.parent.glob("imported.*")):
            shutil.rmtree(path, ignore_errors=True)
    return ended(code, said, left), seconds, megabytes


def check_whole(chosen: Sequence[Kind], folder: Path) -> None:
    """Raise RuntimeError unless each command reads its file as it is: else it would refuse every input."""
    log = os.open(folder / "whole.said", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number, kind in enumerate(chosen):
        place = folder / "whole" / str(number) / "files"
        shutil.copytree(kind.folder, place)
        content = (place / kind.file).read_bytes()
        for arguments in kind.commands:
            how, *_ = try_input(kind, place, content, arguments, log)
            if how != "read":
                said = os.pread(log, 400, 0).decode(errors="replace")
                raise RuntimeError(f"{' '.join(arguments)}: {kind.file} as it is: {how}: {said}")


def ended(code: int, said: str, left: bool) -> str:
    """Read, refused, or the promise that was broken."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if found := next((word for word in UNEXPECTED if word in said), None):
        return f"{found.strip()}: {said[-400:]}"
    if code not in CODES:
        return f"exit code {code}: {said[-400:]}"
    if code and not errors:
        return f"exit code {code} without an error: {said[-400:]}"
    if "not enough memory" in said:
        return f"asked for more than {ADDRESS_SPACE >> 30} GB: {said[-200:]}"
    if code and left:
        return "refused, and left a part of its output"
    if any(len(line) > 2000 for line in errors):
        return f"an error of {max(map(len, errors))} characters: {max(errors, key=len)[:200]}"
    return "refused" if code else "read"


def memory() -> tuple[int, int, int]:
    """Bytes of this process: address space, resident, and the most that was resident."""
    found = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    size, resident, most = (int(found[name].split()[0]) << 10 for name in ("VmSize", "VmRSS", "VmHWM"))
    return size, resident, most


# -- workers -------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A process that tries inputs `first`, `first + step`, ... and writes a line before and after each."""

    command: Command
    pipe: int
    first: int
    now: int | None = None
    silent: float = 0.0
    rest: bytes = b""


def start_worker(
    chosen: Sequence[Kind], folder: Path, number: int, first: int, step: int, count: int, seed: int
) -> Worker:
    """Fork a worker."""
    reader, writer = os.pipe()
    place = folder / f"worker-{number}"

    def work() -> None:
        os.close(reader)
        cli.app = get_command(cli.app)  # once: Typer makes its commands anew in every call
        log = os.open(folder / f"worker-{number}.said", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        shutil.rmtree(place, ignore_errors=True)
        copies = {kind.folder: place / str(index) / "files" for index, kind in enumerate(chosen)}
        for original, copied in copies.items():
            shutil.copytree(original, copied)
        for index in range(first, count, step):
            kind = chosen[index % len(chosen)]
            os.write(writer, f"{index}\n".encode())
            content, arguments = input_of(kind, seed, index)
            how = try_input(kind, copies[kind.folder], content, arguments, log)
            os.write(writer, (json.dumps([index, *how]) + "\n").encode())

    worker = Worker(fork(work, folder / f"worker-{number}.log"), reader, first)
    os.close(writer)
    return worker


def search(chosen: Sequence[Kind], folder: Path, count: int, seed: int, workers: int) -> Iterator[Outcome]:
    """Try `count` inputs. A worker that dies or hangs is replaced, and goes on behind its last input."""
    watched = selectors.DefaultSelector()

    def begin(number: int, first: int) -> None:
        worker = start_worker(chosen, folder, number, first, workers, count, seed)
        watched.register(worker.pipe, selectors.EVENT_READ, (number, worker))

    for number in range(min(workers, count)):
        begin(number, number)
    while watched.get_map():
        before = time.monotonic()
        for key, _ in watched.select(1.0):
            number, worker = key.data
            piece = os.read(worker.pipe, 1 << 16)
            worker.silent = 0.0
            *lines, worker.rest = (worker.rest + piece).split(b"\n")
            for line in lines:
                found = json.loads(line)
                if isinstance(found, int):
                    worker.now = found
                    continue
                worker.now = None
                worker.first = found[0] + workers
                yield Outcome(found[0], chosen[found[0] % len(chosen)].name, *found[1:])
            if not piece:
                watched.unregister(worker.pipe)
                os.close(worker.pipe)
                code = worker.command.wait()
                if worker.now is None:
                    if code:
                        raise RuntimeError(f"a worker ended with {code}: {worker.command.text}")
                    continue
                said = (folder / f"worker-{number}.said").read_text(errors="replace")[-400:]
                yield Outcome(
                    worker.now, chosen[worker.now % len(chosen)].name, f"crash, exit code {code}: {said}"
                )
                if worker.now + workers < count:
                    begin(number, worker.now + workers)
        for key in list(watched.get_map().values()):
            number, worker = key.data
            # Seconds in which this process ran: with a suspended machine, both have slept.
            worker.silent += min(time.monotonic() - before, 2.0)
            if worker.silent > HUNG and worker.now is not None:
                worker.command.kill()  # which closes its pipe: the end is read above
                worker.silent = 0.0


# -- flipped bytes -------------------------------------------------------------------------------------------


def flip_bytes(folder: Path, count: int, seed: int) -> list[list[object]]:
    """Flip single bytes in a packed file and in a checkpoint, one at a time: how many were found."""
    from sparsecli.console import Failure
    from sparsecli.decode.packed.file import open_packed
    from sparsecli.train.checkpoint import newest_sound

    packed = folder / "packed" / "model.spk"
    checkpoints = folder / "run" / "run" / "checkpoints"
    (checkpoint,) = checkpoints.glob("checkpoint-*")

    def packed_is_refused() -> bool:
        try:
            open_packed(packed)
        except Failure:
            return True
        return False

    def checkpoint_is_skipped() -> bool:
        return newest_sound(checkpoints)[0] is None

    rows: list[list[object]] = []
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for name, paths, is_found in (
        ("packed file (.spk)", [packed], packed_is_refused),
        ("training checkpoint", files, checkpoint_is_skipped),
    ):
        assert not is_found()
        draw = random.Random(seed)
        sizes = [path.stat().st_size for path in paths]
        missed: list[str] = []
        for _ in range(count):
            # Half of the flips lie anywhere, half in a file of any size: manifests are small.
            path = draw.choices(paths, sizes)[0] if draw.random() < 0.5 else draw.choice(paths)
            content = path.read_bytes()
            at, bits = (
                draw.randrange(len(content)),
                draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)]),
            )
            path.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
            if not is_found():
                missed.append(f"{path.name}: byte {at} ^ {bits}")
            path.write_bytes(content)
        rows.append([name, sum(sizes), count, count - len(missed), missed[0] if missed else None])
    return rows


# -- the command ---------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="changed files")
    parser.add_argument("--flips", type=int, default=1000, help="flipped bytes in each of two kinds of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="*", help="kinds of files")
    given = parser.parse_args(arguments)
    kept = KEPT.absolute()
    warm()
    begun = time.monotonic()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    worst: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    faults: list[Outcome] = []
    with workplace() as folder:
        known = kinds(folder)
        if unknown := {*(given.only or ())} - {kind.name for kind in known}:
            parser.error(f"{min(unknown)}: not one of {', '.join(kind.name for kind in known)}")
        chosen = [
            kind for kind in known if not given.only or kind.name in given.only for _ in range(kind.weight)
        ]
        call(lambda: check_whole(known, folder), folder / "whole.log")
        with console.progress("inputs", given.inputs) as bar:
            for outcome in search(chosen, folder, given.inputs, given.seed, given.workers):
                bar.advance(1, faults=len(faults))
                ended = outcome.ended if outcome.ended in ("read", "refused") else "faults"
                if ended != "faults" and outcome.seconds > SECONDS:
                    ended, outcome.ended = "faults", f"took {outcome.seconds:.2f} s of processor time"
                if ended != "faults" and outcome.megabytes > MEGABYTES:
                    ended, outcome.ended = "faults", f"took {outcome.megabytes:.0f} MB more"
                counts[outcome.kind][ended] += 1
                worst[outcome.kind] = [max(*pair) for pair in zip(
                    worst[outcome.kind], (outcome.seconds, outcome.megabytes), strict=True)]  # fmt: skip
                if ended == "faults":
                    faults.append(outcome)
                    keep_input(chosen[outcome.index % len(chosen)], given.seed, outcome, kept)
        flips = flip_bytes(folder, given.flips, given.seed)
    rows: list[list[Any]] = [
        [name, found.total(), found["read"], found["refused"], found["faults"],
         f"{worst[name][0]:.2f}", f"{worst[name][1]:.0f}"]
        for name, found in counts.items()
    ]  # fmt: skip
    total = sum(counts.values(), Counter[str]())
    rows.append(["all", total.total(), total["read"], total["refused"], total["faults"],
                 f"{max((pair[0] for pair in worst.values()), default=0):.2f}",
                 f"{max((pair[1] for pair in worst.values()), default=0):.0f}"])  # fmt: skip
    columns = ["file", "inputs", "read", "refused", "faults", "most seconds", "most MB"]
    console.print_table(columns, rows, f"changed files, seed {given.seed}")
    console.print_table(
        ["file", "bytes", "flipped", "found", "the first that was missed"], flips, "flipped bytes"
    )
    for outcome in faults:
        console.say(f"{outcome.kind}, input {outcome.index}: {outcome.ended}")
    missed = sum(row[2] != row[3] for row in flips)
    console.say(f"{len(faults) + missed} faults, {time.monotonic() - begun:.0f} s")
    return 1 if faults or missed else 0


def keep_input(kind: Kind, seed: int, outcome: Outcome, kept: Path) -> None:
    """Keep the input of a fault with its command."""
    content, arguments = input_of(kind, seed, outcome.index)
    kept.mkdir(parents=True, exist_ok=True)
    name = f"{kind.name.replace(' ', '-')}-{seed}-{outcome.index}"
    (kept / name).write_bytes(content)
    (kept / f"{name}.txt").write_text(f"{kind.file}: sparsecli {' '.join(arguments)}\n{outcome.ended}\n")


if __name__ == "__main__":
    sys.exit(main())
