"""Requests of OpenAI's API, as far as they apply, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 16
MOST_LOGPROBS = 20
MOST_STOPS = 16

Penalty = Annotated[float, Field(ge=-2, le=2)]
Stops = Annotated[list[str], Field(max_length=MOST_STOPS)]


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False
    """Send the numbers of tokens in a last chunk."""


class Request(BaseModel):
    """What both kinds of requests have in common. Unknown fields are refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    """The name that `/v1/models` gives; may be left out."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    """Texts to generate."""
    stream: bool = False
    """Send the text as it grows, as server-sent events."""
    stream_options: StreamOptions | None = None
    stop: str | Stops | None = None
    """Texts that end the generation; they are not sent."""
    seed: int | None = None
    """The same seed gives the same text; a random one without it."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens that the new text has."""
    frequency_penalty: Penalty = 0.0
    """The same, times how often it has them."""
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default={})
    """Added to the logits of tokens."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Not in OpenAI's API: as in `generate`."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Not in OpenAI's API: as in `generate`."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Not in OpenAI's API: as in `generate`."""
    user: Any = None
    """Ignored, as are the next ones: they change no text."""
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def adjust(self, vocabulary: int) -> Callable[[Sequence[int], np.ndarray], np.ndarray] | None:
        """The penalties and biases on logits (V,), by the new tokens so far; None where there are none."""
        biased = {token: bias for token, bias in self.logit_bias.items() if 0 <= token < vocabulary}
        presence, frequency = self.presence_penalty, self.frequency_penalty
        if not (biased or presence or frequency):
            return None
        tokens, values = np.array([*biased], np.int64), np.array([*biased.values()], np.float32)

        def adjusted(new: Sequence[int], logits: np.ndarray) -> np.ndarray:
            scores = logits.copy()
            scores[tokens] += values
            used, counts = np.unique(np.asarray(new, np.int64), return_counts=True)
            scores[used] -= presence + frequency * counts
            return scores

        return adjusted


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    """A text or its token ids; several give several choices each."""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    """New tokens at most; 0 with `echo` only reads the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """Log-probabilities of the tokens, and of so many likeliest ones."""
    echo: bool = False
    """Give the prompt back before the text; with `logprobs` its tokens' as well."""
    best_of: int | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One for each prompt."""
        given: Any = self.prompt
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if single else list(given)

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: must equal n; other values are not supported")
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompt: is empty")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo")
        if self.echo and self.stream:
            raise ValueError("echo: cannot be streamed")
        return self


class Part(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content without its parts."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(BaseModel):
    """`response_format`: only text is supported."""

    type: Literal["text"]


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """New tokens at most; by default as many as there is room for."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: TextFormat | None = None

    @property
    def rounds(self) -> list[dict[str, str]]:
        """The messages as chat templates read them."""
        role = {"developer": "system"}
        return [{"role": role.get(each.role, each.role), "content": each.text} for each in self.messages]
