"""Other programs beside a conversion's rows: which can be measured here."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecli import console
from sparsecli.bench.peers import PEERS
from sparsecli.spec.model import ModelSpec

NAMES = ("llama.cpp",)


def check_names(names: Sequence[str]) -> list[str]:
    """`names`, each once. Raises `Failure` for one that is no peer of conversions."""
    for name in names:
        if name not in NAMES:
            raise console.Failure(f"--peer: {name!r} is not one of {', '.join(NAMES)}", exit_code=2)
    return list(dict.fromkeys(names))


def usable(names: Sequence[str], dense: ModelSpec) -> bool:
    """Whether llama.cpp is asked for and can be measured; what keeps it from being so is told on stderr."""
    if not names:
        return False
    lack = PEERS["llama.cpp"].missing()
    if lack is None:
        from sparsecli.convert import llama

        lack = llama.refusal(dense)
    if lack:
        console.warn(f"llama.cpp is not measured: {lack}")
    return lack is None
