"""SIGTERM and SIGINT end a conversion with one line; what it had finished stays."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sparsecli.console import Stopped


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn a signal that comes while open into `Stopped`, at once.

    On the way there it is a KeyboardInterrupt, which nothing that handles errors takes for one.
    """
    received = [signal.SIGINT]

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        code = 130 if received[-1] == signal.SIGINT else None
        raise Stopped("stopped; the same command goes on from what is finished", exit_code=code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
