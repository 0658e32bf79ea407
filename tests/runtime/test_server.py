"""The server over a real socket: the official client, several turns, garbage, bombs, crowds, and clients that leave."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from tokenizers import Tokenizer

from mpa_edge.bundle import Bundle
from mpa_edge.errors import InputError
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.engine import Features, Logits
from mpa_edge.runtime.families import Cut
from mpa_edge.runtime.prompts import Turn
from mpa_edge.runtime.server import LOOPBACK, in_url, is_loopback, key_from, names_of

Running = Callable[..., AbstractContextManager[tuple[str, Any]]]
QUESTION = "What does the sign say?"
web = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=30)


@pytest.fixture(scope="module")
def address(vlm: BundleVlm, running: Running) -> Iterator[str]:
    with running(vlm, max_queue=8, hosts=LOOPBACK) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def wait_for(fact: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def turn(url: str, text: str = QUESTION) -> dict[str, Any]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return {"role": "user", "content": parts}


def metric(address: str, name: str) -> float:
    lines = web.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


class Slow:
    """An engine that takes its time and never stops by itself."""

    name = "slow"

    def __init__(self, token: int, vocabulary: int, seconds: float = 0.01) -> None:
        self.token, self.vocabulary, self.seconds = token, vocabulary, seconds
        self.prompts = self.steps = 0

    def encode(self, cut: Cut) -> Features:
        return np.zeros((len(cut.tiles) * 16, 4), np.float32)

    def prefill(
        self, token_ids: Sequence[int], features: Features, positions: Any = None, *, all_logits: bool = False
    ) -> Logits:
        self.prompts += 1
        return np.zeros(self.vocabulary, np.float32)

    def extend(self, token_ids: Sequence[int]) -> Logits:
        self.steps += 1
        time.sleep(self.seconds)
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.token] = 5
        return logits

    def mark(self) -> None: ...

    def rewind(self) -> bool:
        self.prompts += 1
        return True

    def close(self) -> None: ...


@pytest.fixture
def slow(served: tuple[Path, Bundle], tiny_one_tile: Path) -> tuple[BundleVlm, Slow]:
    tokenizer = Tokenizer.from_file(str(tiny_one_tile / "tokenizer.json"))
    engine = Slow(tokenizer.encode("a").ids[0], tokenizer.get_vocab_size())
    return BundleVlm(served[1], engine, tokenizer), engine


def test_the_official_client_gets_what_ask_gives(client: openai.OpenAI, vlm: BundleVlm, picture: Any) -> None:
    image = picture(70, 50, 1)
    assert [model.id for model in client.models.list()] == [vlm.name]
    got = client.chat.completions.create(model=vlm.name, messages=[turn(data_url(png(image)))])
    wanted = vlm.ask(image, QUESTION)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == (wanted.text, wanted.finish_reason)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (wanted.prompt_tokens, len(wanted.tokens))
    assert got.usage.prompt_tokens_details.cached_tokens == 0
    assert got.mpa_edge["logprob"] == wanted.logprob
    assert set(got.mpa_edge["timings_ms"]) == {"preprocess", "vision", "prefill", "decode", "total"}
    again = client.chat.completions.create(model=vlm.name, messages=[turn(data_url(png(image)))], max_tokens=2)
    assert again.usage.prompt_tokens_details.cached_tokens > 16
    assert again.usage.completion_tokens == 2


def test_a_stream_joins_to_the_answer(client: openai.OpenAI, vlm: BundleVlm, picture: Any) -> None:
    image = picture(70, 50, 2)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=vlm.name, messages=[turn(data_url(png(image)))], **options))
    wanted = vlm.ask(image, QUESTION)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == wanted.text
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [wanted.finish_reason]
    assert chunks[-1].usage.completion_tokens == len(wanted.tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_turns_are_about_one_picture(client: openai.OpenAI, vlm: BundleVlm, picture: Any) -> None:
    image = picture(70, 50, 3)
    url = data_url(png(image))
    messages: list[Any] = [turn(url, "One?"), {"role": "assistant", "content": "Yes"}, turn(url, "Two?")]
    got = client.chat.completions.create(model=vlm.name, messages=messages)
    turns = [Turn("user", "One?", pictures=1), Turn("assistant", "Yes"), Turn("user", "Two?")]
    wanted = vlm.chat(image, turns).result()
    assert (got.choices[0].message.content, got.usage.prompt_tokens) == (wanted.text, wanted.prompt_tokens)


def test_a_bare_string_is_an_image_url_too(address: str, vlm: BundleVlm, picture: Any) -> None:
    parts = [{"type": "image_url", "image_url": data_url(png(picture(70, 50)))}, {"type": "text", "text": QUESTION}]
    got = web.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
    assert got.json()["choices"][0]["message"]["content"] == vlm.ask(picture(70, 50), QUESTION).text


def test_a_seed_makes_samples_repeat(client: openai.OpenAI, vlm: BundleVlm, picture: Any) -> None:
    messages = [turn(data_url(png(picture(70, 50))))]

    def sample(seed: int | None) -> str:
        got = client.chat.completions.create(model=vlm.name, messages=messages, temperature=2, seed=seed)
        return str(got.choices[0].message.content)

    assert sample(5) == sample(5)
    assert len({sample(None) for _ in range(5)}) > 1


def test_a_temperature_too_small_to_divide_by_is_greedy(address: str, vlm: BundleVlm, picture: Any) -> None:
    body = {"messages": [turn(data_url(png(picture(70, 50))))], "temperature": 1e-320, "seed": 1}
    got = web.post(f"{address}/v1/chat/completions", json=body)
    assert got.json()["choices"][0]["message"]["content"] == vlm.ask(picture(70, 50), QUESTION).text


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 50,000 pixels wide and high."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


URL = data_url(b"no picture")
BAD = {
    "no json": (b"{", 400, "Invalid JSON"),
    "nested": (b"[" * 100_000, 400, "JSON"),
    "not utf-8": (b'{"messages": "\xff"}', 400, "JSON"),
    "countless": (b'{"messages": [' + b"{}," * 300_000 + b"{}]}", 400, "items"),
    "no messages": ({}, 400, "messages"),
    "empty": ({"messages": []}, 400, "messages"),
    "role": ({"messages": [{"role": "pirate", "content": "x"}]}, 400, "role"),
    "no picture": ({"messages": [{"role": "user", "content": "hi"}]}, 400, "0 pictures"),
    "two pictures": ({"messages": [turn(URL), turn(data_url(b"2"))]}, 400, "2 pictures"),
    "no url": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    "bad picture": ({"messages": [turn(URL)]}, 400, "unreadable"),
    "bomb": ({"messages": [turn(data_url(bomb()))]}, 400, "too_large"),
    "a file": ({"messages": [turn("file:///etc/hostname")]}, 400, "data: URL"),
    "a path": ({"messages": [turn("/etc/hostname")]}, 400, "data: URL"),
    "private": ({"messages": [turn("http://127.0.0.1:9/a.png")]}, 400, "not a public one"),
    "metadata": ({"messages": [turn("http://169.254.169.254/latest")]}, 400, "not a public one"),
    "port": ({"messages": [turn("http://8.8.8.8:99999/")]}, 400, "port from 1 to 65535"),
    "last": ({"messages": [turn(URL), {"role": "assistant", "content": "x"}]}, 400, "user's"),
    "n": ({"messages": [turn(URL)], "n": 3}, 400, "n: "),
    "stop": ({"messages": [turn(URL)], "stop": ["."]}, 400, "stop"),
    "max_tokens": ({"messages": [turn(URL)], "max_tokens": -1}, 400, "max_tokens"),
    "temperature": ({"messages": [turn(URL)], "temperature": "hot"}, 400, "temperature"),
    "model": ({"messages": [turn(URL)], "model": "gpt-4"}, 404, "only 'tiny-f16'"),
    "long": ({"messages": [turn(data_url(b""), "why? " * 2000)]}, 400, "unreadable"),
}


@pytest.mark.parametrize("name", BAD)
def test_garbage_is_refused_and_says_why(name: str, address: str) -> None:
    body, status, message = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    for stream in (False, True):
        if stream and isinstance(body, dict):
            content = json.dumps(body | {"stream": True}).encode()
        got = web.post(f"{address}/v1/chat/completions", content=content, headers=headers)
        assert got.status_code == status
        assert message in got.json()["error"]["message"]
    assert web.get(f"{address}/health").json() == {"status": "ok"}


def test_a_prompt_beyond_the_context_is_refused(address: str, picture: Any) -> None:
    message = turn(data_url(png(picture(9, 9))), "why? " * 2000)
    got = web.post(f"{address}/v1/chat/completions", json={"messages": [message]})
    assert (got.status_code, "than the 1024 tokens" in got.json()["error"]["message"]) == (400, True)


def test_too_much_is_refused_before_it_is_read(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 99000000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    headers = {"content-type": "application/json"}
    chunks = (b" " * 1_000_000 for _ in range(34))  # without a length
    assert web.post(f"{address}/v1/chat/completions", content=chunks, headers=headers).status_code == 413


def test_a_client_that_does_not_say_what_it_wants_is_sent_away(
    vlm: BundleVlm, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = "mpa_edge.runtime.patience.HEAD_SECONDS"
    monkeypatch.setattr(patience, 0.3)
    with running(vlm) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        for begun in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(begun)
                assert connection.recv(100) == b""
        with httpx.Client() as client:  # one that asks at once may take its time between two requests
            for _ in range(2):
                monkeypatch.setattr(patience, 30)  # this machine may be slow to ask
                assert client.get(f"{url}/health").status_code == 200
                monkeypatch.setattr(patience, 0.3)
                time.sleep(0.4)


def begin_a_body(url: str) -> bytes:
    """The first line of the answer to one who sends a byte of a hundred and then nothing."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        return connection.recv(1000).split(b"\r\n")[0]


def test_a_body_that_does_not_come_is_not_waited_for(
    vlm: BundleVlm, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpa_edge.runtime.gate.BODY_SECONDS", 0.3)
    with running(vlm) as (url, _):
        assert begin_a_body(url) == b"HTTP/1.1 408 Request Timeout"
        assert metric(url, 'mpa_edge_requests_total{outcome="refused"}') == 1
        wait_for(lambda: metric(url, "mpa_edge_requests_inside") == 0)


def test_a_body_that_does_not_come_is_not_waited_for_before_a_refusal_either(
    slow: tuple[BundleVlm, Slow], picture: Any, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"messages": [turn(data_url(png(picture(70, 50))))], "max_tokens": 900, "stream": True}
    with (
        running(slow[0], max_queue=0) as (url, _),
        web.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)  # the one place is taken
        monkeypatch.setattr("mpa_edge.runtime.gate.BODY_SECONDS", 0.3)
        assert begin_a_body(url) == b"HTTP/1.1 429 Too Many Requests"


@pytest.mark.parametrize("host", ["::1", "127.0.0.1", "127.0.0.2"])
def test_a_server_answers_under_the_address_where_it_listens(host: str, vlm: BundleVlm, running: Running) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        try:
            trial.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
    with running(vlm, host=host, hosts=names_of(host)) as (url, _):
        assert url.startswith(f"http://{in_url(host)}:")
        assert web.get(f"{url}/health").json() == {"status": "ok"}
        assert web.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_a_server_on_this_machine_answers_under_its_names(name: str, address: str) -> None:
    for host in (name, f"{name}:8000"):
        assert web.get(f"{address}/health", headers={"host": host}).status_code == 200


STRANGE = ["evil.example", "evil.example:8000", "localhost.evil.example", "evil.example.localhost", "", ":8000"]
STRANGE += ["localhost:80@evil.example", "localhost:80:evil.example", "[::1].evil.example", "[localhost]"]
STRANGE += ["::1", "[::1", "[::2]:8000"]


@pytest.mark.parametrize("name", STRANGE)
def test_a_server_on_this_machine_answers_under_no_other_name(name: str, address: str) -> None:
    for path in ("/health", "/v1/models"):
        got = web.get(f"{address}{path}", headers={"host": name})
        assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error")
        assert "Host header" in got.json()["error"]["message"]


def test_pages_from_elsewhere_cannot_ask(address: str) -> None:
    url = f"{address}/v1/chat/completions"
    assert web.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert web.get(f"{address}/health", headers={"host": "evil.example"}).status_code == 400
    assert web.options(url, headers={"origin": "http://evil.example"}).status_code == 405


def test_a_key_is_asked_for(slow: tuple[BundleVlm, Slow], running: Running) -> None:
    with running(slow[0], api_keys=["s3cret", "other"]) as (url, _):
        assert web.get(f"{url}/health").status_code == 200
        for wrong in ({}, {"authorization": "Bearer no"}, {"authorization": "s3cret"}, {"authorization": "Bearer é"}):
            encoded = {name: value.encode() for name, value in wrong.items()}
            assert web.get(f"{url}/v1/models", headers=encoded).status_code == 401
        for right in ("s3cret", "other"):
            assert web.get(f"{url}/v1/models", headers={"authorization": f"Bearer {right}"}).status_code == 200


def test_keys_come_from_the_flag_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPA_KEY", "from-env")
    assert key_from("typed", "MPA_KEY") == ("typed", "from-env")
    assert key_from(None, None) == ()
    with pytest.raises(InputError, match="--api-key-env NO_KEY"):
        key_from(None, "NO_KEY")
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_sixty_four_clients_at_once_lose_nothing(address: str, vlm: BundleVlm, picture: Any) -> None:
    """Nine places, 64 clients that try again when told to; twice, and the memory stays where it was."""
    pictures = [data_url(png(picture(70, 50, seed))) for seed in range(8)]
    wanted = [vlm.ask(picture(70, 50, seed), QUESTION).text for seed in range(8)]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=60)

    def ask(number: int) -> str:
        made = client.chat.completions.create(model=vlm.name, messages=[turn(pictures[number % 8])])
        return str(made.choices[0].message.content)

    resident = []
    for _ in range(2):
        with ThreadPoolExecutor(64) as pool:
            assert list(pool.map(ask, range(64))) == [wanted[number % 8] for number in range(64)]
        resident.append(psutil.Process().memory_info().rss)
    assert metric(address, 'mpa_edge_requests_total{outcome="busy"}') > 0
    assert resident[1] - resident[0] < 30_000_000
    wait_for(lambda: metric(address, "mpa_edge_requests_inside") == 0)


def test_a_full_queue_says_when_to_come_back(slow: tuple[BundleVlm, Slow], picture: Any, running: Running) -> None:
    body = {"messages": [turn(data_url(png(picture(70, 50))))], "max_tokens": 60}
    with running(slow[0], max_queue=1) as (url, _), ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: web.post(f"{url}/v1/chat/completions", json=body, timeout=30), range(8)))
        assert sorted(response.status_code for response in got) == [200, 200, *[429] * 6]
        assert {response.headers.get("retry-after") for response in got} == {None, "1"}
        assert metric(url, 'mpa_edge_requests_total{outcome="busy"}') == 6
        assert metric(url, 'mpa_edge_tokens_total{kind="new"}') == 120


def test_who_leaves_is_not_answered(slow: tuple[BundleVlm, Slow], picture: Any, running: Running) -> None:
    """While its answer streams, while it is computed, and while it waits."""
    vlm, engine = slow
    body = {"messages": [turn(data_url(png(picture(70, 50))))], "max_tokens": 900}
    with running(vlm, max_queue=3) as (address, _), ThreadPoolExecutor(1) as pool:
        url = f"{address}/v1/chat/completions"
        with web.stream("POST", url, json=body | {"stream": True}) as response:
            lines = response.iter_lines()  # closes the response when it is let go of
            next(lines)
            waiting = pool.submit(web.post, url, json=body, timeout=2)
            wait_for(lambda: metric(address, "mpa_edge_requests_inside") == 2)
            with pytest.raises(httpx.ReadTimeout):
                waiting.result()
            wait_for(lambda: metric(address, "mpa_edge_requests_inside") == 1)
        with pytest.raises(httpx.ReadTimeout):
            web.post(url, json=body, timeout=1)
        wait_for(lambda: metric(address, 'mpa_edge_requests_total{outcome="cancelled"}') == 3)
        assert web.post(url, json=body | {"max_tokens": 3}).status_code == 200
        assert engine.prompts == 3  # the one that waited was never begun
        assert engine.steps < 800  # of the 1,800 that the other two would have taken
        assert metric(address, "mpa_edge_requests_inside") == 0


def test_a_stop_lets_the_answer_finish(slow: tuple[BundleVlm, Slow], picture: Any, running: Running) -> None:
    body = {"messages": [turn(data_url(png(picture(70, 50))))], "max_tokens": 50}
    with running(slow[0]) as (address, server), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(web.post, f"{address}/v1/chat/completions", json=body, timeout=30)
        wait_for(lambda: slow[1].steps > 3)
        server.should_exit = True
        assert asked.result().json()["usage"]["completion_tokens"] == 50


def test_a_model_that_fails_costs_one_answer(slow: tuple[BundleVlm, Slow], picture: Any, running: Running) -> None:
    vlm, engine = slow
    body = {"messages": [turn(data_url(png(picture(70, 50))))]}
    with running(vlm) as (address, _):
        url = f"{address}/v1/chat/completions"
        engine.token = 10**9
        for stream in (False, True):
            got = web.post(url, json=body | {"stream": stream})
            assert (got.status_code, "log says" in got.json()["error"]["message"]) == (500, True)
        engine.token = 0
        assert web.post(url, json=body).status_code == 200
