"""The result of a bench, whose pydantic models are the JSON format; `compare` reads earlier results with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sparsecli.decode.packed.precision import WORDS, Precision
from sparsecli.recipe.schema import PaperFigures

Counted = Annotated[int, Field(ge=0, lt=2**63)]
Milliseconds = Annotated[float, Field(gt=0)]


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, populate_by_name=True
    )


class Bandwidth(_Record):
    """Sequential read bandwidth of all threads together, measured before and after."""

    before: Annotated[float, Field(gt=0)]
    """GB/s before the first round."""
    after: Annotated[float, Field(gt=0)]
    """GB/s after the last round."""
    best: float
    """GB/s of the best of several probes over the whole run. The memory limit is computed from it."""

    @property
    def mean(self) -> float:
        """GB/s before and after, for the comparison of two results."""
        return (self.before + self.after) / 2


class Processor(_Record):
    """The machine, as far as it is known before measuring."""

    cpu: str
    """Model name of the processor."""
    isa: str
    """Vector instructions in use: the native engine's if it is measured, else PyTorch's."""
    threads: Counted
    """Threads of one decode step; the largest number if several are measured."""


class Disk(_Record):
    """Read speed of a disk without the system's cache, with many reads in flight."""

    sequential_mb_s: float
    """MB/s in pieces of 1 MiB, one after the other."""
    random_mb_s: float
    """MB/s in pieces of `random_kb` at random offsets."""
    random_kb: Counted
    """KiB of one such piece."""


class Machine(Processor):
    """What the figures depend on."""

    bandwidth_gb_s: Bandwidth
    """Memory bandwidth."""
    memory_gb: float
    """Main memory."""
    disk: Disk | None = None
    """The disk that weights are read from (`--from-disk`)."""


class Settings(_Record):
    """How the rows were measured."""

    unit: Literal["token", "image"] = "token"
    """What times and bytes are counted by: what says token in names of figures is an image for models of images."""
    context: Counted
    """Tokens in the cache at the start of every turn; the first number if several are measured; 0 for images."""
    source: Counted | None = None
    """Tokens of the encoder's input, if a model has an encoder."""
    rounds: Annotated[int, Field(gt=0)]
    """Turns of every row."""
    tokens_per_round: Annotated[int, Field(gt=0)]
    """Measured tokens, or batches of images, of a turn; samples are in order, turn after turn."""
    warmup_tokens: Counted
    """Unmeasured tokens at the start of a turn."""


class Spread(_Record):
    """Percentiles in milliseconds."""

    p10: float
    """10th percentile."""
    p50: Milliseconds
    """The median."""
    p90: float
    """90th percentile."""


class Times(Spread):
    """Percentiles and every measured token, in milliseconds."""

    samples: list[Milliseconds]
    """In order, turn after turn."""


class RowKey(NamedTuple):
    """The key that identifies a row in another result."""

    variant: str
    backend: str
    dtype: str
    threads: int
    context: int
    batch: int
    prefill: int | None
    from_disk: bool

    @property
    def sizes(self) -> str:
        """The sizes in words: `2 threads, context 64`."""
        words = [f"{self.threads} thread{'' if self.threads == 1 else 's'}"]
        if self.prefill:
            words.append(f"prompt {self.prefill}")
        elif self.context:
            words.append(f"context {self.context}")
        words += [f"batch {self.batch}"] * (self.batch > 1)
        return ", ".join(words + ["from disk"] * self.from_disk)


class _Keyed(_Record):
    """The fields that make up a row's key."""

    variant: str
    """The variant's name in the recipe, or the name of the trained run."""
    backend: str
    """Who computed it."""
    dtype: str
    """Weight type."""
    threads: Counted
    """Threads of one step."""
    context: Counted
    """Tokens in the cache at the start of a turn."""
    batch: Counted = 1
    """Sequences that a step decodes; times are divided by them."""
    prefill: Counted | None = None
    """Tokens of the prompt whose prefill was measured, divided by them; null: decoding was measured."""
    from_disk: bool = False
    """The units of sparse layers were read from disk."""

    @property
    def key(self) -> RowKey:
        """The key that identifies it in another result."""
        return RowKey(**{name: getattr(self, name) for name in RowKey._fields})


class Row(_Keyed):
    """The figures of one case. A figure that was not measured is null."""

    group: Literal["dense", "sparse", "mixture", "peer"]
    """The variant's group; `peer` is another program."""
    precision: dict[str, str | bool] | None = None
    """Weight type of each part, on the native backend."""
    parameters: Counted
    """All parameters."""
    active_parameters: Counted
    """Parameters that one token uses."""
    bytes_per_token: Counted
    """Bytes of weights and of key-value cache that one token reads."""
    bits_per_weight: float | None = None
    """Bits of each weight that a token reads, on average, scales included; without looked-up rows and the cache."""
    projected: bool = False
    """Only some of the blocks are built; their time is scaled to the whole model."""
    ms_per_token: Times
    """Milliseconds per token, with embedding, blocks, logits and the choice of the next token."""
    ms_per_block: Spread | None
    """Milliseconds per block: the time of the block stack divided by the number of blocks."""
    tokens_per_second: float
    """At the median."""
    speedup: float | None
    """Median of the dense row with the same backend, dtype and sizes, divided by this median."""
    speedup_over: float | None = None
    """Speed-up over the row that `--over` names."""
    baseline_bandwidth_fraction: float | None = None
    """Share of the memory limit that the baseline of `speedup` reaches, if less than 70 %; else null."""
    speedup_over_peer: float | None = None
    """Speed-up over the fastest dense row of another program with at least as many bits (`--peer`)."""
    bandwidth_fraction: float | None
    """Share of the memory limit that the row reaches."""
    held_out_loss: float | None
    """Held-out loss of a trained run, in nats per token or image."""
    held_out_accuracy: float | None = None
    """Held-out accuracy of a trained run of a model of images."""
    paper: PaperFigures | None = None
    """The paper's figures for this row."""
    paper_speedup: float | None = None
    """The paper's speed-up of this row."""
    parts: dict[str, float] | None = None
    """Mean milliseconds per token by part (`--profile`); `rest` is the time outside of all parts."""
    ms_feed_forward: float | None = None
    """Mean milliseconds per token of one feed-forward layer (`--profile`), including the time that threads wait."""
    disk_bytes_per_token: Counted | None = None
    """Median of the bytes that the system read from disk for a token (`--from-disk`)."""
    disk_bytes_expected: Counted | None = None
    """Bytes of the units that a token chooses; uncached, all of them are read from disk (`--from-disk`)."""
    disk_mb_s: float | None = None
    """The bytes read from disk divided by the token's time."""
    peer_settings: str | None = None
    """Version and settings of another program."""

    @property
    def weights(self) -> str:
        """Its weight type, and the parts with other types: `bfloat16, int8 head`."""
        return weight_types(self.dtype, self.precision)


class Change(_Keyed):
    """One row against the same row of an earlier result."""

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


class BenchResult(_Record):
    """A whole bench."""

    version: Literal[1] = Field(default=1, alias="schema")
    """Version of this format."""
    command: str
    """The command line that made it."""
    recipe: dict[str, Any] | None
    """The recipe with the options of the command line; null for trained runs (`--model`)."""
    settings: Settings
    """How the rows were measured."""
    versions: dict[str, str]
    """Versions of the software."""
    machine: Machine
    """What the figures depend on."""
    rows: list[Row]
    """The figures."""
    over: str | None = None
    """Backend and dtype of the dense row that is the baseline of `speedup_over`, as in `torch:bfloat16`."""
    peak_memory_gb: float | None = None
    """Peak memory of the process."""
    comparison: list[Change] | None = None
    """The comparison with an earlier result (`--against`)."""

    @model_validator(mode="after")
    def _check(self) -> BenchResult:
        for row in self.rows:
            expected = self.settings.rounds * (1 if row.prefill else self.settings.tokens_per_round)
            if len(row.ms_per_token.samples) != expected:
                raise ValueError(f"{row.variant} has {len(row.ms_per_token.samples)} samples, not {expected}")
        return self


def weight_types(dtype: str, precision: Mapping[str, str | bool] | None) -> str:
    """A row's weight type, and the parts with another type: `bfloat16, int8 head`."""
    if precision is None or dtype not in WORDS:  # codes of a GGUF file
        return dtype
    usual = vars(Precision.of(dtype))
    parts: dict[str, list[str]] = {}
    for name, kind in precision.items():
        if kind != usual[name]:
            parts.setdefault(str(kind), []).append(name)
    words = [f"{kind} {', '.join(names)}" for kind, names in parts.items() if kind not in ("True", "False")]
    changed = " + ".join(words + (["rescoring"] if precision["head_rescoring"] else []))
    return f"{dtype}, {changed}" if changed else dtype
