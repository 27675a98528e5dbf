"""The pictures of the layers: `python docs/site/pictures.py` writes them to `docs/pictures/`.

They are SVG with their own light and dark colours, so that they fit GitHub and the site in either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pictures"
WIDTH = 680
STYLE = """
text { font: 13px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: #1b1f24; }
.small { font-size: 11.5px; fill: #5a6370; }
.bold { font-weight: 600; }
.off { fill: #e3e7ec; } .on { fill: #0b7a75; } .other { fill: #d08a2c; } .third { fill: #7a4fb5; }
.box { fill: none; stroke: #5a6370; stroke-width: 1.3; }
.frame { fill: none; stroke: #0b7a75; stroke-width: 2; }
.line { fill: none; stroke: #5a6370; stroke-width: 1.3; }
.head { fill: #5a6370; }
@media (prefers-color-scheme: dark) {
  text { fill: #e7eaee; } .small { fill: #a3acb8; }
  .off { fill: #373e48; } .on { fill: #2fb5ac; } .other { fill: #e8b465; } .third { fill: #b08ae6; }
  .box, .line { stroke: #a3acb8; } .frame { stroke: #2fb5ac; } .head { fill: #a3acb8; }
}
"""


class Svg:
    """A picture that grows by shapes; coordinates are pixels from the top left."""

    def __init__(self, height: int, title: str) -> None:
        self.height, self.title = height, title
        self.shapes: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.shapes.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"/>'
        )

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self.shapes.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>')

    def path(self, points: str) -> None:
        self.shapes.append(f'<path class="line" d="{points}"/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """An arrow along one axis, or a slanted one."""
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        dx, dy = (x2 - x1) / length, (y2 - y1) / length
        self.path(f"M{x1:g} {y1:g}L{x2 - 6 * dx:g} {y2 - 6 * dy:g}")
        left, right = (
            (x2 - 8 * dx - 4 * dy, y2 - 8 * dy + 4 * dx),
            (x2 - 8 * dx + 4 * dy, y2 - 8 * dy - 4 * dx),
        )
        tip = " ".join(f"{x:.4g},{y:.4g}" for x, y in ((x2, y2), left, right))
        self.shapes.append(f'<polygon class="head" points="{tip}"/>')

    def grid(
        self,
        x: float,
        y: float,
        rows: int,
        columns: int,
        kind: Callable[[int, int], str],
        size: tuple[float, float] = (14, 14),
    ) -> None:
        """Cells of `size` (width, height) with a gap of 2; those of a kind are one shape."""
        cells: dict[str, str] = {}
        width, height = size[0] - 2, size[1] - 2
        for row in range(rows):
            for column in range(columns):
                left, top = x + column * size[0], y + row * size[1]
                outline = f"M{left:g} {top:g}h{width:g}v{height:g}h{-width:g}z"
                cells[kind(row, column)] = cells.get(kind(row, column), "") + outline
        for name, outline in cells.items():
            self.shapes.append(f'<path class="{name}" d="{outline}"/>')

    def __str__(self) -> str:
        shapes = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">\n'
            f"<title>{self.title}</title>\n<style>{STYLE}</style>\n{shapes}\n</svg>\n"
        )


def marked(rows: Iterable[int], kind: str = "on") -> Callable[[int, int], str]:
    """Cells of these rows stand out."""
    chosen = set(rows)
    return lambda row, _: kind if row in chosen else "off"


def sparse_ff() -> Svg:
    picture = Svg(250, "Sparse FF: a controller chooses one unit of every block; only their rows are read")
    chosen = (2, 4, 11)
    picture.grid(16, 70, 6, 1, lambda *_: "other", (18, 18))
    picture.text(24, 60, "x")
    picture.text(24, 196, "d", "small")
    picture.arrow(44, 122, 84, 122)
    picture.rect(84, 96, 84, 52, "box")
    picture.text(126, 118, "controller")
    picture.text(126, 136, "C₂ (C₁ x) + b", "small")
    picture.arrow(168, 122, 206, 122)
    for block in range(3):
        top = 32 + block * 66
        best = chosen[block] % 4
        picture.grid(210, top, 4, 1, marked([best]), (26, 15))
        picture.rect(206, top - 4, 32, 66, "box")
    picture.text(222, 20, "argmax of each block", "small")
    picture.text(222, 244, "d_ff units, N in a block", "small")
    for block in range(3):
        y = 32 + block * 66 + (chosen[block] % 4) * 15 + 6
        picture.arrow(240, y, 302, y)
    for top, left, label in ((32, 306, "W_up"), (32, 458, "W_down")):
        for block in range(3):
            picture.grid(left, top + block * 66, 4, 8, marked([chosen[block] % 4]), (14, 15))
        picture.text(left + 56, 20, label)
    picture.text(432, 126, "relu", "small")
    for block in range(3):
        y = 32 + block * 66 + (chosen[block] % 4) * 15 + 6
        picture.arrow(420, y, 456, y)
    picture.text(438, 244, "the rows of chosen units alone are read", "small")
    picture.arrow(574, 122, 622, 122)
    picture.grid(626, 70, 6, 1, lambda *_: "other", (18, 18))
    picture.text(634, 60, "y")
    picture.text(598, 112, "sum", "small")
    return picture


def multiplicative(title: str, output: str, below: str) -> Svg:
    picture = Svg(230, title)
    s, m = 1, 3
    picture.grid(16, 60, 1, 9, lambda *_: "other", (18, 18))
    picture.text(96, 50, "x")
    picture.text(96, 94, "d inputs", "small")
    picture.grid(232, 24, 4, 9, marked([s]), (18, 18))
    picture.text(226, 62, "D", anchor="end")
    picture.text(404, 62, "S modules", "small", anchor="start")
    picture.grid(232, 122, 5, 9, marked([m], "third"), (18, 18))
    picture.text(226, 172, "E", anchor="end")
    picture.text(404, 172, "M in a module", "small", anchor="start")
    picture.text(312, 112, "×", "bold")
    picture.arrow(184, 68, 206, 68)
    picture.arrow(478, 108, 520, 108)

    def cell(row: int, column: int) -> str:
        return "other" if (row, column) == (s, m) else "on" if row == s else "third" if column == m else "off"

    picture.grid(526, 72, 4, 5, cell, (22, 22))
    picture.text(580, 58, output)
    picture.text(580, 182, below, "small")
    picture.text(104, 150, "y[s, m] = Σ x[i] D[s, i] E[m, i]")
    picture.text(104, 172, "d (S + M) weights", "small")
    picture.text(104, 190, "instead of d · S · M", "small")
    return picture


def convolution() -> Svg:
    picture = Svg(230, "The convolution over the last positions and neighbouring modules")
    picture.grid(70, 40, 6, 9, lambda r, c: "on" if r in (2, 3, 4) and c in (3, 4, 5) else "off", (28, 26))
    picture.rect(70 + 3 * 28 - 4, 40 + 2 * 26 - 4, 3 * 28 + 4, 3 * 26 + 4, "frame")
    picture.text(196, 26, "modules 1 … S, each with M channels", "small")
    picture.text(60, 56, "t − 4", "small", anchor="end")
    picture.text(60, 108, "t − 2", "small", anchor="end")
    picture.text(60, 160, "t", "bold", anchor="end")
    picture.text(60, 186, "t + 1", "small", anchor="end")
    picture.arrow(336, 132, 424, 132)
    picture.text(380, 122, "3 × 3 kernel", "small")
    picture.text(380, 152, "for all modules", "small")
    picture.grid(436, 118, 1, 8, lambda _, c: "other" if c == 4 else "off", (28, 26))
    picture.text(546, 106, "position t")
    picture.text(546, 170, "later positions are never read", "small")
    picture.text(196, 216, "earlier positions are kept for decoding", "small")
    return picture


def mixture() -> Svg:
    picture = Svg(230, "Mixture of experts: a router chooses whole slices of consecutive units")
    picture.grid(16, 62, 6, 1, lambda *_: "other", (18, 18))
    picture.text(24, 52, "x")
    picture.arrow(44, 114, 92, 114)
    picture.rect(92, 90, 84, 48, "box")
    picture.text(134, 110, "router")
    picture.text(134, 128, "softmax(R x)", "small")
    for expert in range(4):
        top = 22 + expert * 48
        chosen = expert == 2
        picture.rect(244, top - 4, 252, 44, "frame" if chosen else "box")
        for row in range(2):
            picture.grid(252, top + row * 18, 1, 13, lambda *_, on=chosen: "on" if on else "off", (18, 18))
        picture.text(512, top + 22, f"expert {expert + 1}", "bold" if chosen else "small", anchor="start")
    picture.arrow(176, 114, 240, 136)
    picture.text(208, 146, "one", "small")
    picture.text(370, 222, "an expert is a feed-forward layer of d_ff / experts units", "small")
    picture.arrow(580, 134, 622, 122)
    picture.grid(626, 70, 6, 1, lambda *_: "other", (18, 18))
    picture.text(634, 60, "y")
    return picture


def refined(title: str, every: str, chosen_text: str, rest: str) -> Svg:
    picture = Svg(230, title)
    chosen = (2, 5, 8)
    picture.grid(90, 40, 10, 9, lambda *_: "third", (16, 16))
    picture.text(160, 28, every)
    picture.text(160, 222, "every unit is read", "small")
    picture.arrow(244, 118, 296, 118)
    picture.text(270, 108, "scores", "small")
    picture.grid(300, 40, 10, 1, marked(chosen), (26, 16))
    picture.text(312, 28, "best of a block", "small")
    for row in chosen:
        picture.arrow(328, 40 + row * 16 + 7, 404, 40 + row * 16 + 7)
    picture.grid(408, 40, 10, 9, marked(chosen), (16, 16))
    picture.text(480, 28, chosen_text)
    picture.text(480, 222, "only the rows of chosen units are read", "small")
    picture.text(570, 116, rest, "small", anchor="start")
    return picture


def lsh() -> Svg:
    picture = Svg(250, "LSH attention: tokens are sorted by bucket and attend within chunks")
    kinds = ("on", "other", "third")
    buckets = (0, 1, 0, 2, 1, 0, 2, 0, 1, 2, 1, 0)
    order = sorted(range(12), key=lambda token: (buckets[token], token))
    place = {token: position for position, token in enumerate(order)}
    for token, bucket in enumerate(buckets):
        picture.rect(150 + token * 42, 36, 34, 26, kinds[bucket])
        picture.rect(150 + token * 42, 140, 34, 26, kinds[buckets[order[token]]])
        picture.path(f"M{167 + token * 42} 64L{167 + place[token] * 42} 138")
    for chunk in range(3):
        picture.rect(147 + chunk * 168, 133, 165, 40, "frame")
        picture.text(227 + chunk * 168, 194, f"chunk {chunk + 1}", "small")
    for chunk in range(2):
        picture.path(
            f"M{395 + chunk * 168} 204 C {395 + chunk * 168} 224, {227 + chunk * 168} 224, {227 + chunk * 168} 204"
        )
    picture.text(140, 54, "tokens", anchor="end")
    picture.text(140, 158, "sorted", anchor="end")
    picture.text(140, 106, "by bucket", "small", anchor="end")
    picture.text(400, 22, "colour: bucket of the rotated axis that a token's key is nearest to", "small")
    picture.text(400, 244, "a token attends to its chunk and the one before", "small")
    return picture


def reversible() -> Svg:
    picture = Svg(200, "A reversible block: each stream gets a function of the other")
    for y, name in ((50, "a"), (150, "b")):
        picture.text(40, y + 5, f"{name}₁", "bold")
        picture.text(644, y + 5, f"{name}₂", "bold")
    picture.arrow(56, 50, 226, 50)
    picture.rect(226, 38, 24, 24, "box")
    picture.text(238, 55, "+")
    picture.arrow(250, 50, 626, 50)
    picture.arrow(56, 150, 446, 150)
    picture.rect(446, 138, 24, 24, "box")
    picture.text(458, 155, "+")
    picture.arrow(470, 150, 626, 150)
    picture.path("M140 150L140 116")
    picture.rect(96, 84, 88, 32, "frame")
    picture.text(140, 105, "attention")
    picture.path("M140 84L140 72L238 72")
    picture.arrow(238, 72, 238, 63)
    picture.path("M350 50L350 84")
    picture.rect(296, 84, 108, 32, "frame")
    picture.text(350, 105, "feed-forward")
    picture.path("M350 116L350 128L458 128")
    picture.arrow(458, 128, 458, 137)
    picture.text(340, 192, "backward: b₁ = b₂ − feed-forward(a₂), then a₁ = a₂ − attention(b₁)", "small")
    return picture


def sru() -> Svg:
    picture = Svg(190, "A simple recurrent unit: the cell keeps a share of what it was")
    for step in range(3):
        left = 70 + step * 190
        picture.rect(left, 76, 120, 44, "frame")
        name = ("t − 1", "t", "t + 1")[step]
        picture.text(left + 60, 103, f"c[{name}]", "bold")
        picture.arrow(left + 60, 160, left + 60, 122)
        picture.text(left + 60, 178, f"x[{name}]", "small")
        picture.arrow(left + 60, 74, left + 60, 38)
        picture.text(left + 60, 28, f"h[{name}]", "small")
        picture.arrow(left + 120, 98, left + 188, 98)
        picture.text(left + 154, 88, "× f", "small")
    picture.text(160, 144, "(1 − f) · W x", "small", anchor="start")
    return picture


PICTURES: dict[str, Callable[[], Svg]] = {
    "sparse-ff": sparse_ff,
    "multiplicative": lambda: multiplicative(
        "The multiplicative layer: a linear layer whose weights are products of two factors",
        "y (d_out)",
        "S × M outputs",
    ),
    "convolution": convolution,
    "sparse-loss": lambda: multiplicative(
        "Sparse loss: the logits of the vocabulary as a multiplicative layer",
        "logits (V)",
        "V = S × M tokens",
    ),
    "mixture": mixture,
    "precision": lambda: refined(
        "Precision: all units in few bits, the chosen ones with the rest of their bits",
        "codes of 3 or 4 bits",
        "rounding errors",
        "both are added",
    ),
    "selector": lambda: refined(
        "Selector: a sketch of the weights in few bits chooses the units",
        "sketch, 3 or 4 bits",
        "weights",
        "replace them",
    ),
    "lsh": lsh,
    "reversible": reversible,
    "sru": sru,
}


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
