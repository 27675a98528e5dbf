"""Counters of a server in Prometheus' format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from sparsecli.generate.batcher import Observer

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


ENDS = ("end", "length", "cancelled", "timeout", "stopping", "error")
"""How texts end: see `Event.finish`."""


class Metrics(Observer):
    """One server's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        given: dict[str, Any] = {"registry": self.registry, "namespace": "sparsecli"}
        self.requests = Counter("requests", "Requests by path and status.", ["path", "status"], **given)
        self.ended = Counter("texts", "Texts by how they ended.", ["finish"], **given)
        for how in ENDS:
            self.ended.labels(how)  # which begins at 0, so that the first text of its kind is an increase
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts that the engine has read.", **given)
        self.reused_tokens = Counter(
            "reused_tokens", "Tokens of prompts that were kept from other texts.", **given
        )
        self.new_tokens = Counter("new_tokens", "Tokens that were generated.", **given)
        self.waiting = Gauge("waiting_texts", "Texts that wait for a slot.", **given)
        self.active = Gauge("active_texts", "Texts that are read or decoded.", **given)
        self.first_token_seconds = Histogram(
            "first_token_seconds", "From the arrival to the first token.", buckets=SECONDS, **given
        )
        self.token_seconds = Histogram(
            "token_seconds", "Between two tokens of a text.", buckets=SECONDS, **given
        )
        self.pass_seconds = Histogram("pass_seconds", "Of a pass of the engine.", buckets=SECONDS, **given)

    def started(self, reused: int) -> None:
        self.reused_tokens.inc(reused)

    def passed(self, seconds: float, prompt_tokens: int, active: int, waiting: int) -> None:
        self.pass_seconds.observe(seconds)
        self.prompt_tokens.inc(prompt_tokens)
        self._count(active, waiting)

    def token(self, seconds: float, first: bool) -> None:
        self.new_tokens.inc()
        (self.first_token_seconds if first else self.token_seconds).observe(seconds)

    def finished(self, how: str, active: int, waiting: int) -> None:
        self.ended.labels(how).inc()
        self._count(active, waiting)

    def _count(self, active: int, waiting: int) -> None:
        self.active.set(active)
        self.waiting.set(waiting)
