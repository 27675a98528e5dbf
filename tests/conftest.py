"""Small models run fastest on one thread, and the same on every machine; tests run beside one another."""

import os
from collections.abc import Iterator

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_processor() -> Iterator[None]:
    """Engines take one thread unless a test asks for more: those that share processors wait for one another's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
        yield
