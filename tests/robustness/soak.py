"""Loads one server for long: every answer arrives, none hangs, and its memory stays flat.

    make soak                             # or: PYTHONPATH=tests python -m robustness.soak --tokens 200000 --clients 16

The server is `sparsecli serve` in a process of its own, with a small random model. Clients send prompts of all lengths,
streamed and whole, some with shared beginnings; some hang up in the middle, and some send what is no request. Exit code
1: a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from robustness.processes import call, workplace

from sparsecli import console

WARM_UP = 0.3
"""Share of the tokens after which memory is expected to be flat: buffers and arenas have their size."""
GROWTH_MB = 8.0
"""The most that memory may grow over the rest, along the line that fits it best."""
PATIENCE = 10
CONTEXT = 160
GARBAGE: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/completions", b"", 400),
    ("/v1/completions", b"\xff\xfe{", 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}', 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    ("/v1/completions", b'{"prompt": "a", "n": 100000}', 400),
    ("/v1/completions", b'{"prompt": [1, 2, 99999999]}', 400),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"x": 1}}', 400),
    ("/v1/completions", b"[" * 100_000, 400),
    ("/v1/completions", b'{"prompt": "' + b"a" * (9 << 20) + b'"}', 413),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hi"}]}', 400),
    ("/v1/nothing", b"{}", 404),
)
"""Paths, bodies, and the status that the answer has."""


def make_model(folder: Path) -> None:
    """A small random sparse model with a tokenizer. It never ends a text by itself."""
    import torch

    from sparsecli.data.tokenization import train_byte_pairs
    from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM

    torch.manual_seed(0)
    config = ScalingTransformerConfig(
        d_model=32,
        layers=2,
        heads=4,
        max_positions=CONTEXT,
        feed_forward={"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4},
        vocabulary={"kind": "dense", "size": 300, "tied": True},
        eos_token_id=None,
    )
    ScalingTransformerForCausalLM(config).save_pretrained(folder)
    train_byte_pairs(300, ["def read_file(path):\n    return open(path).read()\n"] * 3).save_pretrained(
        folder
    )


@dataclass
class Seen:
    """What clients have seen, and the server's memory on the way."""

    tokens: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[int, float]] = field(default_factory=list)
    """Tokens and MB."""
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)


class Clients:
    """Clients of one server, which ask until together they have so many tokens."""

    def __init__(self, url: str, tokens: int, seed: int, hung: float, process: psutil.Process) -> None:
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=hung, limits=limits)
        self.hung = hung
        self.wanted, self.seen, self.process, self.seed = tokens, Seen(), process, seed

    async def run(self, clients: int) -> Seen:
        """Ask, and watch the server's memory meanwhile."""
        watching = asyncio.create_task(self.watch())
        await asyncio.gather(*(self.client(number) for number in range(clients)))
        await watching
        await self.http.aclose()
        return self.seen

    async def watch(self) -> None:
        """Note the server's memory about 200 times."""
        step, following = max(1, self.wanted // 200), 0
        with console.progress("tokens", self.wanted) as bar:
            while self.seen.tokens < self.wanted and not self.seen.faults:
                if self.seen.tokens >= following:
                    megabytes = self.process.memory_info().rss / 1e6
                    self.seen.memory.append((self.seen.tokens, megabytes))
                    bar.advance(
                        self.seen.tokens - following + step if following else 0, memory=f"{megabytes:.0f} MB"
                    )
                    following = self.seen.tokens + step
                await asyncio.sleep(0.05)

    async def client(self, number: int) -> None:
        """One client: asks again and again."""
        draw = random.Random(f"{self.seed} {number}")
        while self.seen.tokens < self.wanted and not self.seen.faults:
            begun = time.monotonic()
            try:
                how = draw.choices(["streamed", "whole", "hung up", "garbage"], [8, 8, 2, 1])[0]
                self.seen.ends[how] += 1
                await getattr(self, how.replace(" ", "_"))(draw)
            except httpx.TimeoutException:
                self.seen.faults.append(f"a request hung: no answer in {self.hung:.0f} s")
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.seen.faults.append(f"an answer was lost: {type(error).__name__}: {error}")
            self.seen.slowest = max(self.seen.slowest, time.monotonic() - begun)

    def body(self, draw: random.Random) -> dict[str, object]:
        """A request: a prompt of any length, often with a beginning that others have too."""
        shared = [7 * index % 250 + 3 for index in range(draw.choice([0, 0, 32, 64]))]
        own = [draw.randrange(3, 300) for _ in range(draw.randrange(1, 60))]
        room = CONTEXT - len(shared) - len(own)
        return {"prompt": shared + own, "max_tokens": draw.randrange(1, room + 1),
                "temperature": draw.choice([0, 1]), "seed": draw.randrange(1000)}  # fmt: skip

    async def whole(self, draw: random.Random) -> None:
        """An answer in one piece has all tokens."""
        body = self.body(draw)
        answer = await self.http.post("/v1/completions", json=body)
        found = (
            answer.json()["usage"]["completion_tokens"] if answer.status_code == 200 else answer.text[:200]
        )
        if found != body["max_tokens"]:
            self.seen.faults.append(f"{body['max_tokens']} tokens were asked for, and the answer has {found}")
            return
        self.seen.tokens += int(found)

    async def streamed(self, draw: random.Random, most: int | None = None) -> None:
        """A stream has all tokens, and comes to its end."""
        body = {**self.body(draw), "stream": True, "logprobs": 0}
        count, complete = 0, False
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    complete = True
                elif line.startswith("data: "):
                    logprobs = json.loads(line[6:])["choices"][0]["logprobs"]
                    count += len(logprobs["tokens"]) if logprobs else 0
                if most is not None and count >= most:
                    self.seen.tokens += count
                    return  # which closes the connection
        if not complete or count != body["max_tokens"]:
            self.seen.faults.append(f"a stream of {body['max_tokens']} tokens ended after {count}")
        self.seen.tokens += count

    async def hung_up(self, draw: random.Random) -> None:
        """A client that goes away."""
        await self.streamed(draw, most=draw.randrange(1, 8))

    async def garbage(self, draw: random.Random) -> None:
        """What is no request gets an error in JSON."""
        path, content, status = draw.choice(GARBAGE)
        answer = await self.http.post(path, content=content, headers={"Content-Type": "application/json"})
        if answer.status_code != status or "message" not in answer.json()["error"]:
            self.seen.faults.append(f"{path} {content[:60]!r}: {answer.status_code} {answer.text[:100]}")


def texts_left(url: str) -> float:
    """Texts that the server still holds; clients that have hung up are noticed soon."""
    for _ in range(10 * PATIENCE):
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
        left = sum(map(float, re.findall(r"^sparsecli_(?:active|waiting)_texts (\S+)$", metrics, re.M)))
        if not left:
            break
        time.sleep(0.1)
    return left


def growth(memory: list[tuple[int, float]], tokens: int) -> float:
    """MB by which memory grows after the warm-up, along the line that fits it best."""
    rest = np.array([pair for pair in memory if pair[0] >= WARM_UP * tokens])
    if len(rest) < 3:
        return 0.0
    slope = np.polyfit(rest[:, 0], rest[:, 1], 1)[0]
    return float(slope * (1 - WARM_UP) * tokens)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hung", type=float, default=120, help="seconds after which a request counts as hung"
    )
    given = parser.parse_args(arguments)
    with workplace() as folder:
        call(lambda: make_model(folder / "model"), folder / "log")
        words = [
            "serve",
            "--model",
            "model",
            "--port",
            "0",
            "--threads",
            "1",
            "--slots",
            "8",
            "--queue",
            "64",
        ]
        server = subprocess.Popen(
            [sys.executable, "-m", "sparsecli", *words], stderr=subprocess.PIPE, text=True
        )
        assert server.stderr
        line = server.stderr.readline()
        found = re.search(r" at (http://\S+) ", line)
        if not found:
            raise RuntimeError(line + server.stderr.read())
        begun = time.monotonic()
        try:
            clients = Clients(found[1], given.tokens, given.seed, given.hung, psutil.Process(server.pid))
            seen = asyncio.run(clients.run(given.clients))
            seconds = time.monotonic() - begun
            left = texts_left(found[1])
        finally:
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=given.hung)
    grown = growth(seen.memory, given.tokens)
    if grown > GROWTH_MB:
        seen.faults.append(f"memory grew by {grown:.1f} MB after the warm-up")
    if server.returncode or said != "stopped\n":
        seen.faults.append(f"the server ended with {server.returncode}: {said[-300:]}")
    if left:
        seen.faults.append(f"{left:.0f} texts run or wait {PATIENCE} s after the last client has gone")
    memory = [megabytes for _, megabytes in seen.memory]
    ends = ", ".join(f"{count} {how}" for how, count in sorted(seen.ends.items()))
    rows = [
        ("tokens", f"{seen.tokens:,} in {seconds:.0f} s"),
        ("clients", f"{given.clients}, {ends}"),
        ("slowest request", f"{seen.slowest:.1f} s"),
        ("memory", f"{memory[0]:.0f} -> {memory[-1]:.0f} MB, at most {max(memory):.0f}"),
        ("growth after the warm-up", f"{grown:+.2f} MB"),
        ("lost or hung", len(seen.faults)),
    ]
    console.print_table(["soak", ""], rows)
    for fault in seen.faults[:20]:
        console.say(fault)
    return 1 if seen.faults else 0


if __name__ == "__main__":
    sys.exit(main())
