"""uvicorn, which stops cleanly: no new texts, running ones end, then the process ends with exit code 0."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sparsecli.generate.batcher import Batcher


class StoppingServer(uvicorn.Server):
    """Tells the batcher of the signal at once: what arrives from then on is refused."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self.batcher = batcher

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.batcher.stopping = True
        super().handle_exit(sig, frame)


def serve_until_signal(app: FastAPI, batcher: Batcher, door: socket.socket, grace: float) -> None:
    """Answer at the socket until SIGTERM or SIGINT, then for `grace` seconds at most what is under way."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=max(1, round(grace)))
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        StoppingServer(config, batcher).run(sockets=[door])  # at its end it raises the signal again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    """The signal has done its work."""
