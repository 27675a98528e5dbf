"""Layers and models without stored activations: the same numbers and gradients as those that store them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM, decoder
from sparsecli.model.layers.choices import ChoiceRecord, recorded_choice
from sparsecli.model.layers.feed_forward import DenseFeedForward, SparseFeedForward
from sparsecli.model.layers.positions import AxialPositions, DigitPositions
from sparsecli.model.layers.reversible import Half, plain_stack, reversible_stack
from sparsecli.model.layers.sru import SRU, RecurrentBranch, scan, scan_in_order
from sparsecli.model.layers.token_chunks import in_chunks
from sparsecli.model.tensors import tensor_shapes

VOCABULARY = 96
SPARSE = {"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 6, "hard_fraction": 0.5}
DENSE = {"kind": "dense", "d_ff": 64}
CONVOLVED = {"projection": "multiplicative_conv", "modules": 8}
MODELS: dict[str, dict] = {
    "Reformer's, dense": {
        "feed_forward": DENSE,
        "attention": {"projection": "dense"},
        "merge": "concatenate",
        "positions": "axial",
        "axial": {"shape": [8, 8], "widths": [12, 20]},
    },
    "Terraformer's decoder": {
        "feed_forward": SPARSE,
        "attention": CONVOLVED,
        "attention_layers": 2,
        "positions": "digits",
        "sru": {"layers": 2, "width": 5},
        "vocabulary": {"kind": "multiplicative", "size": VOCABULARY, "modules": 4},
    },
    "in chunks": {
        "feed_forward": SPARSE,
        "attention": CONVOLVED,
        "positions": "rotary",
        "sru": {"width": 5},
        "feed_forward_chunk": 7,
    },
    "one stream": {
        "residual": "single",
        "feed_forward": SPARSE,
        "attention": CONVOLVED,
        "positions": "learned",
        "sru": {"width": 5},
        "feed_forward_chunk": 7,
    },
}

HASHED = {
    "Reformer's, hashed": {
        "feed_forward": SPARSE,
        "attention": {"kind": "lsh", "share_query_key": True, "lsh": {"chunk_length": 4, "rounds": 2}},
        "positions": "rotary",
        "attention_layers": 2,
    }
}  # what attends to some tokens decodes to others than it trains with


def build(name: str, **fields: object) -> ScalingTransformerForCausalLM:
    torch.manual_seed(0)
    shape = {"d_model": 32, "layers": 2, "heads": 4, "max_positions": 64, "residual": "reversible"}
    vocabulary = {"kind": "dense", "size": VOCABULARY}
    config = ScalingTransformerConfig(
        **{**shape, "vocabulary": vocabulary, **(MODELS | HASHED)[name], **fields, "pad_token_id": 0}
    )
    return ScalingTransformerForCausalLM(config).eval()


def prompt(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return found


# Recurrent units


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_the_scan_is_that_of_a_loop(length: int) -> None:
    keep, add = torch.rand(2, length, 3), torch.randn(2, length, 3)
    assert_same(scan(keep, add), scan_in_order(keep, add))


def test_gradients_of_recurrent_units() -> None:
    torch.manual_seed(0)
    layer = SRU(3, torch.tanh).double()
    x, state = torch.randn(2, 5, 3).double(), torch.randn(2, 3).double()
    valid = torch.tensor([[True] * 5, [True, False, True, True, False]])
    assert torch.autograd.gradcheck(
        lambda x, state: layer(x, valid, state), (x.requires_grad_(), state.requires_grad_())
    )


def test_recurrent_units_go_on_from_their_state_and_pass_over_padding() -> None:
    layer, x = SRU(4), torch.randn(2, 9, 4)
    whole, states = layer(x)
    first, held = layer(x[:, :4])
    second, _ = layer(x[:, 4:], state=held[:, -1])
    assert_same(torch.cat((first, second), dim=1), whole)
    padded = torch.cat((x[:, :4], torch.randn(2, 3, 4), x[:, 4:]), dim=1)
    valid = torch.tensor([True] * 4 + [False] * 3 + [True] * 5).expand(2, -1)
    out, passed = layer(padded, valid)
    assert_same(out[:, 7:], whole[:, 4:])
    assert_same(passed[:, 6], states[:, 3])


def test_a_wide_recurrent_state_in_narrow_models() -> None:
    """In bfloat16 a sum over a thousand small steps would stop at a few hundred of them."""
    layer = SRU(2).bfloat16()
    with torch.no_grad():
        layer.projection.weight.zero_()
        layer.projection.bias.copy_(torch.tensor([0.0, 0.0, 7.0, 7.0, 1.0, 1.0]))
        out, states = layer(torch.zeros(1, 4000, 2, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert states[0, -1, 0] > 0.97


# Reversible stacks


def some_halves(width: int = 6, dropout: float = 0.0) -> list[Half]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(4)]
    layers.append(layers[0])  # weights that two halves share
    return [Half(layer, list(layer.parameters()), swap=index != 2) for index, layer in enumerate(layers)]


def run(stack: Callable, halves: list[Half]) -> list[Tensor]:
    """Outputs and all gradients after a seed."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 6, requires_grad=True)
    a, b = stack(halves, x, 2 * x)
    (a.sin().sum() + (b**2).sum()).backward()
    weights = {id(weight): weight for half in halves for weight in half.weights}.values()
    found = [a.detach(), b.detach(), x.grad, *(weight.grad.clone() for weight in weights)]
    for weight in weights:
        weight.grad = None
    return [*found, torch.rand(1)]  # and whoever draws next draws the same


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_reversible_stacks_are_plain_ones(dropout: float) -> None:
    halves = some_halves(dropout=dropout)
    for actual, expected in zip(run(reversible_stack, halves), run(plain_stack, halves), strict=True):
        assert_same(actual, expected)


def test_nothing_but_the_last_pair_is_stored() -> None:
    stored: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        stored.append(x)
        return x

    x = torch.randn(2, 5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        reversible_stack(some_halves(), x, x)
        assert len(stored) == 2
        plain_stack(some_halves(), x, x)
        assert len(stored) > 10


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    halves = some_halves()
    halves[1].weights[0].requires_grad_(False)
    a, b = reversible_stack(halves, torch.randn(2, 5, 6), torch.randn(2, 5, 6))
    (a + b).sum().backward()
    assert halves[1].weights[0].grad is None
    assert halves[1].weights[1].grad is not None


def test_choices_are_made_once() -> None:
    """A reconstructed input is a little off; a choice that follows it would be another one."""
    calls = []

    def function(b: Tensor) -> Tensor:
        def choose() -> Tensor:
            calls.append(1)
            return (b + 0.1 * len(calls) * torch.arange(6)).argmin(dim=-1)  # the second call would differ

        return b * nn.functional.one_hot(recorded_choice(choose, below=6), 6)

    x = torch.zeros(2, 5, 6, requires_grad=True)
    with torch.no_grad():
        x[..., 1] = -0.15
    a, b = reversible_stack([Half(function, [])], x, x)
    (a + b).sum().backward()
    assert len(calls) == 1
    assert torch.equal(x.grad[0, 0], torch.tensor([2.0, 3, 2, 2, 2, 2]))


def test_choices_are_kept_narrow_and_in_order() -> None:
    choices = ChoiceRecord()
    outer = ChoiceRecord()
    with outer.recording(), choices.recording():
        assert recorded_choice(lambda: torch.tensor([255]), below=256) == 255
        assert recorded_choice(lambda: torch.tensor([40000]), below=40001) == 40000
    for kept in (choices, outer):
        with kept.replaying():
            assert [int(recorded_choice(lambda: torch.tensor([0]), below=9)) for _ in range(2)] == [
                255,
                40000,
            ]
    assert [kept.dtype for kept in outer._made] == [torch.uint8, torch.int32]


def test_narrow_streams_are_summed_in_float32() -> None:
    layer = nn.Linear(6, 6).bfloat16()
    halves = [Half(layer, list(layer.parameters()))] * 8
    x = torch.randn(2, 5, 6).bfloat16().requires_grad_()
    a, b = reversible_stack(halves, x, x)
    assert a.dtype == torch.float32
    (a + b).sum().backward()
    reversible, x.grad = x.grad, None
    a, b = plain_stack(halves, x, x)
    (a + b).sum().backward()
    torch.testing.assert_close(reversible, x.grad, atol=1e-2, rtol=1e-2)
    assert reversible.dtype == torch.bfloat16


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_reaches_the_backward_pass(inside: bool) -> None:
    """The second pass must cast as the first did, and find gradients of weights cast without."""
    layer = nn.Linear(6, 6)
    seen = []

    def function(x: Tensor) -> Tensor:
        y = layer(x)
        seen.append(y.dtype)
        return y

    x = torch.randn(2, 5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, b = reversible_stack([Half(function, list(layer.parameters()))], x, x)
        if inside:
            b.sum().backward()
    if not inside:
        b.sum().backward()
    assert seen == [torch.bfloat16] * 2
    assert layer.weight.grad.abs().sum() > 0


# Feed-forward layers in chunks


@pytest.mark.parametrize("tokens", [1, 3, 7, 100])
@pytest.mark.parametrize(
    "layer",
    [
        DenseFeedForward(8, 16),
        SparseFeedForward(8, 16, block_size=4, rank=3, temperature=0.0, hard_fraction=1.0),
    ],
    ids=["dense", "sparse"],
)
def test_chunks_change_no_number(layer: nn.Module, tokens: int) -> None:
    layer.train()
    x = torch.randn(2, 5, 8, requires_grad=True)
    found = []
    for size in (tokens, None):
        y = in_chunks(layer, x, size)
        y.sin().sum().backward()
        found.append([y.detach(), x.grad.clone(), *gradients(layer).values()])
        x.grad = None
    for actual, expected in zip(*found, strict=True):
        assert_same(actual, expected)
    with torch.no_grad():
        assert_same(in_chunks(layer, x, tokens), layer(x))


def test_chunks_draw_and_choose_as_they_did() -> None:
    torch.manual_seed(0)
    layer = SparseFeedForward(8, 16, block_size=4, rank=3, hard_fraction=0.5, dropout=0.3).train()
    x = torch.randn(40, 8)
    found = []
    for chunked in (True, False):
        torch.manual_seed(2)
        y = in_chunks(layer, x, 7) if chunked else torch.cat([layer(chunk) for chunk in x.split(7)])
        y.sin().sum().backward()
        found.append([y.detach(), *gradients(layer).values()])
    for actual, expected in zip(*found, strict=True):
        assert_same(actual, expected)


# Positions


def test_digits_of_positions() -> None:
    layer = DigitPositions(8).eval()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[2, :, 0] = 1  # in base 14
        layer.start.fill_(100)
    digits = layer(torch.tensor([[0, 13, 14, 14**2 * 3 + 14 * 5 + 9]]))[0]
    assert digits.tolist() == [[100] * 8, [13, *[0] * 7], [0, 1, *[0] * 6], [9, 5, 3, *[0] * 5]]


def test_digits_count_from_anywhere_in_training() -> None:
    torch.manual_seed(0)
    layer = DigitPositions(8).train()
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.start.fill_(1000)
    positions = torch.arange(3).expand(4000, 3)
    found = layer(positions)
    assert (found[:, 0] >= 1000).all()  # the first token is known as such wherever it counts from
    from_zero = (found == layer.eval()(positions)).all((1, 2)).float().mean()
    without = (found[:, 1] == 0).all(1).float().mean()
    assert from_zero == pytest.approx(0.495, abs=0.03)
    assert without == pytest.approx(0.01, abs=0.005)


def test_axes_of_positions() -> None:
    layer = AxialPositions([2, 3], [1, 2])
    with torch.no_grad():
        layer.axes[0].copy_(torch.tensor([[10.0], [20.0]]))
        layer.axes[1].copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))
    assert layer(torch.arange(6))[:, :2].tolist() == [[10, 1], [10, 2], [10, 3], [20, 1], [20, 2], [20, 3]]


# Models


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_the_architecture(name: str) -> None:
    model = build(name)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == tensor_shapes(model.config.spec)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, ids = build(name), prompt()
    model.save_pretrained(tmp_path)
    again = ScalingTransformerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_way_to_decode_gives_the_same_logits(name: str) -> None:
    model, ids = build(name), prompt()
    whole = model(ids).logits
    past, steps = None, []
    for chunk in ids.split([5, 1, 1, 2, 1, 1, 1], dim=1):
        output = model(chunk, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    assert_same(torch.cat(steps, dim=1), whole)
    past.crop(-4)  # back to the eighth token, recurrent states as well
    again = model(ids[:, 8:], past_key_values=past, use_cache=True).logits
    assert_same(again, whole[:, 8:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generated_logits_are_those_of_the_whole(name: str, beams: int) -> None:
    model, ids = build(name), prompt()
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_left_padding_changes_nothing(name: str) -> None:
    model, ids = build(name), prompt()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    assert_same(model(padded, attention_mask=mask).logits[:, 3:], model(ids).logits)
    settings = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(ids, **settings)[:, ids.shape[1] :]
    together = model.generate(padded, attention_mask=mask, **settings)[:, padded.shape[1] :]
    assert torch.equal(alone, together)


@pytest.mark.parametrize("name", [*MODELS, *HASHED])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_is_that_of_stored_activations(
    name: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build(name, dropout=dropout).train(), prompt()
    found = []
    for stack in (reversible_stack, plain_stack):
        monkeypatch.setattr(decoder, "reversible_stack", stack)
        torch.manual_seed(3)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert_same(found[0][0], found[1][0])
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][key], atol=1e-5, rtol=1e-4, msg=key)


@torch.no_grad()
def test_two_streams_compile_without_graph_breaks() -> None:
    model, ids = build("Terraformer's decoder", layers=1), prompt()
    assert_same(torch.compile(model, fullgraph=True, backend="eager")(ids).logits, model(ids).logits)


def test_chunks_train_compiled() -> None:
    model, ids = build("one stream", layers=1).train(), prompt()
    found = []
    for trained in (model, torch.compile(model, backend="eager")):
        torch.manual_seed(3)
        trained(ids, labels=ids).loss.backward()
        found.append(gradients(model))
    for key, gradient in found[0].items():
        assert_same(found[1][key], gradient)


def test_there_is_nothing_to_checkpoint() -> None:
    model = build("Terraformer's decoder")
    assert not model.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="does not support"):
        model.activation_checkpointing_enable()


def test_hidden_states_of_two_streams() -> None:
    model, ids = build("Terraformer's decoder"), prompt()
    output = model(ids, output_hidden_states=True)
    assert_same(output.logits, model(ids).logits)
    assert len(output.hidden_states) == 3
    assert_same(model.head(output.hidden_states[-1]), output.logits)
    output.logits.sum().backward()  # also with the stack in pieces


def test_a_branch_without_memory_or_padding_reads_left_to_right() -> None:
    branch = RecurrentBranch(8, 3, 1, "layer", 1e-6)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 3] = torch.randn(8)
    difference = (branch(changed) - branch(x)).abs().sum(-1)[0]
    assert (difference[:3] == 0).all()
    assert (difference[3:] > 0).all()
