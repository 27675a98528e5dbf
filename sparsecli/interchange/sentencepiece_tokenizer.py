"""SentencePiece tokenizers, converted to `tokenizers` with the same token ids for any text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecli.console import Failure
from sparsecli.model.files import last_line, read_json
from sparsecli.model.tokenizer import SETTINGS, TOKENIZER

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SENTENCEPIECE_MODEL, ADDED_TOKENS = "tokenizer.model", "added_tokens.json"
SPACE = "▁"
"""The space within pieces."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Kinds of pieces, as numbered in SentencePiece and GGUF."""
BYTE_PAIRS = 2


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """A vocabulary of byte pairs, and the normalization of text."""

    texts: list[str]
    scores: list[float]
    """The higher the score of a piece, the earlier its parts are merged."""
    kinds: list[int]
    prefix: bool = True
    """Add a space before every text."""
    squeezed: bool = False
    """Remove spaces around a text, and repeated ones within it."""
    characters: bytes = b""
    """SentencePiece's compiled table of character replacements."""

    def of(self, *kinds: int) -> list[str]:
        """The pieces of these kinds."""
        return [text for text, kind in zip(self.texts, self.kinds, strict=True) if kind in kinds]


def read_sentencepiece(path: Path) -> tuple[SentencePieceVocabulary, dict[str, Any]]:
    """The vocabulary of a `tokenizer.model`, and settings with the names of its special tokens.

    Raises:
        Failure: it is damaged, or of another kind than byte pairs.
    """
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # the library's own, and the system's
        raise Failure(f"{path}: does not load: {last_line(error)}") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != BYTE_PAIRS:
        raise Failure(f"{path}: is not of byte pairs (BPE); give the model's {TOKENIZER} beside it")
    if not all(isinstance(piece.piece, str) for piece in model.pieces):  # else bytes
        raise Failure(f"{path}: cut short or damaged (a piece is not UTF-8 text); copy it again")
    pieces = SentencePieceVocabulary(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
        normalizer.precompiled_charsmap,
    )
    numbers = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    texts = dict(enumerate(pieces.texts))
    return pieces, {name: texts[number] for name, number in numbers.items() if number in texts}


def convert_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of a Hugging Face folder that has a `tokenizer.model`, see `write_tokenizer`.

    Raises:
        Failure: as `read_sentencepiece`; or a file beside it is damaged.
    """
    pieces, settings = read_sentencepiece(source / SENTENCEPIECE_MODEL)
    for name in ("special_tokens_map.json", SETTINGS):
        settings |= read_json(source / name) if (source / name).is_file() else {}
    added = read_json(source / ADDED_TOKENS) if (source / ADDED_TOKENS).is_file() else {}
    write_tokenizer(pieces, settings, folder, sorted(added, key=added.__getitem__))


def write_tokenizer(
    pieces: SentencePieceVocabulary, settings: dict[str, Any], folder: Path, added: Sequence[str] = ()
) -> None:
    """Write a tokenizer to `folder` as `tokenizer.json` and `tokenizer_config.json`.

    Args:
        settings: a `tokenizer_config.json`; without `add_bos_token`, the first token is added.
        added: tokens after the pieces, in their order.
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = build_tokenizer(pieces)
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    named = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in settings.items()
        if name in ("bos_token", "eos_token")
    }
    first = named.get("bos_token") if settings.get("add_bos_token", True) else None
    last = named.get("eos_token") if settings.get("add_eos_token", False) else None
    around = [token for token in (first, last) if token is not None]
    if around:
        backend.post_processor = TemplateProcessing(
            single=[*([first] if first else []), "$A", *([last] if last else [])],
            special_tokens=[(token, backend.token_to_id(token)) for token in around],
        )
    backend.save(str(folder / TOKENIZER))
    # Not the original's class: that would make normalization and merges anew, in its own way.
    kept = {**settings, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / SETTINGS).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True).save_pretrained(folder)


def build_tokenizer(pieces: SentencePieceVocabulary) -> Tokenizer:
    """The tokenizer. The names of control and byte tokens that occur in a text are never merged into these tokens.

    One text gets other ids than from SentencePiece: that which begins with a user-defined piece, no space before it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {text: number for number, text in enumerate(pieces.texts)}
    scores = dict(zip(pieces.texts, pieces.scores, strict=True))
    unmerged = pieces.of(UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores, skip_tokens=unmerged),
            unk_token=next(iter(pieces.of(UNKNOWN)), None),
            fuse_unk=True,
            byte_fallback=BYTE in pieces.kinds,
        )
    )
    _prepare_text(backend, pieces)
    decoder = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoder, *([decoders.Strip(" ", 1, 0)] if pieces.prefix else [])])
    special = pieces.of(UNKNOWN, CONTROL)
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    whole = pieces.of(USER_DEFINED)
    backend.add_tokens([AddedToken(text, normalized=True, special=False) for text in whole])
    return backend


def _prepare_text(backend: Tokenizer, pieces: SentencePieceVocabulary) -> None:
    """Set the normalizer and the pre-tokenizer."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[normalizers.Normalizer] = []
    if pieces.characters:
        steps.append(normalizers.Precompiled(pieces.characters))
    if pieces.squeezed:
        steps += [
            normalizers.Replace(Regex(f"[ {SPACE}]+"), " "),
            normalizers.Strip(left=not pieces.prefix, right=True),
        ]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    # `Metaspace` puts a space before a text, and not behind special tokens, unless there is a space already, by its
    # own character. Squeezed text may begin with one, which then is that space. Other text keeps its spaces and gets
    # one more: the first step looks for " ", which the normalizer has replaced everywhere.
    scheme = "first" if pieces.prefix else "never"
    ahead = [] if pieces.squeezed else [pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False)]
    scheme = scheme if pieces.squeezed else "never"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*ahead, pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)]
    )
