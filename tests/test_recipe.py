"""Recipes: what is read, every way to be wrong and how it is told, overrides."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsecli.console import RecipeError
from sparsecli.recipe import loader
from sparsecli.recipe.schema import Recipe
from sparsecli.spec.base import Spec

SMALL = """\
description: small
model:
  d_model: 32
  layers: 2
  heads: 4
  max_positions: 64
  feed_forward:
    kind: sparse
    d_ff: 128
    block_size: 16
    rank: 4
  vocabulary:
    kind: dense
    size: 300
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        loader.parse(text, "r.yaml", overrides)
    assert caught.value.exit_code == 2
    return caught.value.message.splitlines()


# -- what is read --------------------------------------------------------------------------------------------


def test_scalars_follow_yaml_1_2():
    train = loader.parse("train: {max_steps: 1_000, learning_rate: 1e-4, weight_decay: 0}", "r.yaml").train
    assert (train.max_steps, train.learning_rate, train.weight_decay) == (1000, 1e-4, 0.0)
    stop = loader.parse("generate: {stop: [no, on, 2020-01-01, 1:30, '1', ~x, 0x10]}", "r.yaml").generate.stop
    assert stop == ["no", "on", "2020-01-01", "1:30", "1", "~x", "0x10"]


def test_anchors_are_allowed():
    recipe = loader.parse("generate: {stop: [&end done, *end]}", "r.yaml")
    assert recipe.generate.stop == ["done", "done"]


def test_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert loader.load(str(path)).recipe.seed == 3


# -- every way to be wrong -----------------------------------------------------------------------------------


def test_all_problems_at_once_in_the_order_of_the_file():
    text = SMALL.replace("layers: 2", "layers: four").replace("kind: dense", "kind: dens") + "sed: 1\n"
    assert problems(text) == [
        "r.yaml:4:3: model.layers: expected a whole number above 0, got 'four'",
        "r.yaml:13:5: model.vocabulary.kind: expected one of dense, multiplicative, got 'dens', "
        "did you mean dense?",
        "r.yaml:15:1: sed: unknown key, did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ("rank: 4", "rnk: 4"),
            "r.yaml:7:3: model.feed_forward.rank: missing, expected a whole number above 0",
        ),
        (
            ("rank: 4", "rnk: 4"),
            "r.yaml:11:5: model.feed_forward.rnk: unknown key for kind: sparse, did you mean rank?",
        ),
        (
            ("    kind: sparse\n", ""),
            "r.yaml:7:3: model.feed_forward.kind: missing, expected one of dense, sparse, selector, precision, "
            "mixture, spark",
        ),
        (
            ("d_ff: 128", "d_ff: 120"),
            "r.yaml:9:5: model.feed_forward.d_ff: 120 is not a multiple of block_size 16; "
            "nearest: 112 and 128",
        ),
        (
            ("heads: 4", "heads: 5"),
            "r.yaml:3:3: model.d_model: 32 is not a multiple of heads 5; nearest: 30 and 35",
        ),
        (("layers: 2", "layers: 2.0"), "r.yaml:4:3: model.layers: expected a whole number above 0, got 2.0"),
        (
            ("layers: 2", "layers: true"),
            "r.yaml:4:3: model.layers: expected a whole number above 0, got true",
        ),
        (("layers: 2", "layers:"), "r.yaml:4:3: model.layers: expected a whole number above 0, got nothing"),
        (
            ("layers: 2", "layers: [2]"),
            "r.yaml:4:3: model.layers: expected a whole number above 0, got a list",
        ),
        (("layers: 2", "layers: 0"), "r.yaml:4:3: model.layers: expected a whole number above 0, got 0"),
        (
            ("layers: 2", f"layers: {'9' * 30}"),
            f"r.yaml:4:3: model.layers: expected a whole number above 0, got '{'9' * 30}'",
        ),
        (("description: small", "description: 5"), "r.yaml:1:1: description: expected text, got 5"),
        (
            ("description: small", "generate: 4"),
            "r.yaml:1:1: generate: expected a block with prompt, max_new_tokens, temperature, top_k, top_p, "
            "min_p, repetition_penalty, stop, got 4",
        ),
        (
            ("description: small", "generate: {top_p: 0}"),
            "r.yaml:1:12: generate.top_p: expected a number above 0 and of at most 1, got 0",
        ),
        (
            ("description: small", "generate: {top_p: 1e999}"),
            "r.yaml:1:12: generate.top_p: expected a number above 0 and of at most 1, got '1e999'",
        ),
        (
            ("description: small", "generate: {stop: [a, 1]}"),
            "r.yaml:1:22: generate.stop[1]: expected text, got 1",
        ),
        (
            ("description: small", "bench: {variants: []}"),
            "r.yaml:1:9: bench.variants: expected a non-empty list of blocks with name, group, "
            "got an empty list",
        ),
        (
            ("description: small", "bench: {variants: [{name: a, group: dens}]}"),
            "r.yaml:1:30: bench.variants[0].group: expected one of dense, sparse, mixture, got 'dens', "
            "did you mean dense?",
        ),
        (
            ("description: small", "train: {max_steps: 1, bf16: yes}"),
            "r.yaml:1:23: train.bf16: expected true or false, got 'yes'",
        ),
        (
            ("description: small", "data: {source: web}"),
            "r.yaml:1:8: data.source: expected one of stdlib, files, hub, copy, digits, images, got 'web'",
        ),
    ],
)
def test_problem(change, line):
    assert change[0] in SMALL
    assert line in problems(SMALL.replace(*change))


MIXTURE = SMALL.replace("    kind: sparse\n", "    kind: mixture\n").replace(
    "    block_size: 16\n    rank: 4\n", "    experts: 8\n    experts_per_token: 2\n"
)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ("d_ff: 128", "d_ff: 100"),
            "r.yaml:9:5: model.feed_forward.d_ff: 100 is not a multiple of experts 8; nearest: 96 and 104",
        ),
        (
            ("experts: 8", "experts: 2"),
            "r.yaml:11:5: model.feed_forward.experts_per_token: 2 of 2 experts leaves none to skip",
        ),
        (
            ("experts: 8", "experts: 1"),
            "r.yaml:10:5: model.feed_forward.experts: expected a whole number of at least 2, got 1",
        ),
        (
            ("experts_per_token: 2", "experts_per_token: 9"),
            "r.yaml:11:5: model.feed_forward.experts_per_token: 9 of 8 experts leaves none to skip",
        ),
        (
            ("experts_per_token: 2", "load_balancing: -1"),
            "r.yaml:11:5: model.feed_forward.load_balancing: expected a number of at least 0, got -1",
        ),
        (
            ("layers: 2", "layers: 2\n  feed_forward_chunk: 16"),
            "r.yaml:5:3: model.feed_forward_chunk: load_balancing counts all tokens at once; set "
            "feed_forward.load_balancing: 0",
        ),
    ],
)
def test_problem_of_a_mixture(change, line):
    assert change[0] in MIXTURE
    assert line in problems(MIXTURE.replace(*change))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            SMALL.replace("layers: 2", "layers: 1000000"),
            "model.layers: 1000000 is more than 1024, the most that is taken",
        ),
        (
            SMALL.replace("max_positions: 64", "max_positions: 99999999999"),
            "model.max_positions: 99999999999 is more than 2147483647, the most that is taken",
        ),
        (
            "data: {source: copy, symbols: 100000000, length: 1000000}",
            "data.symbols: 100000000 is more than 16777216, the most that is taken",
        ),
        (
            "data: {source: stdlib, pairs: {kind: corrupted, source_length: 1000000}}",
            "data.pairs.target_length: 128 is less than the 200026 tokens of a target",
        ),
        (
            "data: {source: stdlib, pairs: {kind: corrupted, noise: 0.9999999999999999}}",
            "data.pairs.target_length: 128 is less than the 641 tokens of a target",
        ),
        ("seed: 4294967296", "seed: 4294967296 is more than 2147483647, the most that is taken"),
    ],
)
def test_numbers_that_no_machine_comes_near(text, line):
    (found,) = problems(text)
    assert found.partition(": ")[2] == line


def test_of_very_many_problems_the_first_are_listed():
    lines = problems("\n".join(f"key{number}: 1" for number in range(5000)))
    assert len(lines) == 51
    assert lines[0].startswith("r.yaml:1:1: key0: unknown key")
    assert lines[-1] == "r.yaml: 4950 more problems"
    assert len(problems("seed: 1\n" * 60)) == 51


def test_check_across_blocks():
    data = "data: {source: stdlib, sequence_length: 65, tokenizer: {kind: bpe, vocabulary_size: 300}}\n"
    assert problems(SMALL + data) == [
        "r.yaml:15:24: data.sequence_length: 65 is longer than model.max_positions 64"
    ]


def test_a_variant_must_fit_the_model():
    bench = (
        "bench:\n  variants:\n  - {name: a, group: dense}\n  - name: b\n    group: sparse\n"
        "    model: {attention: {projection: multiplicative, modules: 5}}\n"
    )
    assert problems(SMALL + bench) == [
        "r.yaml:20:5: bench.variants[1].model: does not fit the recipe's model: "
        "d_model 32 is not a multiple of attention.modules 5; nearest: 30 and 35"
    ]


def test_duplicate_keys_are_refused():
    assert problems("seed: 1\ndescription: x\nseed: 2\n") == [
        "r.yaml:3:1: seed: given twice; the first is on line 1"
    ]


def test_exploring_needs_hard_choices_and_relu():
    refused = "model.feed_forward.explored_fraction: needs hard_fraction: 1.0 and activation: relu"
    for changes in ({}, {"hard_fraction": 1.0, "activation": "silu"}):
        fields = {
            "kind": "sparse",
            "d_ff": 64,
            "block_size": 16,
            "rank": 4,
            "explored_fraction": 0.5,
            **changes,
        }
        given = ", ".join(f"{key}: {value}" for key, value in fields.items())
        (line,) = problems(
            f"model: {{d_model: 32, layers: 1, heads: 2, max_positions: 8, feed_forward: {{{given}}}, "
            "attention: {projection: dense}, vocabulary: {kind: dense, size: 8}}\n"
        )
        assert line.endswith(refused)


def test_stages_of_a_distillation_are_the_teacher_s():
    fields = "max_steps: 1, start_units_per_block: 4, distillation: {teacher: x}"
    assert problems(f"train: {{{fields}}}\n")[-1].endswith(
        "train.start_units_per_block: with a teacher it belongs into train.distillation"
    )


def test_a_colon_without_a_space_is_explained():
    assert problems("seed: 1\nmodel: {kind:dense, d_model: 64}\n")[0] == (
        "r.yaml:2:9: model: 'kind:dense' needs a space after the colon: `kind: dense`"
    )


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!env HOME", "!!binary aGk=", "!!set {a}", "!!map 3"]
)
def test_tags_are_refused(tag):
    (line,) = problems(f"description: {tag}\n")
    assert line.startswith("r.yaml:1:14: description: the tag '")


def test_standard_tags_must_fit():
    assert problems("seed: !!int x") == ["r.yaml:1:7: seed: 'x' does not fit its tag"]
    assert loader.parse("description: !!str 5", "r.yaml").description == "5"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1,\n", "r.yaml:2:1: not YAML: while parsing a flow node, expected the node content"),
        ("a: b: c\n", "r.yaml:1:5: not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 1\n", "r.yaml:2:1: not YAML: expected a single document"),
        ("a: *b\n", "r.yaml:1:4: not YAML: found undefined alias"),
        ("seed: 1\nx: \0\n", r"r.yaml:2:4: the character '\x00' is not allowed"),
        ('"\\UFFFFFFFF"', "r.yaml:1:1: not YAML: an escape or a number is out of range"),
        ('description: "\\ud800"', "r.yaml:1:14: description: contains a lone surrogate"),
        ("[" * 4000, "r.yaml:1:25: not YAML: nested more than 24 deep"),
        ("? [a]\n: 1\n", "r.yaml:1:3: a key must be a word"),
        ("- seed\n", "r.yaml:1:1: expected blocks such as model, data and train, got a list"),
        ("seed\n", "r.yaml:1:1: expected blocks such as model, data and train, got 'seed'"),
        ("", "r.yaml: is empty"),
        ("# only a comment\n", "r.yaml: is empty"),
        ("<<: {seed: 1}\n", "r.yaml:1:1: '<<': unknown key"),
    ],
)
def test_text_that_is_no_recipe(text, line):
    (found,) = problems(text)
    assert found.startswith(line)
    assert len(found) < 400


def test_aliases_cannot_explode():
    rows = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "aliases" in problems("\n".join(rows))[0]
    assert "aliases" in problems("a: &a [*a]")[0]


# -- files ---------------------------------------------------------------------------------------------------


def refusal(reference) -> str:
    with pytest.raises(RecipeError) as caught:
        loader.load(str(reference))
    assert "\n" not in caught.value.message
    return caught.value.message


def test_unreadable_files(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    assert "is a folder" in refusal(tmp_path)
    assert "did you mean" in refusal(tmp_path / "recpe.yaml")
    assert str(tmp_path / "recipe.yaml") in refusal(tmp_path / "recpe.yaml")
    assert "did you mean quickstart?" in refusal("quickstrt")
    assert "did you mean quickstart" in refusal("quickstart.yaml")
    assert "shipped recipes: bench-17b, bench-800m" in refusal("zzz")
    assert "name too long" in refusal("x" * 5000)
    assert "no such recipe" in refusal("")
    assert "no such recipe" in refusal("a\0b")

    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"seed: 1\ndescription: caf\xe9\n")
    assert refusal(latin) == f"{latin}:2:17: not UTF-8 text"
    large = tmp_path / "large.yaml"
    large.write_text("#" * (loader.MAX_BYTES + 1))
    assert "larger than 256 KiB" in refusal(large)


def test_forbidden_file(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "r.yaml"
    path.write_text("seed: 1")
    monkeypatch.setattr(loader.Path, "open", refuse)
    assert refusal(path) == f"{path}: cannot be read: permission denied"


def test_a_shipped_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded = loader.load("quickstart")
    assert (loaded.name, loaded.path) == ("quickstart", loader.shipped()["quickstart"])


def test_require():
    loaded = loader.load("quickstart-convert")
    loader.require(loaded, "convert", "data")
    with pytest.raises(
        RecipeError, match=r"^quickstart-convert\.yaml: this command needs `model:` and `train:` blocks$"
    ):
        loader.require(loaded, "model", "train", "data")
    with pytest.raises(RecipeError, match=r"this command needs a `train:` block$"):
        loader.require(loaded, "train")


# -- overrides -----------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values():
    recipe = loader.parse(
        SMALL, "r.yaml", ["model.layers=3", "generate.stop=[a, b=c]", "seed=5", "model.attention.kernel=5"]
    )
    assert (recipe.model.layers, recipe.seed, recipe.generate.stop) == (3, 5, ["a", "b=c"])
    assert recipe.model.attention.kernel == 5
    assert loader.parse(SMALL, "r.yaml", ["seed=1", "seed=2"]).seed == 2


def test_override_replaces_a_whole_union_member():
    recipe = loader.parse(SMALL, "r.yaml", ["model.feed_forward={kind: dense, d_ff: 64}"])
    assert (recipe.model.feed_forward.kind, recipe.model.feed_forward.d_ff) == ("dense", 64)


def test_override_of_a_kind_alone_says_which_keys_no_longer_fit():
    lines = problems(SMALL, "model.feed_forward.kind=dense")
    assert [line.partition(", expected")[0] for line in lines] == [
        "r.yaml:10:5: model.feed_forward.block_size: unknown key for kind: dense",
        "r.yaml:11:5: model.feed_forward.rank: unknown key for kind: dense",
    ]


def test_override_of_an_architecture_that_is_that_of_another_model():
    assert problems("train: {max_steps: 1, init_from: r}", "model.layers=2") == [
        "override #1 (model.layers): the recipe has no model: block; the architecture is that of train.init_from, r"
    ]


def test_override_reaches_into_lists():
    recipe = loader.load("bench-800m", ["bench.variants.1.model.feed_forward.rank=32"]).recipe
    assert recipe.bench.variants[1].model.feed_forward.rank == 32


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lr=1e-3", "override #1 (train.lr): unknown key, expected one of max_steps, "),
        ("train.max_step=5", "override #1 (train.max_step): unknown key, did you mean max_steps?"),
        (
            "train.max_step=5",
            "override #1 (train.max_step): train.max_steps: missing, expected a whole number",
        ),
        ("model.layers=x", "override #1 (model.layers): expected a whole number above 0, got 'x'"),
        (
            "model.feed_forward={kind: dense, d_ff: x}",
            "override #1 (model.feed_forward): model.feed_forward.d_ff: "
            "expected a whole number above 0, got 'x'",
        ),
        (
            "model.feed_forward={kind: sparse, d_ff: 128, block_size: 16}",
            "override #1 (model.feed_forward): model.feed_forward.rank: missing, expected a whole number",
        ),
        ("seed.x=1", "override #1 (seed.x): seed is 7, not a block"),
        (
            "generate.stop.4=1",
            "override #1 (generate.stop.4): generate.stop is a list; expected a position from 0",
        ),
        (
            "generate.stop.0000009=1",
            "override #1 (generate.stop.0000009): generate.stop is a list; expected a position from 0 to 0",
        ),
        ("layers", "override #1: expected key.path=value, got 'layers'"),
        ("=3", "override #1: expected key.path=value, got '=3'"),
        ("a..b=3", "override #1: expected key.path=value, got 'a..b=3'"),
        ("generate.stop={", "override #1 (generate.stop): not YAML: "),
        ("model.layers=!x 3", "override #1 (model.layers): the tag '!x' is not allowed"),
    ],
)
def test_wrong_override(override, line):
    found = problems("seed: 7\ngenerate: {stop: [a]}\n" + SMALL, override)
    assert any(each.startswith(line) for each in found), found


def test_second_override_is_numbered():
    assert problems(SMALL, "seed=1", "seed=x")[0].startswith("override #2 (seed): ")


def test_options_of_the_command_line():
    options = loader.with_options(Recipe().generate, {"temperature": 0, "stop": ["a"]})
    assert (options.temperature, options.stop, options.top_p) == (0, ["a"], Recipe().generate.top_p)
    with pytest.raises(RecipeError) as caught:
        loader.with_options(options, {"top_p": 0.0, "max_new_tokens": 0})
    assert caught.value.message.splitlines() == [
        "--max-new-tokens: expected a whole number above 0, got 0",
        "--top-p: expected a number above 0 and of at most 1, got 0.0",
    ]


# -- nothing but RecipeError ---------------------------------------------------------------------------------

words = st.sampled_from(
    [
        *Recipe.model_fields,
        "kind",
        "source",
        "dense",
        "sparse",
        "d_ff",
        "tokenizer",
        "variants",
        "paths",
        "bpe",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def only_recipe_errors(text: str, *overrides: str) -> None:
    try:
        recipe = loader.parse(text, "r.yaml", overrides)
    except RecipeError as error:
        message: str | None = error.message
    else:
        message = None
        assert loader.parse(loader.dump(recipe), "dumped.yaml") == recipe
    assert message is None or (message and not re.search(r"Input should|pydantic|valid ", message))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters() | st.sampled_from("[]{}:,-&*!|>'\"%@`#?\\ \n\tU0f"), max_size=60))
def test_any_text(text):
    only_recipe_errors(text)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(words, values, max_size=4))
def test_any_data(data):
    only_recipe_errors(yaml.safe_dump(data))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            ["description", "output", "seed", "model", "model.layers", "model.feed_forward", "bench.variants"]
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.text(max_size=12), min_size=3, max_size=3),
)
def test_any_override(keys, texts):
    only_recipe_errors(SMALL, *(f"{key}={text}" for key, text in zip(keys, texts, strict=False)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=12) | st.from_regex(r"[-+.0-9eE_:~]{1,6}", fullmatch=True))
@example("a\x85b")
@example("1e-4")
@example("no")
def test_any_word_survives_the_round_trip(word):
    recipe = Recipe(description=word)
    assert loader.parse(loader.dump(recipe), "r.yaml").description == word


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_number_survives_the_round_trip(number):
    text = loader.dump(loader.parse(f"train: {{max_steps: 1, learning_rate: {number!r}}}", "r.yaml"))
    assert math.isclose(loader.parse(text, "r.yaml").train.learning_rate, number, rel_tol=0)


# -- closed unions -------------------------------------------------------------------------------------------


def unions(block: type[Spec], path: tuple[str, ...] = (), inside: dict | None = None) -> Iterator[Any]:
    """Every union of blocks below `block`: its path, tag field, tags, and the blocks of a recipe that lead there."""
    for name, field in block.model_fields.items():
        members, here = [], field.annotation
        waiting, is_list, tag = [here], False, field.discriminator
        while waiting:
            each = waiting.pop(0)
            if isinstance(each, type) and issubclass(each, Spec):
                members.append(each)
            for extra in getattr(each, "__metadata__", ()):
                tag = tag or getattr(extra, "discriminator", None)
            is_list = is_list or get_origin(each) is list
            waiting += [inner for inner in get_args(each) if not isinstance(inner, str)]

        def leading(value: object, name: str = name, is_list: bool = is_list) -> dict:
            return {**(inside or {}), name: [value] if is_list else value}

        further = (*path, f"{name}[0]" if is_list else name)
        if callable(tag):  # a model's, where that of text names no kind: see test_vision
            tag = "kind"
        elif len(members) > 1:
            tags = [get_args(member.model_fields[tag].annotation)[0] for member in members]
            yield ".".join(further), tag, tags, leading
        for member in members:
            tagged = len(members) > 1 and tag in member.model_fields
            of_union = {tag: get_args(member.model_fields[tag].annotation)[0]} if tagged else {}
            for place, key, choices, inner in unions(member, further, of_union):
                yield place, key, choices, lambda value, inner=inner, leading=leading: leading(inner(value))


UNIONS = list(unions(Recipe))


def test_unions_are_found():
    places = {place for place, *_ in UNIONS}
    assert {
        "data",
        "data.pairs",
        "model.feed_forward",
        "model.encoder.read_by",
        "convert.attention",
    } <= places
    assert len(UNIONS) >= 12


@pytest.mark.parametrize(("place", "tag", "choices", "blocks"), UNIONS)
def test_every_union_names_its_choices(place, tag, choices, blocks):
    for wrong in ("nonsense", choices[0][:-1] or "x"):
        with pytest.raises(RecipeError) as caught:
            loader.parse(json.dumps(blocks({tag: wrong})), "r")
        (line,) = [line for line in caught.value.message.splitlines() if f" {place}.{tag}: " in line]
        expected = f" {place}.{tag}: expected one of {', '.join(choices)}, got '{wrong}'"
        assert line.partition(expected)[2] in ("", f", did you mean {choices[0]}?"), line


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "100000",
            "(model.attention.lsh.buckets): expected a whole number of at least 2 and of at most 32768 or a non-",
        ),
        (
            "[2, 100000]",
            "buckets): model.attention.lsh.buckets[1]: expected a whole number of at least 2 and of at most 32768, ",
        ),
        (
            "[]",
            "(model.attention.lsh.buckets): expected a whole number of at least 2 and of at most 32768 or a non-",
        ),
        (
            "many",
            "(model.attention.lsh.buckets): expected a whole number of at least 2 and of at most 32768 or a non-",
        ),
    ],
)
def test_a_number_or_a_list_is_one_line(value, message):
    with pytest.raises(RecipeError) as caught:
        loader.load("terraformer-copy-lsh", [f"model.attention.lsh.buckets={value}"])
    assert message in caught.value.message
    assert "\n" not in caught.value.message
