"""The result of a bench: the pydantic models below are the JSON format; `compare` reads earlier results with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sparsecli.decode.packed.precision import Precision
from sparsecli.recipe.schema import PaperFigures

Counted = Annotated[int, Field(ge=0, lt=2**63)]
Taken = Annotated[float, Field(gt=0)]
"""Milliseconds."""


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, populate_by_name=True
    )


class Bandwidth(_Record):
    """Sequential read bandwidth of all threads together, probed around the measurement."""

    before: Annotated[float, Field(gt=0)]
    """GB/s before the first round."""
    after: Annotated[float, Field(gt=0)]
    """GB/s after the last round."""
    best: float | None = None
    """GB/s of the best of several probes over the whole run; null in older results."""

    @property
    def mean(self) -> float:
        """GB/s before and after, for the comparison of two results."""
        return (self.before + self.after) / 2

    @property
    def limit(self) -> float:
        """GB/s that the memory limit is computed with."""
        return max(self.best or 0.0, self.before, self.after)


class Processor(_Record):
    """What computes, as far as it is known before measuring."""

    cpu: str
    """Model name of the processor."""
    isa: str
    """Vector instructions in use: the native engine's where it is measured, else PyTorch's."""
    threads: Counted
    """Threads of one decode step; the most, where several numbers are measured."""


class Disk(_Record):
    """How fast a disk reads past the system's cache, many reads at once."""

    sequential_mb_s: float
    """MB/s in pieces of 1 MiB, one after the other."""
    random_mb_s: float
    """MB/s in pieces of `random_kb`, here and there."""
    random_kb: Counted
    """KiB of one such piece."""


class Machine(Processor):
    """What the figures depend on."""

    bandwidth_gb_s: Bandwidth
    """Memory bandwidth."""
    memory_gb: float
    """Main memory."""
    disk: Disk | None = None
    """The disk that weights were left on (`--from-disk`)."""


class Settings(_Record):
    """How the rows were measured."""

    context: Counted
    """Tokens in the cache at the start of every turn; the first, where several lengths are measured."""
    source: Counted | None = None
    """Tokens of the source, where a row decodes what an encoder made of one."""
    rounds: Annotated[int, Field(gt=0)]
    """Turns of every row."""
    tokens_per_round: Annotated[int, Field(gt=0)]
    """Measured tokens of a turn, one after the other; samples are in order, turn after turn."""
    warmup_tokens: Counted
    """Unmeasured tokens before them."""


class Spread(_Record):
    """Percentiles in milliseconds."""

    p10: float
    """Nine in ten were slower."""
    p50: Taken
    """The median."""
    p90: float
    """Nine in ten were faster."""


class Times(Spread):
    """Percentiles and every measured token, in milliseconds."""

    samples: list[Taken]
    """In order, turn after turn."""


def in_words(
    threads: int | None, context: int | None, batch: int, prefill: int | None, from_disk: bool
) -> str:
    """What a row was measured at: `2 threads, context 64`."""
    words = [f"{threads} thread{'' if threads == 1 else 's'}"]
    words.append(f"prompt {prefill}" if prefill else f"context {context}")
    return ", ".join(words + [f"batch {batch}"] * (batch > 1) + ["from disk"] * from_disk)


class Key(NamedTuple):
    """See `Subject.key`."""

    variant: str
    backend: str
    dtype: str
    threads: int | None
    context: int | None
    batch: int
    prefill: int | None
    from_disk: bool


class Subject(_Record):
    """One variant on one backend in one weight type: all of a row that is known before measuring."""

    variant: str
    """The variant's name in the recipe, or the name of the trained run."""
    group: Literal["dense", "sparse", "mixture", "peer"]
    """What it is compared as; `peer` is another program."""
    backend: str
    """Who computed it."""
    dtype: str
    """Weight type."""
    precision: dict[str, str | bool] | None = None
    """Weight type of each part, on the native backend."""
    threads: Counted | None = None
    """Threads of one step."""
    context: Counted | None = None
    """Tokens in the cache at the start of a turn."""
    batch: Counted = 1
    """Sequences that a step decodes; times are over them."""
    prefill: Counted | None = None
    """Tokens of the prompt whose reading was measured, times are over them; null: decoding was measured."""
    from_disk: bool = False
    """The units of sparse layers were read from disk."""
    parameters: Counted
    """All parameters."""
    active_parameters: Counted
    """Parameters that one token uses."""
    bytes_per_token: Counted
    """Bytes of weights and of key-value cache that one token reads."""
    projected: bool = False
    """Only some of the blocks are built; their time is multiplied out."""

    @property
    def key(self) -> Key:
        """What makes a row the same row in another result."""
        return Key(
            self.variant,
            self.backend,
            self.dtype,
            self.threads,
            self.context,
            self.batch,
            self.prefill,
            self.from_disk,
        )

    @property
    def sizes(self) -> str:
        """What the row is measured at, in words."""
        return in_words(*self.key[3:])

    @property
    def changed_parts(self) -> str:
        """The parts of another type than the row's, in words: `int8 head`; empty where there are none."""
        if self.precision is None:
            return ""
        usual = vars(Precision.of(self.dtype))
        parts: dict[str, list[str]] = {}
        for name, kind in self.precision.items():
            if kind != usual[name]:
                parts.setdefault(str(kind), []).append(name)
        words = [
            f"{kind} {', '.join(names)}" for kind, names in parts.items() if kind not in ("True", "False")
        ]
        return " + ".join(words + (["rescoring"] if self.precision["head_rescoring"] else []))


class Row(Subject):
    """A subject and its figures. A figure that was not measured is null."""

    ms_per_token: Times
    """Milliseconds a token: embedding, blocks, logits and the choice of the next token."""
    ms_per_block: Spread | None
    """Milliseconds a block: the time of the block stack over the number of blocks."""
    tokens_per_second: float
    """At the median."""
    speedup: float | None
    """Median of the dense row of the same backend, dtype and sizes over this median."""
    speedup_over: float | None = None
    """The same over the row that `--over` names."""
    speedup_rests_on: float | None = None
    """Share of the memory limit of the dense row that `speedup` is over, where it is less than 70 %; else null."""
    speedup_over_peer: float | None = None
    """Over the fastest dense row of another program with as many bits or more (`--peer`)."""
    bandwidth_fraction: float | None
    """Share of the memory limit reached."""
    held_out_loss: float | None
    """Held-out loss of a trained run, in nats a token."""
    paper: PaperFigures | None = None
    """The paper's figures for this row."""
    paper_speedup: float | None = None
    """The paper's speed-up of this row."""
    parts: dict[str, float] | None = None
    """Mean milliseconds a token by part (`--profile`); `rest` is what no part accounts for."""
    ms_feed_forward: float | None = None
    """Mean milliseconds a token that one feed-forward layer takes (`--profile`); waiting counts as its time."""
    disk_bytes_per_token: Counted | None = None
    """Bytes that the system fetched from disk for a token, the median (`--from-disk`)."""
    disk_bytes_expected: Counted | None = None
    """Bytes of the units that a token chooses: cold ones are fetched all (`--from-disk`)."""
    disk_mb_s: float | None = None
    """Those bytes over the token's time."""
    peer_settings: str | None = None
    """Another program's version and what it was told."""


class Change(_Record):
    """One row against the same row of an earlier result."""

    variant: str
    backend: str
    dtype: str
    threads: Counted | None = None
    context: Counted | None = None
    batch: Counted = 1
    prefill: Counted | None = None
    from_disk: bool = False
    before_ms: float
    """Earlier median."""
    now_ms: float
    """This median."""
    ratio: float
    """now / before; above 1 is slower."""
    ratio_low: float
    """Lower end of the ratio's 95 % interval."""
    ratio_high: float
    """Upper end of the ratio's 95 % interval."""
    verdict: Literal["slower", "faster", "same"]
    """`slower` and `faster` only beyond the threshold and beyond the noise."""

    @property
    def sizes(self) -> str:
        """What a row was measured at, in words."""
        return in_words(self.threads, self.context, self.batch, self.prefill, self.from_disk)


class Result(_Record):
    """A whole bench."""

    version: Literal[1] = Field(default=1, alias="schema")
    """Version of this format."""
    command: str
    """The command line that made it."""
    recipe: dict[str, Any] | None
    """The recipe as it was run, the command line's options included; null for trained runs (`--model`)."""
    settings: Settings
    """How the rows were measured."""
    versions: dict[str, str]
    """Versions of the software."""
    machine: Machine
    """What the figures depend on."""
    rows: list[Row]
    """The figures."""
    over: str | None = None
    """Backend and dtype, `torch:bfloat16`, over whose dense row `speedup_over` is."""
    peak_memory_gb: float | None = None
    """The most memory that the process held at once."""
    comparison: list[Change] | None = None
    """Against an earlier result (`--against`)."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Rows of older results have the threads and the context that all rows had."""
        try:
            usual = {"threads": values["machine"]["threads"], "context": values["settings"]["context"]}
            return {**values, "rows": [{**usual, **row} for row in values["rows"]]}
        except (KeyError, TypeError):
            return values  # made from records, or damaged, which validation tells

    @model_validator(mode="after")
    def _check(self) -> Result:
        for row in self.rows:
            expected = self.settings.rounds * (1 if row.prefill else self.settings.tokens_per_round)
            if len(row.ms_per_token.samples) != expected:
                raise ValueError(f"{row.variant} has {len(row.ms_per_token.samples)} samples, not {expected}")
        return self
