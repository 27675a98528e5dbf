"""Counters of a server in Prometheus' format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """One server's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        given: dict[str, Any] = {"registry": self.registry, "namespace": "sparsecli"}
        self.requests = Counter("requests", "Requests by path and status.", ["path", "status"], **given)
        self.finished = Counter("texts", "Texts by how they ended.", ["finish"], **given)
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
