"""Loads a server of `sparsecli serve` on this machine: speed by clients, waiting times, and more clients than it takes.

    sparsecli serve --model runs/quickstart --slots 16
    python -m sparsecli.bench.studies.serving --url http://127.0.0.1:8080

Every client sends a prompt of its own (random token ids, the same in each run) and reads the answer as it streams. The
clients share the processors with the server. Times are those that the clients see.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

from sparsecli import console
from sparsecli.console import Failure

CLIENTS = (1, 4, 8, 16)
OTHERS = 8
"""Texts that are decoded while another one's first token is measured."""


@dataclass
class Answer:
    """One request as its client saw it.

    Attributes:
        status: of HTTP; 0: the connection broke.
        first: seconds until the first token.
        gaps: seconds between tokens.
        complete: whether the stream came to its end.
    """

    status: int = 0
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    complete: bool = False


class Load:
    """Clients of one server.

    Args:
        vocabulary: prompts have token ids below it.
        prompt, tokens: tokens of a prompt and of its answer.
    """

    def __init__(self, url: str, vocabulary: int, prompt: int, tokens: int) -> None:
        import httpx

        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=url, timeout=600, limits=limits)
        self.vocabulary, self.prompt, self.tokens = vocabulary, prompt, tokens
        self.random = random.Random(0)

    async def ask(
        self,
        prompt: int | None = None,
        tokens: int | None = None,
        begun_to_answer: asyncio.Event | None = None,
    ) -> Answer:
        """One request and its answer; `begun_to_answer` is set with the first token."""
        import httpx

        ids = [self.random.randrange(self.vocabulary) for _ in range(prompt or self.prompt)]
        body = {
            "prompt": ids,
            "max_tokens": tokens or self.tokens,
            "temperature": 0,
            "stream": True,
            "logprobs": 0,
        }
        answer, begun = Answer(), time.perf_counter()
        last = begun
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as response:
                answer.status = response.status_code
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        answer.complete = True
                    elif (
                        line.startswith("data: ") and json.loads(line[6:])["choices"][0]["logprobs"]["tokens"]
                    ):
                        now = time.perf_counter()
                        if answer.first:
                            answer.gaps.append(now - last)
                        else:
                            answer.first = now - begun
                            if begun_to_answer:
                                begun_to_answer.set()
                        last = now
        except httpx.HTTPError:
            answer.status = 0
        return answer

    async def together(self, clients: int) -> tuple[float, list[Answer]]:
        """So many clients at once: seconds until the last has its answer, and the answers."""
        begun = time.perf_counter()
        answers = await asyncio.gather(*(self.ask() for _ in range(clients)))
        return time.perf_counter() - begun, answers

    async def first_token(self, prompt: int, others: int) -> float:
        """Seconds until the first token of a long prompt while others are decoded, which begin before."""
        begun = [asyncio.Event() for _ in range(others)]
        busy = [asyncio.create_task(self.ask(tokens=8 * self.tokens, begun_to_answer=each)) for each in begun]
        for each, task in zip(begun, busy, strict=True):
            waiting = asyncio.create_task(each.wait())
            await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
            if not each.is_set():
                raise Failure(
                    f"a request for {8 * self.tokens} tokens has no first token (status {task.result().status}); the "
                    f"server needs --context {self.prompt + 8 * self.tokens} or more"
                )
        answer = await self.ask(prompt, 2)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        await asyncio.sleep(0.5)  # the server sees that they are gone
        return answer.first

    async def stored(self, name: str) -> float:
        """A number of the server's metrics."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


async def measure(load: Load, rounds: int, long_prompt: int, overload: int) -> None:
    """Run everything and print the tables."""
    await load.ask()
    speeds: dict[int, list[float]] = {count: [] for count in CLIENTS}
    seen: dict[int, list[Answer]] = {count: [] for count in CLIENTS}
    for _ in range(rounds):
        for count in CLIENTS:
            seconds, answers = await load.together(count)
            if not all(answer.complete for answer in answers):
                raise Failure(f"{count} clients: not every answer came to its end")
            speeds[count].append(sum(1 + len(answer.gaps) for answer in answers) / seconds)
            seen[count] += answers
    single = statistics.median(speeds[CLIENTS[0]])
    rows = []
    for count in CLIENTS:
        speed = statistics.median(speeds[count])
        gaps = sorted(gap for answer in seen[count] for gap in answer.gaps)
        middle, late = (1e3 * gaps[int(share * (len(gaps) - 1))] for share in (0.5, 0.99))
        first = 1e3 * statistics.median(answer.first for answer in seen[count])
        rows.append(
            [count, f"{speed:.1f}", f"{speed / single:.2f}x", f"{first:.0f}", f"{middle:.1f}", f"{late:.1f}",
             f"{late / middle:.2f}x"]
        )  # fmt: skip
    columns = [
        "clients",
        "tokens/s",
        "over one",
        "first token ms",
        "between tokens ms",
        "99 %",
        "99 % / median",
    ]
    console.print_table(columns, rows, f"{load.prompt} tokens in, {load.tokens} out, {rounds} rounds")

    waits: dict[int, list[float]] = {0: [], OTHERS: []}
    for _ in range(rounds):
        for others in waits:
            waits[others].append(await load.first_token(long_prompt, others))
    alone, beside = (statistics.median(each) for each in waits.values())
    times = [
        ["alone", f"{1e3 * alone:.0f}", "1x"],
        [f"{OTHERS} others decode", f"{1e3 * beside:.0f}", f"{beside / alone:.2f}x"],
    ]
    console.print_table(["first token", "ms", "over alone"], times, f"a prompt of {long_prompt} tokens")

    if overload:
        before = await load.stored("process_resident_memory_bytes")
        seconds, answers = await load.together(overload)
        after = await load.stored("process_resident_memory_bytes")
        counts = Counter(
            "answered" if each.complete else f"refused ({each.status})" if each.status else "lost"
            for each in answers
        )
        lost = sum(not each.complete and each.status == 200 for each in answers)
        table: list[list[object]] = [[kind, count] for kind, count in sorted(counts.items())]
        table += [["broken off", lost], ["memory", f"{before / 1e6:.0f} -> {after / 1e6:.0f} MB"]]
        console.print_table(["answers", "count"], table, f"{overload} clients, {seconds:.0f} s")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--vocabulary", type=int, default=1000, help="token ids of prompts are below it")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--long-prompt", type=int, default=256, help="tokens of a long prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overload", type=int, default=0, help="clients at once at the end; 0: none")
    given = parser.parse_args(arguments)
    load = Load(given.url, given.vocabulary, given.prompt, given.tokens)
    asyncio.run(measure(load, given.rounds, given.long_prompt, given.overload))


if __name__ == "__main__":
    with console.failing():
        main()
