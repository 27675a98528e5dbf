"""The server: OpenAI's API over HTTP, batches of texts, limits, and a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from sparsecli.console import Failure
from sparsecli.data.tokenization import load_or_train
from sparsecli.decode.engine import Engine
from sparsecli.decode.native import binding
from sparsecli.generate.batcher import Batcher, Event, Full, Text
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.native_decoder import open_engine
from sparsecli.generate.sampling import logprobs_of, make_sampler
from sparsecli.generate.slots import LEAST_SHARED, Slots, common
from sparsecli.model import ScalingTransformerConfig, ScalingTransformerForCausalLM
from sparsecli.model.files import read_description
from sparsecli.model.tokenizer import read_tokenizer
from sparsecli.recipe.data import FilesCorpus
from sparsecli.recipe.schema import GenerateSpec
from sparsecli.serve import command
from sparsecli.serve.protocol import CompletionRequest
from sparsecli.serve.requests import refusal
from sparsecli.serve.texts import Broken, Choice, Inbox

pytestmark = pytest.mark.skipif(
    binding.available() is not None, reason=f"native engine: {binding.available()}"
)
CONTEXT = 160
WORDS = "def read_file(path):\n    return open(path).read()\n\nnaïve = 'žluťoučký kůň 🐎'\n"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer and a chat template. It never ends a text by itself."""
    place = tmp_path_factory.mktemp("serve") / "tiny" / "model"
    data = FilesCorpus(
        source="files", paths=["-"], tokenizer={"kind": "bpe", "vocabulary_size": 300}, sequence_length=16
    )
    tokenizer = load_or_train(data, [WORDS] * 3, place.parent / "cache")
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    config = ScalingTransformerConfig(
        d_model=32,
        layers=2,
        heads=4,
        max_positions=CONTEXT,
        feed_forward={"kind": "sparse", "d_ff": 64, "block_size": 8, "rank": 4},
        vocabulary={"kind": "dense", "size": 300, "tied": True},
        eos_token_id=None,
    )
    ScalingTransformerForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


class Process:
    """`sparsecli serve` in a process of its own, and a client."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sparsecli", "serve", "--model", str(folder), "--port=0", "--threads=1", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stderr
        line = self.process.stderr.readline()
        found = re.search(r"serving (\S+) at (http://\S+) ", line)
        assert found, line + self.process.stderr.read()
        self.name, self.url = found[1], found[2]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str = "completions", **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json=body)

    def metric(self, name: str) -> float:
        found = re.search(rf"^sparsecli_{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.M)
        assert found, name
        return float(found[1])

    def end(self) -> tuple[int, str]:
        """SIGTERM: the exit code, and what it said."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    started = Process(folder, "--slots", "3")
    yield started
    assert started.end() == (0, "stopped\n")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return open_engine(folder, read_description(folder), DecoderOptions(threads=1))


@pytest.fixture(scope="module")
def greedy(folder: Path, engine: Engine) -> Callable[[str, int], str]:
    """What single steps of the engine give."""
    tokenizer = read_tokenizer(folder, 300)

    def text(prompt: str, count: int) -> str:
        ids = tokenizer.encode(prompt)
        sequence = engine.sequence(CONTEXT)
        tokens = [int(engine.prefill(sequence, ids).argmax())]
        while len(tokens) < count:
            tokens.append(int(engine.step(sequence, tokens[-1]).argmax()))
        stream = tokenizer.stream(ids)
        return "".join(map(stream.feed, tokens)) + stream.flush()

    return text


# -- answers -------------------------------------------------------------------------------------------------


def test_texts_in_one_batch_are_those_of_single_steps(
    server: Process, greedy: Callable[[str, int], str]
) -> None:
    """More clients than slots, with prompts of all lengths."""
    prompts = [(WORDS * 3)[: 3 + 17 * index] for index in range(8)]
    counts = [5 + 3 * index for index in range(8)]

    def ask(index: int) -> str:
        answer = server.post(prompt=prompts[index], max_tokens=counts[index], temperature=0)
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        return str(choice["text"])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert found == [greedy(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]


def test_the_official_client(server: Process, greedy: Callable[[str, int], str]) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == [server.name] == ["tiny"]
    expected = greedy("def read", 12)
    whole = client.completions.create(model="tiny", prompt="def read", max_tokens=12, temperature=0)
    assert whole.choices[0].text == expected
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        len(client.completions.create(model="tiny", prompt="def read", max_tokens=0, echo=True, logprobs=0)
            .choices[0].logprobs.tokens),
        12,
    )  # fmt: skip
    chunks = client.completions.create(
        model="tiny", prompt="def read", max_tokens=12, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected

    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "read"}]
    told = greedy("<system>Be brief.\n<user>read\n<assistant>", 9)
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, temperature=0)
    assert chat.choices[0].message.content == told
    streamed = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, temperature=0, stream=True, logprobs=True,
        top_logprobs=2, stream_options={"include_usage": True},
    )  # fmt: skip
    text, tokens, used = "", [], None
    for chunk in streamed:
        used = chunk.usage or used
        for choice in chunk.choices:
            text += choice.delta.content or ""
            tokens += choice.logprobs.content if choice.logprobs else []
    assert (text, used.completion_tokens, len(tokens)) == (told, 9, 9)
    assert all(token.top_logprobs[0].logprob >= token.logprob for token in tokens)
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == told


def test_logprobs_of_a_prompt_are_the_model_s(server: Process, folder: Path, engine: Engine) -> None:
    """What lm-evaluation-harness asks for: the prompt as token ids, echoed, with the likeliest tokens."""
    ids = read_tokenizer(folder, 300).encode(WORDS)
    answer = server.post(prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True).json()["choices"][0]
    rows = engine.logits(engine.sequence(CONTEXT), ids).astype(np.float64)
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    found = answer["logprobs"]
    assert found["token_logprobs"][0] is None
    expected = [*logprobs[np.arange(len(ids) - 1), ids[1:]], logprobs[-1].max()]
    np.testing.assert_allclose(found["token_logprobs"][1:], expected, atol=1e-5)
    for top, row in zip(found["top_logprobs"][1:], logprobs, strict=True):
        assert [*top.values()] == pytest.approx([row.max()], abs=1e-5)
    assert "".join(found["tokens"][:6]) == answer["text"][: sum(map(len, found["tokens"][:6]))]
    assert found["text_offset"][3] == sum(map(len, found["tokens"][:3]))


def test_choices_and_seeds(server: Process) -> None:
    asked = {"prompt": ["def read", "return"], "n": 3, "max_tokens": 8, "temperature": 1.5}
    first, again, other = (server.post(**asked, seed=seed).json() for seed in (5, 5, 6))
    texts = [[choice["text"] for choice in answer["choices"]] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 3
    assert [choice["index"] for choice in first["choices"]] == list(range(6))
    assert first["usage"]["completion_tokens"] == 48
    unseeded = [server.post(**asked).json()["choices"][0]["text"] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_stop_strings_end_a_text_and_are_not_sent(server: Process, greedy: Callable[[str, int], str]) -> None:
    whole = greedy("def read", 30)
    stop = whole[10:13]
    answer = server.post(prompt="def read", max_tokens=30, temperature=0, stop=[stop, "never"]).json()
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    lines = server.post(prompt="def read", max_tokens=30, temperature=0, stop=stop, stream=True).text
    chunks = [json.loads(line[6:]) for line in lines.split("\n\n") if line and not line.endswith("[DONE]")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_penalties_and_biases() -> None:
    request = CompletionRequest(
        prompt="x", presence_penalty=0.5, frequency_penalty=0.25, logit_bias={2: 3.0, 99: 1.0}
    )
    adjust = request.adjust(vocabulary=4)
    assert adjust
    logits = np.zeros(4, np.float32)
    assert adjust([1, 1, 2], logits).tolist() == [0, -1.0, 3 - 0.75, 0]
    assert not logits.any()
    assert CompletionRequest(prompt="x").adjust(4) is None


def test_counters(server: Process) -> None:
    names = (
        "new_tokens_total",
        "token_seconds_count",
        "first_token_seconds_count",
        'texts_total{finish="length"}',
    )
    before = [server.metric(name) for name in names]
    server.post(prompt="def read", max_tokens=7)
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [7, 6, 1, 1]
    assert (server.metric("active_texts"), server.metric("waiting_texts")) == (0, 0)


def test_what_a_text_began_with_is_kept(server: Process) -> None:
    before = server.metric("reused_tokens_total")
    for end in ("path", "file"):
        answer = server.post(prompt=WORDS + WORDS + end, max_tokens=2).json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 40
    assert server.metric("reused_tokens_total") >= before + cached


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ""}, 400, "prompt: is empty|the prompt is empty"),
        ({"prompt": [1, 2, 300]}, 400, "tokens beyond 299"),
        ({"prompt": "x", "model": "gpt-4"}, 404, "the model 'gpt-4' does not exist; this server has 'tiny'"),
        ({"prompt": "x", "tools": []}, 400, "tools: unknown field"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature: .* greater than or equal to 0"),
        ({"prompt": "x", "n": 100}, 400, "n: .* less than or equal to 16"),
        ({"prompt": "x", "best_of": 3}, 400, "best_of: must equal n"),
        ({"prompt": "x" * 900}, 400, "the context of 160 needs room for a new one"),
        ({"prompt": ["x"] * 90}, 400, "90 texts in one request are more"),
        ({"prompt": "x", "temprature": 1}, 400, "temprature: unknown field, did you mean temperature"),
        ({}, 400, "prompt: Field required"),
    ],
)
def test_bad_requests_get_one_line(server: Process, body: dict[str, Any], status: int, message: str) -> None:
    answer = server.post(**body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert re.search(message, error["message"])
    assert error["type"] == "invalid_request_error"


def test_bad_http(server: Process) -> None:
    for body, kind, message in (
        (b"{", "application/json", "the body is not JSON: Expecting property name"),
        (b"", "application/json", "must be a JSON object"),
        (b"[]", "application/json", "must be a JSON object"),
        (b'{"prompt": "x"}', "text/plain", "with the header Content-Type: application/json"),
    ):
        refused = server.http.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    assert server.http.get("/v1/nothing").status_code == 404
    assert server.http.get("/v1/completions").json()["error"]["message"] == "Method Not Allowed"
    assert server.http.get("/health", headers={"Host": "evil.example"}).status_code == 400
    large = server.http.post("/v1/completions", content=b" " * ((8 << 20) + 1))
    assert (large.status_code, large.json()["error"]["message"]) == (413, "the request is larger than 8 MiB")
    chunked = server.http.post("/v1/completions", content=iter([b"{}"]))
    assert chunked.status_code == 411
    picture = [{"role": "user", "content": [{"type": "image_url"}]}]
    assert server.post("chat/completions", messages=picture).status_code == 400


def test_a_key_a_short_queue_and_a_clean_end(folder: Path) -> None:
    server = Process(folder, "--api-key", "secret", "--slots", "1", "--queue", "1", "--name", "mine")
    assert server.http.get("/health").json() == {"status": "ok"}
    assert "<title>sparsecli</title>" in server.http.get("/").text
    for path in ("/v1/models", "/metrics"):
        assert server.http.get(path).status_code == 401
    server.http.headers["Authorization"] = "Bearer secret"
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "mine"
    many = {"prompt": "x", "max_tokens": 150}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.post(**many), range(12)))
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert server.end() == (0, "stopped\n")


@pytest.mark.parametrize(("finish", "status"), [("timeout", 504), ("stopping", 503), ("error", 500)])
def test_texts_that_break_off_have_a_status(finish: str, status: int) -> None:
    refused = refusal(Broken(finish, "why"))
    assert (refused.status, refused.body["error"]["code"]) == (status, finish)
    assert refused.body["error"]["type"] == "server_error"


def test_running_texts_end_before_the_server_does(folder: Path) -> None:
    server = Process(folder)
    received = []
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 140, "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        received.append(next(lines))
        server.process.send_signal(signal.SIGTERM)
        received += [line for line in lines if line]
    assert received[-1] == "data: [DONE]"
    assert json.loads(received[-2][6:])["choices"][0]["finish_reason"] == "length"
    _, said = server.process.communicate(timeout=60)
    assert (server.process.returncode, said) == (0, "stopped\n")


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0: other machines could use the server; give --api-key", 2),
        (
            {"host": "203.0.113.7", "api_key": "k"},
            "--host 203.0.113.7 --port 0: .*; choose another address",
            1,
        ),
        ({"context": 1000}, "--context: 1000 is longer than the model's context of 160", 2),
        ({"model": "no/such"}, "no/such", 1),
    ],
)
def test_what_cannot_be_served(folder: Path, options: dict[str, Any], message: str, code: int) -> None:
    given = {
        "model": str(folder), "name": None, "host": "127.0.0.1", "port": 0, "api_key": None, "slots": 1,
        "context": None, "queue": 1, "seconds": 1.0, "grace": 1.0, "decoder": DecoderOptions(threads=1),
    }  # fmt: skip
    given |= options
    with pytest.raises(Failure, match=message) as failure:
        command.run(given.pop("model"), **given)
    assert failure.value.exit_code == code


# -- the batcher ---------------------------------------------------------------------------------------------


class Answer:
    """A text for the batcher, and its events."""

    def __init__(self, prompt: Sequence[int], limit: int, seconds: float = 60.0) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        sampler = make_sampler(GenerateSpec(temperature=0), 0)
        self.text = Text([*prompt], limit, sampler, self._emit, time.monotonic() + seconds)

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        if event.finish:
            self.ended.set()

    @property
    def finish(self) -> str | None:
        assert self.ended.wait(30)
        return self.events[-1].finish

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    made = Batcher(engine, 2, CONTEXT, 4, frozenset({299}))
    yield made
    made.stop(0)


def test_cancelled_and_late_texts_leave_their_slots(batcher: Batcher) -> None:
    slow = [Answer([1, 2, 3], 150) for _ in range(3)]
    late = Answer([4, 5], 150, seconds=0.0)
    batcher.submit([answer.text for answer in (*slow, late)])
    batcher.cancel(slow[0].text)
    batcher.cancel(slow[2].text)
    assert [answer.finish for answer in (*slow, late)] == ["cancelled", "length", "cancelled", "timeout"]
    assert len(slow[0].tokens) < 150
    assert len(slow[1].tokens) == 150
    after = Answer([1, 2, 3], 5)
    batcher.submit([after.text])
    assert (after.finish, after.tokens) == ("length", slow[1].tokens[:5])
    assert not any(slot.busy for slot in batcher.slots.all)


def test_a_full_queue_takes_all_of_a_request_or_none(batcher: Batcher) -> None:
    texts = [Answer([1], 100) for _ in range(7)]
    with pytest.raises(Full) as full:
        batcher.submit([answer.text for answer in texts])
    assert full.value.retry_after >= 1
    batcher.submit([answer.text for answer in texts[:6]])
    assert {answer.finish for answer in texts[:6]} == {"length"}
    assert not texts[6].events


def test_texts_that_wait_when_the_server_stops_are_told(engine: Engine) -> None:
    batcher = Batcher(engine, 1, CONTEXT, 4, frozenset())
    texts = [Answer([1], 150) for _ in range(3)]
    batcher.submit([answer.text for answer in texts])
    batcher.stop(0)
    assert {answer.finish for answer in texts} <= {"length", "stopping"}
    assert texts[2].finish == "stopping"
    with pytest.raises(Full):
        batcher.submit([Answer([1], 1).text])


def test_an_error_of_the_engine_ends_texts_and_not_the_server(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(batcher.engine, "advance", lambda *_: 1 / 0)
        broken = Answer([1, 2], 5)
        batcher.submit([broken.text])
        assert (broken.finish, broken.events[-1].message) == ("error", "division by zero")
    fine = Answer([1, 2], 5)
    batcher.submit([fine.text])
    assert fine.finish == "length"


def test_pieces_of_prompts_follow_texts_that_never_grew_without_prompts_beside_them(batcher: Batcher) -> None:
    batcher._measure(0.005, growing=1, read=0)
    piece = 0
    for _ in range(20):  # a pass takes 4 ms and 1 ms a token: 12 ms for 8 texts without a prompt
        piece = batcher._piece(8)
        batcher._measure(0.004 + 0.001 * (8 + piece), growing=8, read=piece)
    assert piece == 16  # not the 8 of one text's step


def test_texts_are_told_together_once_all_have_their_tokens(engine: Engine) -> None:
    order: list[str] = []

    def sampler(tokens: Sequence[int], row: np.ndarray) -> int:
        order.append("sampled")
        return 1

    batcher = Batcher(engine, 2, CONTEXT, 4, frozenset())
    late = time.monotonic() + 60
    batcher.submit([Text([1, 2], 3, sampler, lambda event: order.append("told"), late) for _ in range(2)])
    batcher.stop(30)
    a_pass = ["sampled"] * 2 + ["told"] * 2
    assert order == a_pass * 3 + ["told"] * 2  # and how each ended


def test_the_event_loop_wakes_up_once_for_all_events_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deliver() -> tuple[int, list[Event]]:
        woken: list[Callable[[], None]] = []
        inbox, queue = Inbox(), asyncio.Queue[Event]()
        monkeypatch.setattr(inbox.loop, "call_soon_threadsafe", woken.append)
        for _ in range(2):  # passes
            for token in range(3):
                inbox.put(queue, Event(token))
            woken[-1]()
        return len(woken), [queue.get_nowait() for _ in range(queue.qsize())]

    assert asyncio.run(deliver()) == (2, [Event(token) for token in (0, 1, 2, 0, 1, 2)])


def test_events_that_have_arrived_do_not_hold_up_the_event_loop() -> None:
    """Or nothing would notice that a client has gone, before all of its text is written."""

    async def turns() -> list[int]:
        choice = Choice.__new__(Choice)
        choice.events, choice.new_tokens = asyncio.Queue(), 0
        choice.builder = SimpleNamespace(feed=lambda token: ("x", False), end=lambda: ("", False))
        choice.batcher, choice.text = SimpleNamespace(cancel=lambda text: None), None
        for event in (Event(1), Event(2), Event(3), Event(finish="length")):
            choice.events.put_nowait(event)
        others: list[int] = []

        async def other() -> None:
            while True:
                others.append(0)
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        seen = [len(others) async for _ in choice.deltas()]
        task.cancel()
        return seen

    assert asyncio.run(turns()) == [1, 2, 3, 4]


def test_an_end_token_is_not_part_of_the_text(engine: Engine) -> None:
    first = Answer([1, 2], 5)
    batcher = Batcher(engine, 1, CONTEXT, 4, frozenset())
    batcher.submit([first.text])
    assert first.finish == "length"
    batcher.end_tokens = frozenset({first.tokens[2]})
    second = Answer([1, 2], 5)
    batcher.submit([second.text])
    assert second.finish == "end"
    assert second.tokens == first.tokens[: first.tokens.index(first.tokens[2])]
    batcher.stop(0)


def test_slots_begin_with_what_any_of_them_holds(engine: Engine) -> None:
    slots = Slots(engine, 3, CONTEXT)
    prompt = [*range(40)]
    first = slots.take(prompt)
    assert first is slots.all[0]
    assert first.sequence.length == 0
    assert slots.take([*prompt, 1]) is None  # a copy of what is just being read comes cheaper
    engine.prefill(first.sequence, prompt)
    first.tokens, first.prompt = prompt, ()
    second = slots.take([*prompt[:30], 7, 8])  # the first is busy
    assert second
    assert (second is not first, second.tokens, second.sequence.length) == (True, prompt[:30], 30)
    slots.give_back(first)
    assert slots.take([*prompt[:30], 9]) is first  # its own beginning
    assert first.tokens == prompt[:30]
    third = slots.take([5] * LEAST_SHARED)
    assert third
    assert third.tokens == []
    assert slots.take(prompt) is None  # all are busy
    slots.give_back(third)
    empty = slots.take(prompt, reuse=False)
    assert (empty is third, third.tokens, third.sequence.length) == (True, [], 0)


def test_common_beginnings() -> None:
    assert [common([1, 2, 3], other) for other in ([], [1], [1, 2, 4], [1, 2, 3, 4])] == [0, 1, 2, 3]


def test_logprobs() -> None:
    row = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32)) + 5
    found = logprobs_of(row, 1, 2)
    assert found.logprob == pytest.approx(np.log(0.2), abs=1e-6)
    assert [token for token, _ in found.top] == [3, 2]
    assert found.top[0][1] == pytest.approx(np.log(0.4), abs=1e-6)


# -- the page ------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_shows_the_model(server: Process, tmp_path: Path) -> None:
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    page = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", *quiet, "--disable-component-update",
         f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom", server.url],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert '<h1 id="name">tiny</h1>' in page
    assert 'class="message error"' not in page
