"""The routes: OpenAI's API, health, metrics, and a page to chat on."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsecli import __version__
from sparsecli.generate.sampling import TokenLogprobs
from sparsecli.serve.protocol import ChatRequest, CompletionRequest
from sparsecli.serve.requests import Refused, Server, collect, events, usage
from sparsecli.serve.texts import Delta

LARGEST_BODY = 8 << 20
OPEN_PATHS = ("/", "/health")
"""They need no key: the page asks for one, and says nothing itself."""
PAGE = Path(__file__).with_name("page.html")


def _explain(problem: Mapping[str, Any]) -> tuple[str | None, str]:
    """The field of a validator's problem, or None, and a message."""
    parts = [str(part) for part in problem["loc"] if part != "body"]
    text = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return None, f"the body is not JSON: {problem['ctx']['error']} (character {parts[0]})"
    if not parts:
        what = "the body must be a JSON object, with the header Content-Type: application/json"
        return None, text if problem["type"] == "value_error" else what
    where = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        known = [*CompletionRequest.model_fields, *ChatRequest.model_fields]
        near = get_close_matches(parts[-1], known, n=1) if len(parts) == 1 else []
        text = "unknown field" + "".join(f", did you mean {name}?" for name in near)
    return where, f"{where}: {text}"


class Guard:
    """Refuses requests before they are read, and counts answers. Pieces of streams pass it without a queue and a task.

    Args:
        app: what answers.
        refused: the answer to a request that is not read, or None.
        answered: is called with the path and the status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        refused: Callable[[HttpRequest], Response | None],
        answered: Callable[[str, int], None],
    ) -> None:
        self.app, self.refused, self.answered = app, refused, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        http = HttpRequest(scope)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered(http.url.path, message["status"])
            await send(message)

        await (self.refused(http) or self.app)(scope, receive, counted)


def make_app(server: Server, hosts: Sequence[str] | None = None) -> FastAPI:
    """The application.

    Args:
        hosts: names that requests may be sent to; None: any. A page of another site cannot use the server then.
    """
    app = FastAPI(title="sparsecli", version=__version__, docs_url="/docs", redoc_url=None)

    def answered(path: str, status: int) -> None:
        known = path if path in {getattr(route, "path", "") for route in app.routes} else "other"
        server.metrics.requests.labels(known, status).inc()

    def refused(http: HttpRequest) -> Response | None:
        """Why a request is not read: its host, its key, its size."""
        if hosts is not None and http.url.hostname not in hosts:
            return Refused(400, f"unknown host {http.url.hostname!r}", None, "host").response
        if server.api_key is not None and http.url.path not in OPEN_PATHS:
            given = http.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), server.api_key.encode()):
                return Refused(401, "the API key is missing or wrong", None, "invalid_api_key").response
        if http.method == "POST":
            length = http.headers.get("content-length", "")
            if not length.isdigit():
                return Refused(411, "the request has no Content-Length").response
            if int(length) > LARGEST_BODY:
                return Refused(413, f"the request is larger than {LARGEST_BODY >> 20} MiB").response
        return None

    app.add_middleware(Guard, refused=refused, answered=answered)

    @app.exception_handler(Refused)
    async def show(_: HttpRequest, error: Refused) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        found = [_explain(problem) for problem in error.errors()]
        return Refused(400, "; ".join(text for _, text in found), found[0][0]).response

    @app.exception_handler(HTTPException)
    async def other(_: HttpRequest, error: HTTPException) -> Response:
        return Refused(error.status_code, str(error.detail)).response

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        policy = (
            "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        )
        return FileResponse(PAGE, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> dict[str, str]:
        if server.batcher.stopping:
            raise Refused(503, "the server stops")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise Refused(404, f"the model {name!r} does not exist", "model", "model_not_found")
        return card()

    def card() -> dict[str, Any]:
        return {
            "id": server.name,
            "object": "model",
            "created": server.started,
            "owned_by": "sparsecli",
            "max_model_len": server.batcher.capacity,
            "chat": server.template is not None,
        }

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest, http: HttpRequest) -> Response:
        server.check_model(request)
        prompts = [server.encode(prompt) for prompt in request.prompts]
        scored = request.echo and request.logprobs is not None
        choices = server.choices(request, prompts, request.max_tokens, request.logprobs, scored)
        head = server.head("text_completion")
        if request.stream:

            def part(index: int, delta: Delta) -> dict[str, Any]:
                shown = server.completion_logprobs(delta.logprobs) if request.logprobs is not None else None
                return {"index": index, "text": delta.text, "logprobs": shown, "finish_reason": delta.finish}

            return events(choices, head, request, part)
        answers = []
        for index, (choice, whole) in enumerate(zip(choices, await collect(choices, http), strict=True)):
            prompt = choice.text.prompt
            echoed = ""
            if request.echo:
                given = request.prompts[index // request.n]
                echoed = given if isinstance(given, str) else server.tokenizer.backend.decode(prompt)
            found: list[TokenLogprobs | int] = [*([prompt[0]] if scored else []), *whole.logprobs]
            shown = server.completion_logprobs(found) if request.logprobs is not None else None
            answers.append(
                {
                    "index": index,
                    "text": echoed + whole.text,
                    "logprobs": shown,
                    "finish_reason": whole.finish,
                }
            )
        return JSONResponse(head | {"choices": answers, "usage": usage(choices, request.n)})

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: HttpRequest) -> Response:
        server.check_model(request)
        prompt = await server.encode_chat(request)
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
        choices = server.choices(request, [prompt], limit, top)

        def shown(found: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
            return server.chat_logprobs(found) if request.logprobs else None

        if request.stream:

            def part(index: int, delta: Delta) -> dict[str, Any]:
                text = {"content": delta.text} if delta.text else {}
                return {
                    "index": index, "delta": text, "logprobs": shown(delta.logprobs), "finish_reason": delta.finish,
                }  # fmt: skip

            first = [
                {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                for index in range(request.n)
            ]
            return events(choices, server.head("chat.completion.chunk"), request, part, first)
        answers = [
            {
                "index": index,
                "message": {"role": "assistant", "content": whole.text, "refusal": None},
                "logprobs": shown(whole.logprobs),
                "finish_reason": whole.finish,
            }
            for index, whole in enumerate(await collect(choices, http))
        ]
        return JSONResponse(
            server.head("chat.completion") | {"choices": answers, "usage": usage(choices, request.n)}
        )

    return app
