"""Requests: what they ask for, which of them are refused, and their texts on the way back to the client."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from sparsecli.console import Failure
from sparsecli.generate.batcher import Batcher, Full
from sparsecli.generate.chat import TemplateProcess
from sparsecli.generate.sampling import TokenLogprobs
from sparsecli.model.tokenizer import Tokenizer
from sparsecli.serve.metrics import Metrics
from sparsecli.serve.protocol import ChatRequest, Request
from sparsecli.serve.texts import Broken, Choice, Delta, Inbox, seeds

STATUS = {"timeout": 504, "stopping": 503, "error": 500, "cancelled": 499}


class Refused(Exception):
    """A request that is not answered: its HTTP status, and what is wrong in which field."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        code: str | None = None,
        retry_after: int = 0,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    @property
    def response(self) -> Response:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


@dataclass
class Server:
    """A model that is served, and what all requests share.

    Attributes:
        name: of the model, in `/v1/models` and in requests.
        special: whether texts begin with what the tokenizer puts before them (imported models).
        api_key: that clients must send; None: none.
        seconds: a request may take.
    """

    name: str
    batcher: Batcher
    tokenizer: Tokenizer
    vocabulary: int
    special: bool
    metrics: Metrics
    api_key: str | None = None
    seconds: float = 600.0
    template: TemplateProcess | None = None
    inbox: Inbox | None = None  # made in the event loop, with the first request
    started: int = field(default_factory=lambda: int(time.time()))

    # -- requests ---------------------------------------------------------------------------------------------

    def check_model(self, request: Request) -> None:
        """Raises Refused for the name of another model."""
        if request.model not in ("", self.name):
            raise Refused(
                404, f"the model {request.model!r} does not exist; this server has {self.name!r}", "model",
                "model_not_found",
            )  # fmt: skip

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt. Raises Refused where there are none, or tokens that the model does not have."""
        if isinstance(prompt, str):
            try:
                prompt = self.tokenizer.encode(prompt, special=self.special)
            except Failure as failure:
                raise Refused(400, failure.message, "prompt") from None
        if not prompt or not all(0 <= token < self.vocabulary for token in prompt):
            raise Refused(400, f"the prompt is empty, or has tokens beyond {self.vocabulary - 1}", "prompt")
        return prompt

    async def encode_chat(self, request: ChatRequest) -> list[int]:
        """Token ids of a chat up to the start of the answer. Raises Refused where the template fails."""
        if self.template is None:
            raise Refused(
                400, "the model has no chat template; use /v1/completions, which continues a text", "messages"
            )
        try:
            text = await asyncio.to_thread(self.template.render, request.rounds)
            return self.tokenizer.encode(text, names_are_text=False)
        except Failure as failure:
            raise Refused(
                400, failure.message.removesuffix("; --no-template leaves it out"), "messages"
            ) from None

    def choices(
        self,
        request: Request,
        prompts: Sequence[list[int]],
        limit: int | None,
        top_logprobs: int | None,
        prompt_logprobs: bool = False,
    ) -> list[Choice]:
        """`request.n` texts for each prompt, on their way. Raises Refused where there is no room for them."""
        longest = max(map(len, prompts))
        if longest >= self.batcher.capacity:
            raise Refused(
                400,
                f"the prompt has {longest} tokens, and the context of {self.batcher.capacity} needs room for a new one",
                "prompt",
                "context_length_exceeded",
            )
        adjust = request.adjust(self.vocabulary)
        self.inbox = self.inbox or Inbox()
        found = [
            Choice(
                self.batcher,
                self.inbox,
                self.tokenizer,
                request,
                prompt,
                self.batcher.capacity if limit is None else limit,
                seed,
                self.seconds,
                adjust,
                top_logprobs,
                prompt_logprobs,
            )
            for prompt in prompts
            for seed in seeds(request.seed, request.n)
        ]
        if len(found) > len(self.batcher.slots.all) + self.batcher.queue:
            raise Refused(400, f"{len(found)} texts in one request are more than this server holds", "n")
        try:
            self.batcher.submit([choice.text for choice in found])
        except Full as full:
            status = 503 if self.batcher.stopping else 429
            raise Refused(status, str(full), None, "queue_full", full.retry_after) from None
        return found

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer begins with."""
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    # -- tokens in answers ------------------------------------------------------------------------------------

    def token_name(self, token: int) -> str:
        """A token as text; as its bytes where they are no whole characters."""
        raw = self.tokenizer.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def completion_logprobs(self, found: Sequence[TokenLogprobs | int], at: int = 0) -> dict[str, Any]:
        """`logprobs` of a completion; a token without a probability, the first of a prompt, is given as its id."""
        answer: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for each in found:
            token = each if isinstance(each, int) else each.token
            name = self.token_name(token)
            known = None if isinstance(each, int) else each
            answer["tokens"].append(name)
            answer["token_logprobs"].append(known.logprob if known else None)
            top = {self.token_name(token): value for token, value in known.top} if known else None
            answer["top_logprobs"].append(top)
            answer["text_offset"].append(at)
            at += len(name)
        return answer

    def chat_logprobs(self, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """`logprobs` of a chat."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self.token_name(token),
                "logprob": logprob,
                "bytes": [*self.tokenizer.bytes_of(token)],
            }

        return {
            "content": [
                entry(each.token, each.logprob) | {"top_logprobs": [entry(*pair) for pair in each.top]}
                for each in found
            ],
            "refusal": None,
        }


def usage(choices: Sequence[Choice], count: int) -> dict[str, Any]:
    """Numbers of tokens; a prompt with `count` choices counts once."""
    prompt = sum(len(choice.text.prompt) for choice in choices[::count])
    new = sum(choice.new_tokens for choice in choices)
    reused = sum(choice.text.reused for choice in choices[::count])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


@dataclass
class Whole:
    """A text that has ended."""

    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str = "stop"


async def collect(choices: Sequence[Choice], http: HttpRequest) -> list[Whole]:
    """All texts, once all have ended; when the client goes they are cancelled.

    Raises:
        Refused: one of them ended before its time.
    """

    async def whole(choice: Choice) -> Whole:
        found = Whole()
        async with aclosing(choice.deltas()) as deltas:
            async for delta in deltas:
                found.text += delta.text
                found.logprobs.extend(delta.logprobs)
                found.finish = delta.finish or found.finish
        return found

    async def gone() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(0.1)

    texts = asyncio.gather(*map(whole, choices))
    watcher = asyncio.create_task(gone())
    try:
        await asyncio.wait((texts, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not texts.done():
            raise Refused(STATUS["cancelled"], "the client is gone")
        return list(await texts)
    except Broken as broken:
        raise refusal(broken) from None
    finally:
        watcher.cancel()
        texts.cancel()
        for choice in choices:
            choice.batcher.cancel(choice.text)


def refusal(broken: Broken) -> Refused:
    """The error that a client sees of a text that ended before its time."""
    words = {"timeout": "the request took longer than this server allows", "stopping": "the server stops"}
    return Refused(STATUS[broken.finish], words.get(broken.finish) or str(broken), None, broken.finish)


async def merged(choices: Sequence[Choice]) -> AsyncGenerator[tuple[int, Delta]]:
    """The deltas of all texts as they come, with the index of their choice. Raises Broken."""
    if len(choices) == 1:  # no tasks and no second queue, which cost as much as everything else
        async with aclosing(choices[0].deltas()) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

    async def forward(index: int, choice: Choice) -> None:
        try:
            async with aclosing(choice.deltas()) as deltas:
                async for delta in deltas:
                    queue.put_nowait((index, delta))
        except Broken as broken:
            queue.put_nowait((index, broken))

    tasks = [asyncio.create_task(forward(index, choice)) for index, choice in enumerate(choices)]
    try:
        left = len(choices)
        while left:
            index, delta = await queue.get()
            if isinstance(delta, Exception):
                raise delta
            left -= delta.finish is not None
            yield index, delta
    finally:
        for task in tasks:
            task.cancel()
        for choice in choices:
            choice.batcher.cancel(choice.text)


def events(
    choices: Sequence[Choice],
    head: dict[str, Any],
    request: Request,
    part: Callable[[int, Delta], dict[str, Any]],
    first: Sequence[dict[str, Any]] = (),
) -> StreamingResponse:
    """The texts as server-sent events: a chunk for each delta that shows something."""
    with_usage: dict[str, Any] = {"usage": None} if request.includes_usage else {}

    async def lines() -> AsyncIterator[str]:
        for chunk in first:
            yield sent(head | {"choices": [chunk]} | with_usage)
        try:
            async with aclosing(merged(choices)) as deltas:
                async for index, delta in deltas:
                    if delta.text or delta.logprobs or delta.finish:
                        yield sent(head | {"choices": [part(index, delta)]} | with_usage)
        except Broken as broken:
            yield sent(refusal(broken).body)
            return
        if request.includes_usage:
            yield sent(head | {"choices": [], "usage": usage(choices, request.n)})
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def sent(chunk: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
