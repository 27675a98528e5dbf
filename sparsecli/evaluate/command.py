"""`sparsecli evaluate`: loss, perplexity and bits per byte of a model on text, alone or against another model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sparsecli import console
from sparsecli.console import Failure, progress
from sparsecli.data.corpus import read_files
from sparsecli.evaluate.images import ImageEvaluation, evaluate_images, folder_of_images
from sparsecli.evaluate.losses import engine_token_losses, network_token_losses
from sparsecli.evaluate.result import (
    Difference,
    Evaluation,
    ModelLoss,
    Scored,
    paired_by_text,
    paired_by_window,
)
from sparsecli.evaluate.text import TokenizedText, held_out_documents, tokenize
from sparsecli.generate.backend import open_decoder
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.native_decoder import NativeDecoder
from sparsecli.generate.torch_decoder import TorchDecoder
from sparsecli.interchange.model_folder import model_folder
from sparsecli.model.files import MODEL_TYPE, PACKED, Description, read_description, recipe_of
from sparsecli.model.tokenizer import Tokenizer, read_tokenizer
from sparsecli.recipe.data import CopyTask, ImagesSpec
from sparsecli.recipe.loader import LoadedRecipe, load

DEFAULT_WINDOW = 512


def run(
    loaded: LoadedRecipe | None,
    *,
    model: str | None,
    text: str | None,
    text_field: str,
    window: int | None,
    tokens: int | None,
    against: str | None,
    against_dtype: str | None,
    decoder: DecoderOptions,
    json: bool,
) -> Evaluation | ImageEvaluation:
    """Evaluate the model and print the result. For a model of images that is its loss and accuracy on images.

    The model is `model`, else that of the recipe's run, else of the newest finished run. The text is that of the
    files `text`, else what the recipe, or the recipe of the model's run, holds out.

    Raises:
        Failure: there is no such model or text, the model has an encoder, the text is too short, or a backend lacks
            what the options ask for.
    """
    types = None if text is None and against is None else (MODEL_TYPE,)
    if folder := folder_of_images(model, loaded, types):
        _check_images(text=text, window=window, tokens=tokens, against=against, against_dtype=against_dtype)
        return evaluate_images(folder, loaded, decoder.dtype, json)
    with _opened(model, loaded, decoder) as first:
        documents, label, limit = _documents(loaded, text, text_field, first.folder)
        if tokens is not None:
            limit = tokens
        if against is None:
            length = _window_length(window, [first])
            _, loss = _evaluate(first, tokenize(first.tokenizer, documents, tokens=limit), length, label)
            result = Evaluation(label, length, loss)
        else:
            with _opened(against, None, decoder, against_dtype, is_other=True) as second:
                result = _compare(first, second, documents, limit, window, label)
    result.show(json)
    return result


def _check_images(**given: object) -> None:
    """Raise `Failure` for an option that is for models of text alone."""
    for name in (name for name, value in given.items() if value is not None):
        raise Failure(
            f"--{name.replace('_', '-')}: is for models of text; this is one of images", exit_code=2
        )


# -- models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A model folder and how to run it."""

    reference: str
    folder: Path
    description: Description
    tokenizer: Tokenizer
    options: DecoderOptions

    @property
    def beginning(self) -> list[int]:
        """Tokens that every window begins with: those of an imported model's tokenizer, as in `generate`."""
        return self.tokenizer.beginning if self.description.imported else []


@contextmanager
def _opened(
    reference: str | None,
    loaded: LoadedRecipe | None,
    options: DecoderOptions,
    other_dtype: str | None = None,
    is_other: bool = False,
) -> Iterator[_Opened]:
    """The model: see `model_folder`.

    With `is_other` its weight type is `other_dtype`, else as it is packed, else that of the options.

    Raises:
        Failure: there is no such model, or it has an encoder.
    """
    with model_folder(reference, loaded.output if loaded else None, options.keep, (MODEL_TYPE,)) as folder:
        reference = reference or str(folder)
        description = read_description(folder)
        if description.spec.encoder:
            raise Failure(
                f"{reference}: has an encoder; evaluate reads running text with decoder-only models, and train "
                "reports the held-out loss of pairs"
            )
        if is_other and (other_dtype or (folder / PACKED).is_file()):
            options = replace(options, dtype=None if other_dtype == "auto" else other_dtype)
        tokenizer = read_tokenizer(folder, description.spec.vocabulary.size)
        yield _Opened(reference, folder, description, tokenizer, options)


def _window_length(asked: int | None, models: Sequence[_Opened]) -> int:
    """Tokens of a window. Raises `Failure` where a model's context is shorter than `asked`."""
    shortest = min(models, key=lambda each: each.description.spec.max_positions)
    context = shortest.description.spec.max_positions
    length = min(DEFAULT_WINDOW, context) if asked is None else asked
    if length > context:
        raise Failure(
            f"--window: {length} is longer than the context of {context} tokens of {shortest.reference}",
            exit_code=2,
        )
    least = 1 + max(1, *(len(each.beginning) for each in models))
    if length < least:
        raise Failure(f"--window: expected a whole number of at least {least}, got {length}", exit_code=2)
    return length


# -- text ----------------------------------------------------------------------------------------------------


def _documents(
    loaded: LoadedRecipe | None, text: str | None, text_field: str, folder: Path
) -> tuple[list[str], str, int | None]:
    """Documents, their name for messages, and the recipe's limit of tokens."""
    if text is not None:
        return read_files([text], text_field, "--text"), text, None
    recipe = loaded
    if recipe is None and (stored := recipe_of(folder)):
        recipe = load(str(stored))
    if recipe is None or recipe.recipe.data is None:
        raise Failure("--text: missing; give --text FILE, or a recipe with a data block", exit_code=2)
    data = recipe.recipe.data
    label = f"held-out text of {recipe.path if loaded is None else recipe.name}"
    documents = held_out_documents(data, label)
    return documents, label, None if isinstance(data, CopyTask | ImagesSpec) else data.held_out_tokens


# -- losses --------------------------------------------------------------------------------------------------


def _evaluate(opened: _Opened, text: TokenizedText, length: int, label: str) -> tuple[Scored, ModelLoss]:
    """The losses of a model on windows of `length` tokens."""
    windows = text.windows(length, opened.beginning, label)
    with (
        closing(open_decoder(opened.folder, opened.description, opened.options)) as decoder,
        progress(f"evaluating {opened.reference}", len(windows)) as bar,
    ):
        if isinstance(decoder, NativeDecoder):
            losses = engine_token_losses(decoder.engine, windows, bar)
        else:
            assert isinstance(decoder, TorchDecoder)
            losses = network_token_losses(decoder.network, windows, bar).astype(np.float64)
    scored = Scored(losses, text, windows.stride)
    nats = scored.nats_per_token
    loss = ModelLoss(
        model=opened.reference,
        backend=decoder.name,
        isa=decoder.isa,
        threads=decoder.threads,
        dtype=decoder.dtype,
        cache_dtype=decoder.cache_dtype,
        windows=len(losses),
        tokens=losses.size,
        nats_per_token=nats,
        perplexity=math.exp(nats),
        bits_per_byte=scored.bits_per_byte,
    )
    return scored, loss


def _compare(
    first: _Opened,
    second: _Opened,
    documents: Sequence[str],
    limit: int | None,
    window: int | None,
    label: str,
) -> Evaluation:
    """Both models on the same text; as the same windows where their tokens are equal."""
    length = _window_length(window, [first, second])
    text = tokenize(first.tokenizer, documents, tokens=limit)
    read = text.windows(length, first.beginning, label)
    other_text = tokenize(second.tokenizer, documents, bytes=int(text.ends[len(read) * read.stride - 1]))
    same = first.beginning == second.beginning and text.begins_as(other_text, len(read) * read.stride)
    scored, loss = _evaluate(first, text, length, label)
    other, against = _evaluate(second, text if same else other_text, length, label)
    difference: Difference
    if same:
        difference = paired_by_window(scored, other)
    else:
        console.say(
            "the models read the text as different tokens: their bits per byte are compared, on the same bytes"
        )
        difference = paired_by_text(scored, other)
    return Evaluation(label, length, loss, against, difference)
