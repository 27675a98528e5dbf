"""What the engine computes, in plain PyTorch: a readable twin of the whole step.

It reads the same packed tensors, takes one token at a time, and rounds where the kernels do (ops.py), so
that it makes the same choices of units with any precision. It is some hundred times slower.

Shapes: d width, H heads, S modules, F_h length of a convolution, L tokens of a source, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecli.decode.lsh_rotations import factors_at, rotations_of
from sparsecli.decode.packed.layouts import LANES, padded
from sparsecli.decode.packed.pack import PackedModel
from sparsecli.decode.packed.precision import head_candidates
from sparsecli.decode.packed.tensors import chooses, convolves, crosses, modules_of, query_modules_of
from sparsecli.decode.reference.ops import (
    ACTIVATIONS,
    attend,
    attend_alike,
    choose,
    convolve,
    gemv,
    hash_keys,
    join,
    multiplicative,
    quantized_gemv,
    recur,
    rotate,
    round_trip,
    soft_cap,
)
from sparsecli.decode.reference.weights import Weight, unpack_model
from sparsecli.model.gguf_types import HEAD_LANES

UNIT_EPSILON = 1e-6  # added to the mean square of a shared query before it becomes a key


class Reference:
    """Decodes one sequence with a packed model, as `Engine` does.

    What it has seen is in `memory`: for each layer and name, one row for every position.
    """

    def __init__(self, model: PackedModel) -> None:
        self.spec, self.precision = model.spec, model.precision
        self.weights, self.quantized = unpack_model(model)
        self.memory: dict[str, list[Tensor]] = defaultdict(list)
        self.length = self.first = 0  # positions held; the first token's, which a prefix precedes
        self.tokens: list[int] = []  # where rotary frequencies depend on their number

    def logits(self, tokens: Iterable[int], source: np.ndarray | None = None) -> np.ndarray:
        """Logits (n, V) after each of `tokens`, of a new sequence that begins with `source`, see `read_source`."""
        self.memory.clear()
        self.tokens.clear()
        self.length = self.first = 0
        if source is not None:
            self.read_source(source)
        return np.stack([self.step(token) for token in tokens])

    @torch.no_grad()
    def read_source(self, source: np.ndarray) -> None:
        """Begin a sequence with an encoder's output, streams (1 or 2, L, d)."""
        streams = torch.from_numpy(source)
        if crosses(self.spec):
            for layer in range(self.spec.layers):
                for row in streams[0]:
                    self._append_encoder_state(f"blocks.{layer}.cross.", row)
            return
        for a, b in zip(streams[0], streams[-1], strict=True):
            self._reversible(a, b)
            self.length += 1
        self.first = self.length

    @torch.no_grad()
    def step(self, token: int) -> np.ndarray:
        """Logits (V,) after `token`, which is added to the sequence."""
        self.tokens.append(token)
        if self.length == self.spec.rotary_switch:  # other angles from here on
            self.memory.clear()
            self.length = 0
            for earlier in self.tokens[:-1]:
                self._run(earlier)
        logits = self._head(self._normalize("norm", self._run(token))) * self.spec.logit_scale
        return soft_cap(logits, self.spec.logit_softcap).numpy()

    def _run(self, token: int) -> Tensor:
        """The stream after all blocks."""
        x = self._embed(token)
        merged = self._single(x) if self.spec.residual == "single" else self._merge(*self._reversible(x, x))
        self.length += 1
        return merged

    def _embed(self, token: int) -> Tensor:
        x = self.weights["embedding"].row(token) * self.spec.embedding_scale
        if self.spec.positions == "sinusoidal":
            angles = (self.length - self.first) * self.weights["frequencies"].values[0]
            return x + torch.cat((angles.sin(), angles.cos()))
        if self.spec.positions == "rotary":
            return x
        return x + self.weights["positions"].row(self.length - self.first)

    # Blocks.

    def _single(self, x: Tensor) -> Tensor:
        for layer in range(self.spec.layers):
            block, before = f"blocks.{layer}.", x
            y = self._normalize(f"{block}attention_post_norm", self._attention(block, x, layer))
            x = x + self.spec.residual_scale * y
            if crosses(self.spec):
                x = x + self._cross_attention(f"{block}cross.", x)
            y = self._feed_forward_half(layer, before if self.spec.parallel else x)
            x = x + self.spec.residual_scale * y
        return x

    def _reversible(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Every layer reads one stream and adds to the other; then they change places."""
        for layer in range(self.spec.layers):
            for index, prefix in enumerate(("", "second.")[: self.spec.attention_layers]):
                layer_idx = layer * self.spec.attention_layers + index
                a, b = b, a + self._attention(f"blocks.{layer}.{prefix}", b, layer_idx)
            a, b = b, a + self._feed_forward_half(layer, b)
        return a, b

    def _merge(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b)) if self.spec.merge == "concatenate" else (a + b) / 2

    def _feed_forward_half(self, layer: int, x: Tensor) -> Tensor:
        """The feed-forward layer, and what runs beside it."""
        block = f"blocks.{layer}."
        y = self._feed_forward(layer, self._normalize(f"{block}feed_forward_norm", x))
        y = self._normalize(f"{block}feed_forward_post_norm", y)
        return y if self.spec.sru is None else y + self._recurrence(f"{block}sru.", x)

    def _recurrence(self, branch: str, x: Tensor) -> Tensor:
        assert self.spec.sru
        y = self._linear(f"{branch}enter", self._normalize(f"{branch}norm", x))
        for index in range(self.spec.sru.layers):
            states = self.memory[f"{branch}cells.{index}"]
            state = states[-1] if states else torch.zeros_like(y)
            y, state = recur(self._linear(f"{branch}cells.{index}", y), y, state)
            states.append(state)
        return self._linear(f"{branch}leave", y)

    def _angles(self, table: str) -> Tensor:
        switch = self.spec.rotary_switch
        name = "sliding_frequencies" if table == "sliding" else "frequencies"
        if table == "full" and switch and len(self.tokens) > switch:
            name = "long_frequencies"
        return self.length * self.weights[name].values[0]

    def _normalize(self, name: str, x: Tensor) -> Tensor:
        """x (d,) normalised; as it is where the model has no norm called `name`."""
        if f"{name}.weight" not in self.weights:
            return x
        weight, epsilon = self.weights[f"{name}.weight"].values[0], self.spec.normalization_epsilon
        if self.spec.normalization == "rms":
            return F.rms_norm(x, x.shape, weight, epsilon)
        return F.layer_norm(x, x.shape, weight, self.weights[f"{name}.bias"].values[0], epsilon)

    def _head_norm(self, name: str, x: Tensor) -> Tensor:
        """x (heads, width) with every head normalised, or all together."""
        weight = self.weights[f"{name}.weight"].values[0]
        if self.spec.attention.query_key_norm_over == "projection":
            rows = x.flatten()
            return F.rms_norm(rows, rows.shape, weight, self.spec.normalization_epsilon).view_as(x)
        return F.rms_norm(x, weight.shape, weight, self.spec.normalization_epsilon)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """The dense or multiplicative map called `name`."""
        if f"{name}.weight" in self.quantized:
            y = quantized_gemv(self.quantized[f"{name}.weight"], x)
        elif f"{name}.weight" in self.weights:
            y = gemv(self.weights[f"{name}.weight"], x)
        else:
            y = multiplicative(self.weights[f"{name}.D"], self.weights[f"{name}.E"], x)
        return y + self.weights[f"{name}.bias"].values[0] if f"{name}.bias" in self.weights else y

    # Attention.

    def _attention(self, block: str, x: Tensor, layer_idx: int) -> Tensor:
        """`layer_idx` counts attention layers in the order of the caches."""
        spec = self.spec.attention
        q, k, v = (
            self._heads(part) for part in self._project(block, self._normalize(f"{block}attention_norm", x))
        )
        if spec.query_key_norm:
            q, k = self._head_norm(f"{block}query_norm", q), self._head_norm(f"{block}key_norm", k)
        table = self.spec.rotary_table(layer_idx // self.spec.attention_layers)
        if table != "none":
            factor = self.spec.rotary_attention_factor if table == "full" else 1.0
            q, k = rotate(q, self._angles(table), factor), rotate(k, self._angles(table), factor)
        if spec.shares_query_key:
            k = F.rms_norm(q, q.shape[-1:], eps=UNIT_EPSILON) / self.spec.width_of_head**0.5
        keys, values = self.memory[f"{block}keys"], self.memory[f"{block}values"]
        keys.append(round_trip(k, self.precision.cache))
        values.append(round_trip(v, self.precision.cache))
        if spec.hashing and len(keys) > spec.hashing.most_keys:
            y = self._attend_alike(q, torch.stack(keys), torch.stack(values), layer_idx).flatten()
        elif spec.shares_query_key:  # a token sees itself only where there is nothing else
            seen = max(1, len(keys) - 1)
            y = attend(q, torch.stack(keys[:seen]), torch.stack(values[:seen]), scale=1.0).flatten()
        else:
            window = slice(-(self.spec.window(layer_idx // self.spec.attention_layers) or len(keys)), None)
            seen_keys, seen_values = torch.stack(keys[window]), torch.stack(values[window])
            y = attend(q, seen_keys, seen_values, self._attention_scale, spec.logit_softcap).flatten()
        if spec.output == "none":
            return y
        y = self._linear(f"{block}output", y)
        if spec.output != "multiplicative_conv":
            return y
        past = self._conv_state(f"{block}output", y)
        return self._convolve(f"{block}output_convolution", past, modules_of(self.spec), neighbours=3)

    def _attend_alike(self, q: Tensor, keys: Tensor, values: Tensor, layer_idx: int) -> Tensor:
        """All keys are hashed anew for every token; the engine does that where the number of buckets changes."""
        assert self.spec.attention.hashing
        level = self.length.bit_length()  # texts of at most 2^level positions
        rotations = torch.from_numpy(rotations_of(self.spec, layer_idx, level))
        buckets = hash_keys(keys, rotations, factors_at(self.spec, level))
        return attend_alike(q, keys, values, buckets, self.spec.attention.hashing.most_keys)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.spec.width_of_head))

    @property
    def _attention_scale(self) -> float:
        """What scores are multiplied by."""
        return self.spec.attention_scale

    def _project(self, block: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (d,), all heads side by side; shared ones twice."""
        spec = self.spec.attention
        if not convolves(self.spec):
            queries, values = self._ranked(f"{block}query", x), self._linear(f"{block}value", x)
            keys = queries if spec.share_query_key else self._ranked(f"{block}key", x)
        else:
            modules = modules_of(self.spec)
            m = self._linear(f"{block}shared", x)
            past = self._conv_state(f"{block}shared", m)
            queries = keys = self._convolve(f"{block}query_convolution", past, modules, neighbours=3)
            if not spec.share_query_key:
                keys = self._convolve(f"{block}key_convolution", past, modules, neighbours=3)
            past = self._conv_state(f"{block}joined", join(m, x, spec.value_concat, modules))
            values = self._convolve(f"{block}value_convolution", past, modules, neighbours=1)
        if spec.shares_query_key:
            queries = keys = (queries + keys) / 2
        return queries, keys, values

    def _ranked(self, name: str, x: Tensor) -> Tensor:
        """The map called `name`, which may be two."""
        if self.spec.query_rank is None:
            return self._linear(name, x)
        return self._linear(f"{name}.second", self._linear(f"{name}.first", x))

    def _conv_state(self, name: str, row: Tensor) -> Tensor:
        """`row` and those of the F_h - 1 positions before it, zeros before the first: (F_h, width)."""
        rows = self.memory[name]
        rows.append(round_trip(row, self.precision.convolution))
        kernel = self.spec.attention.kernel
        before = [torch.zeros_like(row)] * (kernel - len(rows))
        return torch.stack([*before, *rows[-kernel:]])

    def _convolve(self, name: str, rows: Tensor, modules: int, neighbours: int) -> Tensor:
        y = convolve(self.weights[f"{name}.weight"], rows, modules, neighbours)
        return y + self.weights[f"{name}.bias"].values[0].repeat(modules)

    # Attention to an encoder's output.

    def _append_encoder_state(self, block: str, row: Tensor) -> None:
        for name, kept in (("key", "keys"), ("value", "values")):
            made = self._heads(self._linear(f"{block}{name}", row))
            self.memory[f"{block}{kept}"].append(round_trip(made, self.precision.cache))

    def _cross_attention(self, block: str, x: Tensor) -> Tensor:
        x = self._normalize(f"{block}attention_norm", x)
        keys, values = (torch.stack(self.memory[f"{block}{name}"]) for name in ("keys", "values"))
        if modules := query_modules_of(self.spec):
            past = self._conv_state(f"{block}shared", self._linear(f"{block}shared", x))
            q = self._convolve(f"{block}query_convolution", past, modules, neighbours=3)
            return attend(self._heads(q), keys, values, self._attention_scale).flatten()
        y = attend(self._heads(self._linear(f"{block}query", x)), keys, values, self._attention_scale)
        return self._linear(f"{block}output", y.flatten())

    # Feed-forward.

    def _feed_forward(self, layer: int, x: Tensor) -> Tensor:
        feed_forward = self.spec.feed_forward
        block = f"blocks.{layer}."
        if feed_forward.kind == "dense":
            h = self._linear(f"{block}up", x)
            gate = self._linear(f"{block}gate", x) if feed_forward.gated else None
            return self._linear(f"{block}down", self._activated(gate, h))
        if feed_forward.kind == "precision":
            return self._precise(layer, x)
        if feed_forward.kind == "spark":
            return self._spark(block, x)
        y = self.weights[f"{block}bias"].values[0] if f"{block}bias" in self.weights else 0.0
        if feed_forward.kind == "selector":
            chosen, weights = self._selected(layer, x), torch.ones(())
            if feed_forward.bypass:
                y = y + self._linear(f"{block}bypass.second", self._linear(f"{block}bypass.first", x))
        elif feed_forward.kind == "sparse":
            chosen, weights = self._controlled(layer, x)
        else:
            chosen, weights = self._routed(block, x)

        up = gemv(self._units(block, chosen, "up"), x)
        gate = gemv(self._units(block, chosen, "gate"), x) if feed_forward.gated else None
        if feed_forward.kind == "mixture" and feed_forward.gate == "probability":  # on what the units read
            h = self._activated(None if gate is None else gate * weights, up * weights)
        else:
            h = self._activated(*self._biased(block, gate, up, chosen)) * weights
        down = self._units(block, chosen, "down")
        return (h * down.scale) @ down.values + y

    def _activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.spec.feed_forward.activation]
        return activation(up) if gate is None else activation(gate) * up

    def _biased(
        self, block: str, gate: Tensor | None, up: Tensor, units: Tensor | slice
    ) -> tuple[Tensor | None, Tensor]:
        """Gate and up of some units with their bias on what enters the activation."""
        if f"{block}unit_bias" not in self.weights:
            return gate, up
        bias = self.weights[f"{block}unit_bias"].values[0, units]
        return (gate, up + bias) if gate is None else (gate + bias, up)

    def _controlled(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Units that the controller chooses, and their weights."""
        feed_forward, block = self.spec.feed_forward, f"blocks.{layer}."
        assert feed_forward.kind == "sparse"
        if not chooses(self.spec, layer):
            return torch.arange(feed_forward.d_ff), torch.ones(())
        z = gemv(self.weights[f"{block}controller.first"], x)
        logits = gemv(self.weights[f"{block}controller.second"], z)
        size = feed_forward.block_size  # packed blocks are filled up
        bias = self.weights[f"{block}controller.bias"].values.view(-1, padded(size, LANES))[:, :size]
        gate = feed_forward.gate == "probability"
        return choose(logits.unflatten(0, (-1, size)) + bias, self.spec.units_per_block(layer), gate)

    def _routed(self, block: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Units of the experts that the router chooses, and their weights."""
        feed_forward = self.spec.feed_forward
        assert feed_forward.kind == "mixture"
        logits = gemv(self.weights[f"{block}router"], x)[None]
        experts, weights = choose(logits, feed_forward.experts_per_token, feed_forward.gate != "none")
        if feed_forward.normalize_probabilities:
            weights = weights / weights.sum()
        size = feed_forward.d_ff // feed_forward.experts
        return (experts[:, None] * size + torch.arange(size)).flatten(), weights.repeat_interleave(size)

    def _selected(self, layer: int, x: Tensor) -> Tensor:
        """Units that a low-bit sketch chooses."""
        feed_forward, block = self.spec.feed_forward, f"blocks.{layer}."
        assert feed_forward.kind == "selector"
        if not chooses(self.spec, layer):
            return torch.arange(feed_forward.d_ff)
        gate, up = self._biased(block, *self._sketched(block, x), slice(None))
        if feed_forward.choice == "positive":
            return (up > self.weights[f"{block}threshold"].values[0]).nonzero()[:, 0]
        return self._best(layer, self._activated(gate, up))

    def _sketched(self, block: str, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gate and up of all units, quantized."""
        feed_forward = self.spec.feed_forward
        assert feed_forward.kind in ("selector", "precision")
        products = quantized_gemv(self.quantized[f"{block}sketch"], x)
        gate, up = products.chunk(2) if feed_forward.gated else (None, products)
        return gate, up

    def _best(self, layer: int, h: Tensor) -> Tensor:
        """The units of each block that add most, for what they give."""
        feed_forward = self.spec.feed_forward
        assert feed_forward.kind in ("selector", "precision")
        scores = h.abs() * self.weights[f"blocks.{layer}.importance"].values[0]
        order = scores.unflatten(0, (-1, feed_forward.block_size)).sort(descending=True, stable=True).indices
        best = order[:, : self.spec.units_per_block(layer)]  # of equal ones the first
        return (best + torch.arange(len(best))[:, None] * feed_forward.block_size).flatten()

    def _precise(self, layer: int, x: Tensor) -> Tensor:
        """All units quantized, the chosen ones refined."""
        feed_forward, block = self.spec.feed_forward, f"blocks.{layer}."
        assert feed_forward.kind == "precision"
        gate, up = self._biased(block, *self._sketched(block, x), slice(None))
        h = self._activated(gate, up)
        y = self.weights[f"{block}bias"].values[0]
        if self.spec.units_per_block(layer):
            chosen = self._best(layer, h) if chooses(self.spec, layer) else torch.arange(feed_forward.d_ff)
            parts = 3 if feed_forward.gated else 2
            more = [self.quantized[f"{block}residual"][chosen * parts + part] for part in range(parts)]
            if gate is not None:
                gate = gate[chosen] + quantized_gemv(more[0], x)
            h[chosen] = self._activated(gate, up[chosen] + quantized_gemv(more[-2], x))
            y = y + h[chosen] @ more[-1].values()[:, : len(x)]
        return quantized_gemv(self.quantized[f"{block}base.down"], h) + y

    def _spark(self, block: str, x: Tensor) -> Tensor:
        """Units whose score lies above the mean by some standard deviations."""
        feed_forward = self.spec.feed_forward
        assert feed_forward.kind == "spark"
        width = feed_forward.predictor_width
        scores = gemv(self.weights[f"{block}predictor"].widened(len(x)), x)
        gate = scores - (scores.mean() + feed_forward.quantile * scores.std())
        kept = (gate > 0).nonzero()[:, 0]
        h = ACTIVATIONS[feed_forward.activation](gate[kept])
        h = h * gemv(self.weights[f"{block}unit_inputs"][kept], x[width:])
        down = self.weights[f"{block}units"][kept]
        return (h * down.scale) @ down.values

    def _units(self, block: str, chosen: Tensor, part: str) -> Weight:
        """One row of each chosen unit; a unit's rows lie side by side."""
        gated = getattr(self.spec.feed_forward, "gated", False)
        parts = ["gate", "up", "down"] if gated else ["up", "down"]
        return self.weights[f"{block}units"][chosen * len(parts) + parts.index(part)]

    # Logits.

    def _head(self, x: Tensor) -> Tensor:
        logits = self._linear("head", x)
        if "head.exact" not in self.weights:
            return logits
        exact = gemv(self.weights["head.exact"], x)
        if "head.bias" in self.weights:
            exact = exact + self.weights["head.bias"].values[0]
        lane_of = torch.arange(len(logits)) // LANES % HEAD_LANES
        count = head_candidates(self.spec, self.precision) // HEAD_LANES
        for lane in range(HEAD_LANES):
            tokens = (lane_of == lane).nonzero()[:, 0]
            best = tokens[logits[tokens].topk(min(count, len(tokens))).indices]
            logits[best] = exact[best]
        return logits
