"""What a conversion cost and saved, as data, as a table and as Markdown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sparsecli import console


@dataclass(frozen=True)
class Stage:
    """Held-out figures of one stage."""

    name: str
    nats_per_token: float
    bits_per_byte: float
    change: float
    """Loss relative to the dense model's, as a fraction."""


@dataclass(frozen=True)
class Report:
    """Everything a reader needs to judge a conversion."""

    source: str
    output: str
    kept_fraction: float
    """Share of feed-forward units that a token uses."""
    dense_parameters: int
    sparse_parameters: int
    dense_bytes_per_token: int
    """Weights that one decoded token reads, float32."""
    sparse_bytes_per_token: int
    captured_share: list[float]
    """Per block: score of the units that the controller chose over that of the best choice."""
    stages: list[Stage] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON data; `schema` changes when a field changes its meaning."""
        return {"schema": 1, **asdict(self)}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Stage, loss in nats per token, bits per byte, change against dense."""
        return [
            (stage.name, f"{stage.nats_per_token:.4f}", f"{stage.bits_per_byte:.4f}", f"{stage.change:+.2%}")
            for stage in self.stages
        ]

    def facts(self) -> list[tuple[str, str]]:
        """The other figures, for people."""
        saved = self.dense_bytes_per_token / self.sparse_bytes_per_token
        shares = ", ".join(f"{share:.0%}" for share in self.captured_share)
        return [
            ("units kept per token", f"{self.kept_fraction:.1%}"),
            ("parameters", f"{self.dense_parameters:,} → {self.sparse_parameters:,}"),
            (
                "weights read per token",
                f"{self.dense_bytes_per_token / 1e6:.2f} → {self.sparse_bytes_per_token / 1e6:.2f} MB "
                f"({saved:.2f}x less, float32)",
            ),
            ("controller's choice against the best, by block", shares),
            ("model", f"{self.output}/model"),
        ]

    def markdown(self) -> str:
        """A page for a pull request or a model card."""
        lines = [
            f"# {self.source} made sparse",
            "",
            "| stage | held-out nats per token | bits per byte | against dense |",
            "| --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in self.rows()),
            "",
            *(f"- {name}: {value}" for name, value in self.facts()),
            "",
        ]
        return "\n".join(lines)

    def show(self, format: str) -> None:
        """Print the report to stdout as table, json, csv or markdown."""
        if format == "json":
            console.json_out(self.as_json())
        elif format == "markdown":
            console.out(self.markdown(), end="")
        elif format == "csv":
            console.out("stage,nats_per_token,bits_per_byte,change")
            for stage in self.stages:
                console.out(f"{stage.name},{stage.nats_per_token},{stage.bits_per_byte},{stage.change}")
        else:
            console.print_table(["stage", "nats/token", "bits/byte", "against dense"], self.rows())
            console.print_table(["conversion", ""], self.facts())
