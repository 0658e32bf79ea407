"""Several real server processes of one model: overloaded, dying, coming back."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from PIL import Image

from mpa_edge.chat_address import parse_spec
from mpa_edge.chat_fleet import Fleet
from mpa_edge.chat_vlm import ChatVlm
from mpa_edge.errors import InputError, ModelError

RED = Image.new("RGB", (16, 16), "red")
# Answers with its own number and the prompt, after some milliseconds; says 429, or what else it is told to, to what is
# more than it can bear.
SERVER = """
import json, socket, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, name, bears, seconds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
refusal = int(sys.argv[5])
lock, running, asked, peak = threading.Lock(), 0, 0, 0
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        counts = {"asked": asked, "peak": peak}
        self.send(200, counts if self.path == "/counts" else {"data": [{"id": "only"}]})
    def do_POST(self):
        global running, asked, peak
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Host"] == f"127.0.0.1:{port}", self.headers["Host"]
        with lock:
            asked, running = asked + 1, running + 1
            peak = max(peak, running)
            over = running > bears
        if not over:
            time.sleep(seconds)
        with lock:
            running -= 1
        said = name + " " + request["messages"][0]["content"][1]["text"]
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        if over:
            return self.send(refusal, {}, {"retry-after-ms": "20"} if refusal == 429 else {})
        self.send(200, {"id": "1", "object": "chat.completion", "choices": [choice]})
    def send(self, status, body, headers={}):
        data = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_):
        pass
class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size, allow_reuse_address = True, 64, True
    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()
Server(("127.0.0.1", port), Handler).serve_forever()
"""


class Peer:
    """A server process on a port of its own, which it keeps when it is started again."""

    def __init__(self, name: str, bears: int = 99, seconds: float = 0.01, refusal: int = 429) -> None:
        # Bound here all the time, so that nobody else gets the port; only the server listens on it.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port = self._held.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        arguments = (self.port, name, bears, seconds, refusal)
        self._command = [sys.executable, "-c", SERVER, *map(str, arguments)]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(OSError):  # nobody listens yet, or it is slow
                self.counts()
                return
            time.sleep(0.02)
        raise AssertionError("the server did not start")

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/counts", timeout=10) as reply:
            found: dict[str, int] = json.load(reply)
            return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self._held.close()


@pytest.fixture
def peers() -> Iterator[Callable[..., Peer]]:
    started: list[Peer] = []

    def start(*arguments: object) -> Peer:
        started.append(Peer(*arguments))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for peer in started:
        peer.close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "MPA_EDGE_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_an_overloaded_server_gets_as_much_as_it_bears(peers: Callable[..., Peer]) -> None:
    peer = peers("a", 3, 0.15)
    vlm = ChatVlm(peer.url, "only", concurrency=24)
    answers = vlm.answer([RED] * 80, [str(number) for number in range(80)])
    # Without adapting, a request is soon refused as often as it is tried, and that ends the run.
    assert [answer.text for answer in answers] == [f"a {number}" for number in range(80)]
    assert peer.counts()["peak"] <= 24
    vlm.close()


def test_servers_share_the_work_and_one_that_dies_is_left_out_until_it_is_back(peers: Callable[..., Peer]) -> None:
    a, b = peers("a"), peers("b")
    vlm = ChatVlm(f"{a.url},{b.url}", "only", concurrency=2)
    assert vlm.batch_size == 8
    assert vlm.served() == ["only"]

    def ask(count: int = 40) -> dict[str, int]:
        answers = vlm.answer([RED] * count, [str(number) for number in range(count)])
        assert [answer.text.split()[1] for answer in answers] == [str(number) for number in range(count)]
        names = [answer.text.split()[0] for answer in answers]
        return {name: names.count(name) for name in ("a", "b")}

    assert min(ask().values()) >= 1
    a.kill()
    assert ask() == {"a": 0, "b": 40}
    a.start()
    end = time.monotonic() + 60
    while not ask()["a"]:
        assert time.monotonic() < end, "a server that is back gets nothing"
        time.sleep(0.1)
    a.kill()
    b.kill()
    vlm.close()
    with pytest.raises(ModelError, match=rf"{a.url},{b.url}#only: no answer .*Start the server"):
        ChatVlm(f"{a.url},{b.url}", "only").answer([RED], ["?"])


@pytest.mark.parametrize("refusal", [502, 503])
def test_one_that_fails_at_once_leaves_the_work_to_the_other(peers: Callable[..., Peer], refusal: int) -> None:
    broken, sound = peers("a", 0, 0.0, refusal), peers("b")
    vlm = ChatVlm(f"{broken.url},{sound.url}", "only", concurrency=4, max_retries=0)
    answers = vlm.answer([RED] * 40, [str(number) for number in range(40)])
    assert [answer.text for answer in answers] == [f"b {number}" for number in range(40)]
    assert broken.counts()["asked"] > 0
    vlm.close()


def test_one_that_answers_500_at_once_does_not_draw_the_work(peers: Callable[..., Peer]) -> None:
    """It looks idle; each request went there until its attempts were used up, and then the run ended."""
    broken, sound = peers("a", 0, 0.0, 500), peers("b")
    vlm = ChatVlm(f"{broken.url},{sound.url}", "only", concurrency=4, max_retries=3)
    answers = vlm.answer([RED] * 60, [str(number) for number in range(60)])
    assert [answer.text for answer in answers] == [f"b {number}" for number in range(60)]
    assert 0 < broken.counts()["asked"] <= 24
    vlm.close()


def test_a_picture_that_a_server_fails_at_keeps_no_other_from_it() -> None:
    fleet = Fleet(["http://a/v1", "http://b/v1"], 4)
    server = fleet.servers[0]
    for status in (500, 500, 500, 200, 500, 500, 500):
        server.answered(time.monotonic(), status, 0.0)
        assert server.has_room(time.monotonic())
    server.answered(time.monotonic(), 500, 0.0)
    assert not server.has_room(time.monotonic())


def test_one_that_fails_at_once_rests_longer_with_each_wave_until_it_answers() -> None:
    fleet = Fleet(["http://a/v1", "http://b/v1"], 4)
    sound, broken = fleet.servers
    for rest in (1, 2, 4, 8, 16, 30, 30):
        started = time.monotonic()
        for _ in range(4):
            broken.answered(started, 503, 0.0)
        assert broken.rests_until - broken.missed_at == pytest.approx(rest)
    sound.running = 3
    assert fleet.take() is sound
    assert fleet.take([sound]) is broken  # the last choice
    broken.answered(time.monotonic(), 200, 0.0)
    assert fleet.take() is broken


def test_a_fleet_halves_once_per_wave_and_grows_again() -> None:
    fleet = Fleet(["http://a/v1"], 16)
    (server,) = fleet.servers
    server.running = 16
    started = time.monotonic()
    for _ in range(16):
        server.answered(started, 503, 0.0)
    assert server.limit == 8
    for _ in range(200):
        server.answered(time.monotonic(), 200, 0.0)
    assert server.limit == 16
    server.answered(time.monotonic(), 429, 60.0)
    assert not server.has_room(time.monotonic() + 59)
    assert server.has_room(time.monotonic() + 61) is (server.running < server.limit)


def test_addresses_stand_side_by_side() -> None:
    assert parse_spec("http://a/v1/,http://b:80/v1#m") == ("http://a/v1,http://b:80/v1", "m")
    for wrong in (
        "http://a/v1,",
        "http://a/v1,http://me:word@b/v1",
        "https://api.openai.com/v1,https://eu.openai.com/v1",
    ):
        with pytest.raises(InputError):
            parse_spec(wrong)
