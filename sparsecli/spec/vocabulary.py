"""The embedding and the logits as data, and the token ids of models with an encoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparsecli.spec.base import Spec, Units, Width, check_multiple

PADDING, END = 0, 1
"""Token ids of every model with an encoder, as in T5."""
START = PADDING
"""The token that every target begins with."""
IGNORED = -100
"""Label of what is not predicted."""


class DenseVocabularySpec(Spec):
    """One row of logits weights per token of the vocabulary."""

    kind: Literal["dense"]
    size: Units
    """Number of tokens."""
    tied: bool = False
    """Use the embedding's table for the logits too."""
    bias: bool = False
    """Bias on the logits."""


class MultiplicativeVocabularySpec(Spec):
    """Sparse loss layer (paper section 3.3): a multiplicative layer from d_model to the vocabulary."""

    kind: Literal["multiplicative"]
    size: Units
    """Number of tokens."""
    modules: Width
    """S: slices of the vocabulary."""

    @model_validator(mode="after")
    def _check(self) -> MultiplicativeVocabularySpec:
        check_multiple("size", self.size, "modules", self.modules)
        return self


VocabularySpec = Annotated[DenseVocabularySpec | MultiplicativeVocabularySpec, Field(discriminator="kind")]
