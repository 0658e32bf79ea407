"""Chat servers: one that misbehaves on command, and llama-cpp-python's own with a model of ours."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mpa_edge.benchmarks
from mpa_edge.annotate import Annotator
from mpa_edge.benchmarks.measure import read_measured
from mpa_edge.benchmarks.reference import write_test
from mpa_edge.benchmarks.variants import size_bytes, variants_of
from mpa_edge.benchmarks.worker import Ask, Job, open_variant, work
from mpa_edge.bundle import read_bundle, write_bundle
from mpa_edge.chat_address import api_key, parse_spec
from mpa_edge.chat_messages import ENCODING, PNG_PIXELS, data_url, request_of
from mpa_edge.chat_vlm import FAILED_IN_A_ROW, ChatVlm
from mpa_edge.errors import AGAIN, BudgetSpent, InputError, ModelError
from mpa_edge.identify import Identifier
from mpa_edge.models import open_vlm
from mpa_edge.parts import open_parts, read_parts
from mpa_edge.records import Annotation, Sample
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm
from mpa_edge.tasks import task_named

REFERENCE = Path(mpa_edge.benchmarks.__file__).parent / "reference"
KEY = "sk-secret-0123456789"
SOON = {"retry-after-ms": "5"}  # which the client obeys instead of its half a second and more
RED = Image.new("RGB", (32, 32), "red")


def reply(content: Any = "red", finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """A whole reply; `message` adds to the message."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 9}}


Script = Callable[[dict[str, Any], int], Any]


@dataclass
class Misbehaving:
    """A server that does what `script(request, number)` says: a reply, (status, body[, headers]), "hang" or "reset"."""

    script: Script
    models: Any = ("only",)
    port: int = 0
    http: ThreadingHTTPServer | None = None
    dead: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [prompt_of(request) for request in self.asked]

    def die(self) -> str:
        """As the process would: nobody listens any more, and what is under way is cut."""
        assert self.http is not None
        self.dead = True
        self.http.shutdown()
        self.http.server_close()
        return "reset"

    def handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if server.dead:
                    return self.cut()
                models = server.models
                if isinstance(models, tuple):
                    models = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
                self.send(*(models if isinstance(models, list) else (200, models)))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.asked.append(request)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    number = len(server.asked)
                found = server.script(request, number)
                if found == "hang":
                    server.released.wait(30)
                    self.close_connection = True
                elif found == "reset":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.wfile.flush()
                    self.cut()
                else:
                    self.send(*(found if isinstance(found, tuple) else (200, found)))

            def cut(self) -> None:
                # Linger of no seconds: the connection is reset instead of closed.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is cut on purpose is no news."""


@contextmanager
def serving(script: Script | None = None, **settings: Any) -> Iterator[Misbehaving]:
    server = Misbehaving(script or (lambda request, number: reply()), **settings)
    with Quiet(("127.0.0.1", server.port), server.handler()) as http:
        server.http, server.port = http, http.server_address[1]
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            http.shutdown()


def prompt_of(request: dict[str, Any]) -> str:
    (text,) = [part["text"] for part in request["messages"][0]["content"] if part["type"] == "text"]
    return str(text)


def ask(server: Misbehaving, *prompts: str, decoding: Decoding | None = None, **settings: Any) -> list[Any]:
    vlm = ChatVlm(server.url, "only", **{"max_retries": 2, **settings})
    try:
        return vlm.answer([RED] * len(prompts), prompts, decoding or Decoding())
    finally:
        vlm.close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' machine may have a key; no test may send it anywhere."""
    for name in ("OPENAI_API_KEY", "MPA_EDGE_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_a_request_holds_the_picture_the_prompt_and_the_decoding() -> None:
    with serving() as server:
        (answer,) = ask(server, "What colour?", decoding=Decoding(7))
        ask(server, "What colour?", decoding=Decoding(7, temperature=0.5, top_p=0.9, seed=3))
    greedy, sampled = server.asked
    assert (answer.text, answer.finish_reason, answer.prompt_tokens, answer.error) == ("red", "stop", 9, None)
    assert answer.timings.total > 0
    assert (greedy["model"], greedy["temperature"], greedy["max_tokens"]) == ("only", 0, 7)
    assert "seed" not in greedy
    assert (sampled["temperature"], sampled["top_p"], sampled["seed"]) == (0.5, 0.9, 3)
    picture, text = greedy["messages"][0]["content"]
    assert text == {"type": "text", "text": "What colour?"}
    head, _, content = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(content))), RED)


def test_openai_itself_gets_the_limits_new_name() -> None:
    request = request_of("m", "api.openai.com", RED, "?", Decoding(5), None)
    assert request["max_completion_tokens"] == 5
    assert "max_tokens" not in request


def test_small_pictures_travel_without_loss_and_large_ones_as_good_jpeg(picture: Callable[..., Any]) -> None:
    def sent(image: Any, longest_edge: int | None = None) -> Any:
        return Image.open(io.BytesIO(base64.b64decode(data_url(image, longest_edge).partition(",")[2])))

    small, large = picture(512, 512), picture(513, 512)
    assert small.width * small.height == PNG_PIXELS
    assert np.array_equal(sent(small), small)
    assert sent(large).format == "JPEG"
    assert sent(large).size == large.size
    assert max(sent(large).quantization[0]) <= 12  # quality 95
    assert sent(large).layer[1][1:3] == (1, 1)  # chroma is not subsampled
    shrunk = sent(picture(1000, 500), longest_edge=100)
    assert (shrunk.size, shrunk.format) == ((100, 50), "PNG")
    assert sent(small, longest_edge=600).size == small.size  # never scaled up


def test_the_description_outlives_a_move_and_tells_what_shapes_answers() -> None:
    a, b = ChatVlm("http://localhost:8000/v1", "org/model"), ChatVlm("https://203.0.113.5:9000/v1/", "org/model")
    assert a.describe() == b.describe()
    assert a.describe() == {
        "engine": "chat",
        "model": "org/model",
        "image": {"longest_edge": None, **ENCODING},
    }
    assert ChatVlm("http://localhost/v1", "org/model", longest_edge=64).describe() != a.describe()
    assert isinstance(a, Vlm)
    assert a.name == "model"
    json.dumps(a.describe())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(status: int) -> None:
    with serving(lambda request, number: (status, {}, SOON) if number < 3 else reply()) as server:
        (answer,) = ask(server, "?")
    assert answer.text == "red"
    assert len(server.asked) == 3


def test_retry_after_is_honoured() -> None:
    times = []

    def busy(request: Any, number: int) -> Any:
        times.append(time.monotonic())
        return (429, {}, {"Retry-After": "1.3"}) if number == 1 else reply()

    with serving(busy) as server:
        assert ask(server, "?")[0].text == "red"
    assert times[1] - times[0] >= 1.3  # the client's own first pause is half a second


def test_a_lost_connection_and_a_time_out_are_tried_again() -> None:
    actions: dict[str, list[Any]] = {"cut": ["reset", reply("whole")], "late": ["hang", reply("in time")]}
    with serving(lambda request, number: actions[prompt_of(request)].pop(0)) as server:
        cut, late = ask(server, "cut", "late", timeout=0.5)
    assert (cut.text, late.text) == ("whole", "in time")
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("said", "text", "finish", "error"),
    [
        (reply("it goes on and on", "length"), "it goes on and on", "length", None),
        (reply(None, "length"), "", "length", None),  # all tokens went into thinking
        (reply(""), "", "stop", None),
        (reply(" red\n", None), "red", "stop", None),
        (reply([{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]), "red", "stop", None),
        (reply(None), "", "error", "no text"),
        (reply([]), "", "error", "no text"),
        (reply(7), "", "error", "no text"),
        (reply(None, refusal="I will not look at this."), "", "error", "refused: I will not"),
        (reply("Half of", "content_filter"), "", "error", "content filter"),
        ({"choices": []}, "", "error", "no answer"),
        ({"choices": None, "error": {"message": "upstream broke"}}, "", "error", "upstream broke"),
        ({"choices": ["?"]}, "", "error", "no text"),
        ([1, 2], "", "error", "no answer"),
        ((200, '{"choices": [{"mess'), "", "error", "no JSON"),
        ((200, "<html>", {"Content-Type": "text/html"}), "", "error", "no answer"),
        ((400, {"error": {"message": "cannot decode the picture", "code": 400}}), "", "error", "HTTP 400: cannot dec"),
        ((413, "too large"), "", "error", "HTTP 413: too large"),
        ((422, {"detail": [{"input": "data:" + "x" * 9999}]}), "", "error", "HTTP 422"),
        ((403, {"error": {"message": "Your input was flagged"}}), "", "error", "HTTP 403: Your input was flagged"),
        ((500, {"error": {"message": "assert tile"}}, SOON), "", "error", "HTTP 500: assert tile"),
    ],
)
def test_one_bad_item_is_one_answer(said: Any, text: str, finish: str, error: str | None) -> None:
    with serving(lambda request, number: said if prompt_of(request) == "bad" else reply("fine")) as server:
        before, bad, after = ask(server, "good", "bad", "good")
    assert before.text == after.text == "fine"
    assert (bad.text, bad.finish_reason) == (text, finish)
    assert bad.error is None if error is None else error in bad.error
    assert bad.error is None or len(bad.error) <= 300


def test_a_picture_that_kills_every_connection_is_its_own_fault_while_the_server_lives() -> None:
    with serving(lambda request, number: "reset" if prompt_of(request) == "bad" else reply()) as server:
        bad, good = ask(server, "bad", "good", max_retries=0)
    assert bad.error
    assert good.text == "red"


@pytest.mark.parametrize(
    "action",
    [
        "hang",
        (500, {"error": {"message": "CUDA error"}}, SOON),
        (200, "<html>Welcome to nginx!</html>"),
        (200, {"error": {"message": "no such deployment"}}),
    ],
)
def test_a_server_that_only_fails_is_not_asked_thousands_of_times(action: Any) -> None:
    with (
        serving(lambda request, number: action) as server,
        pytest.raises(ModelError, match=r"8 requests in a row failed, the last one: .*type the same command again"),
    ):
        ask(server, *"?" * 1000, max_retries=0, timeout=0.2, concurrency=4)
    assert FAILED_IN_A_ROW <= len(server.asked) <= FAILED_IN_A_ROW + 8


ASKING = """
import signal, sys
from PIL import Image
from mpa_edge import edge
from mpa_edge.models import open_vlm
signal.signal(signal.SIGINT, signal.default_int_handler)
with edge.resumable():
    vlm = open_vlm(sys.argv[1] + "#only", concurrency=3, timeout=1000)
    vlm.answer([Image.new("RGB", (8, 8))] * 9, "?" * 9)
"""


def test_ctrl_c_waits_for_no_server() -> None:
    """It waited for each request on its way: up to the time-out, and through all pauses between attempts."""
    with serving(lambda request, number: "hang" if number < 3 else (429, {}, {"Retry-After": "100"})) as server:
        command = [sys.executable, "-c", ASKING, server.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                while len(server.asked) < 3 and process.poll() is None:
                    time.sleep(0.05)
                started = time.monotonic()
                process.send_signal(signal.SIGINT)
                _, told = process.communicate(timeout=100)
                took = time.monotonic() - started
            finally:
                process.kill()
    assert (process.returncode, told) == (130, "\nStopped. What is finished is kept: " + AGAIN + " to go on.\n")
    assert len(server.asked) == 3
    assert took < 25  # the server hangs for 30 s


def test_what_a_call_left_behind_sends_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpa_edge.chat_vlm.LEAVE_SECONDS", 0.1)
    said = {"late": "hang", "bad": (401, {}), "good": reply()}
    begun = threading.Event()

    def answer(request: Any, number: int) -> Any:
        if prompt_of(request) == "late":
            begun.set()
        elif prompt_of(request) == "bad":
            begun.wait(30)
        return said[prompt_of(request)]

    with serving(answer) as server:
        vlm = ChatVlm(server.url, "only", max_retries=5, timeout=3.0)
        with pytest.raises(ModelError, match="HTTP 401"):
            vlm.answer([RED] * 2, ["late", "bad"])
        assert vlm.answer([RED], ["good"])[0].text == "red"  # not that this call is over
        before = server.prompts.count("late")
        time.sleep(4.0)  # "late" would have been tried again by now
        vlm.close()
        assert server.prompts.count("late") == before >= 1


@pytest.mark.parametrize(
    ("status", "said", "cure"),
    [
        (401, "Incorrect API key", r"MPA_EDGE_API_KEY \(OPENAI_API_KEY goes to openai\.com only\)"),
        (402, "no credit", "topped up"),
        (403, "not for you", "may not use this model"),
        (404, "no model 'only'", r"serves after the #"),
        (429, "slow down", "--concurrency"),
        (503, "loading", "still loading"),
    ],
)
def test_what_every_picture_would_meet_ends_the_run_at_once(status: int, said: str, cure: str) -> None:
    with serving(lambda request, number: (status, {"error": {"message": said}}, SOON)) as server:
        with pytest.raises(ModelError, match=rf"127\.0\.0\.1:\d+/v1#only: HTTP {status}: {said}\. .*{cure}"):
            ask(server, *"?" * 100, max_retries=1, concurrency=2)
        assert len(server.asked) <= 8


def test_a_server_that_is_down_ends_the_run_with_its_address() -> None:
    with serving() as server:
        pass
    with pytest.raises(ModelError, match=rf"{server.url}#only: no answer .*refused.*Start the server"):
        ask(server, "?", max_retries=1)
    with pytest.raises(ModelError, match=rf"{server.url}: no answer .*refused.*Start the server"):
        ChatVlm.load(server.url)


def test_a_named_model_needs_no_server_before_the_first_question() -> None:
    """Such as to train on answers that are all there, when the rented machine is gone."""
    with serving() as server:
        pass
    vlm = open_vlm(f"{server.url}#org/only")
    assert (vlm.name, vlm.describe()["model"]) == ("only", "org/only")
    started = time.monotonic()
    with pytest.raises(ModelError, match="Start the server"):
        vlm.answer([RED], ["?"])
    assert time.monotonic() - started < 5  # not after all attempts
    vlm.close()


def test_a_server_that_dies_between_questions_is_to_be_started_again() -> None:
    with serving(lambda request, number: reply() if number == 1 else server.die()) as server:
        vlm = ChatVlm(server.url, "only", max_retries=1)
        vlm.answer([RED], ["?"])
        with pytest.raises(ModelError, match=rf"{server.url}#only: .*Start it again"):
            vlm.answer([RED], ["?"])
        vlm.close()


def test_as_many_requests_run_at_once_as_wanted_and_answers_keep_their_order() -> None:
    gate = threading.Barrier(3)
    running, peak, lock = [0], [0], threading.Lock()

    def together(request: Any, number: int) -> Any:
        with lock:
            running[0] += 1
            peak[0] = max(peak[0], running[0])
        gate.wait(20)  # nobody gets on before three are here
        with lock:
            running[0] -= 1
        return reply(prompt_of(request))

    with serving(together) as server:
        answers = ask(server, *map(str, range(12)), concurrency=3)
    assert peak[0] == 3
    assert [answer.text for answer in answers] == [str(number) for number in range(12)]


def test_the_budget_counts_what_was_sent_retries_too() -> None:
    with serving(lambda request, number: (500, {}, SOON) if number == 1 else reply()) as server:
        vlm = ChatVlm.load(server.url, max_requests=4, concurrency=2)
        assert [answer.text for answer in vlm.answer([RED] * 2, ["a", "b"])] == ["red", "red"]
        assert vlm.sent == len(server.asked) == 3
        with pytest.raises(BudgetSpent, match=r"--max-requests 4 is used up.*type the same command again to go on"):
            vlm.answer([RED] * 5, list("cdefg"))
        assert vlm.sent == len(server.asked) == 4
        with pytest.raises(BudgetSpent):
            vlm.answer([RED], ["h"])
        assert len(server.asked) == 4


def test_the_only_model_of_a_server_needs_no_name() -> None:
    with serving(models=("org/the-model",)) as server:
        vlm = ChatVlm.load(server.url)
        assert (vlm.model, vlm.name) == ("org/the-model", "the-model")
        vlm.answer([RED], ["?"])
        assert server.asked[0]["model"] == "org/the-model"
        assert ChatVlm.load(server.url, name="teacher").name == "teacher"
        server.models = ("a", "b")
        with pytest.raises(InputError, match=rf"serves 2 models: .*{server.url}#MODEL. It has: a, b"):
            ChatVlm.load(server.url)
        assert ChatVlm.load(f"{server.url}#b").model == "b"
        for odd in (["not a list"], {"data": 3}, "<html>", [404, {}], [500, "?"]):
            server.models = odd if isinstance(odd, list) and len(odd) == 2 else [200, odd]
            with pytest.raises(InputError, match="does not list its models"):
                ChatVlm.load(server.url)
            assert ChatVlm.load(f"{server.url}#b").model == "b"
        server.models = [401, {"error": {"message": "no key"}}]
        with pytest.raises(ModelError, match=r"HTTP 401: no key\. Put a key"):
            ChatVlm.load(f"{server.url}#b").answer([RED], ["?"])


@pytest.mark.parametrize(
    "spec",
    [
        "http://user:pass-word@host/v1",
        "http://user:pass/word@host/v1",
        "https://user:pass-word@/v1#m",
        "http://host/v1?key=pass-word#m",
    ],
)
def test_secrets_in_an_address_are_refused_and_not_repeated(spec: str) -> None:
    for open_it in (parse_spec, ChatVlm.load, lambda one: ChatVlm(one, "m")):
        with pytest.raises(InputError) as caught:
            open_it(spec)
        assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize("spec", ["http://", "http:///v1", "http://host:port/v1", "http://[::1/v1", "ftp://host/v1"])
def test_an_address_without_a_host_says_how_one_looks(spec: str) -> None:
    with pytest.raises(InputError, match="http://localhost:8000/v1#MODEL"):
        parse_spec(spec)


def test_the_key_comes_from_the_environment_and_is_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPA_EDGE_API_KEY", f"{KEY}\n")
    with serving(models=("only",)) as server:

        def gossip(request: Any, number: int) -> Any:
            told = {"error": {"message": f"you sent {server.headers[-1]['authorization']}"}}
            return (401 if prompt_of(request) == "fatal" else 400, told)

        server.script = gossip
        vlm = ChatVlm.load(server.url)
        (answer,) = vlm.answer([RED], ["?"])
        assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
        with pytest.raises(ModelError) as caught:
            vlm.answer([RED], ["fatal"])
        told = [str(answer), str(caught.value), repr(caught.value), json.dumps(vlm.describe()), repr(vlm), vlm.name]
        assert "you sent Bearer ***" in told[0]
        assert "you sent Bearer ***" in told[1]
        assert not [text for text in told if KEY in text]
        monkeypatch.delenv("MPA_EDGE_API_KEY")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        ChatVlm(server.url, "only").answer([RED], ["?"])
        assert KEY not in str(server.headers[-1])
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(InputError, match="OPENAI_API_KEY holds characters"):
        ChatVlm("https://api.openai.com/v1", "m")


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://api.openai.com/v1", "openais"),
        ("https://eu.api.openai.com/v1", "openais"),
        ("http://api.openai.com/v1", ""),
        ("https://notopenai.com/v1", ""),
        ("https://openai.com.example.org/v1", ""),
        ("http://localhost:8000/v1", ""),
    ],
)
def test_openais_key_goes_to_openai_only(url: str, sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openais")
    assert api_key(url) == sent
    monkeypatch.setenv("MPA_EDGE_API_KEY", "mine")  # comes first
    assert api_key(url) == "mine"
    monkeypatch.setenv("MPA_EDGE_API_KEY", "")  # keeps the other one at home
    assert api_key(url) == ""


def test_a_key_that_travels_unencrypted_gets_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api_key("http://203.0.113.5/v1")  # there is none
    monkeypatch.setenv("MPA_EDGE_API_KEY", KEY)
    for url in ("https://203.0.113.5/v1", "http://localhost/v1", "http://127.0.0.1:8000/v1", "http://[::1]:8000/v1"):
        api_key(url)
    assert not capsys.readouterr().err
    api_key("http://203.0.113.5:8000/v1")
    told = capsys.readouterr().err
    assert "MPA_EDGE_API_KEY goes to 203.0.113.5 unencrypted" in told
    assert KEY not in told


def annotate(vlm: Vlm, samples: list[Sample], folder: Path) -> None:
    """The stage of a run, in parts of six pictures."""
    annotator = Annotator(vlm, task_named("reference"))
    parts = open_parts(folder, Annotation, annotator.fingerprint(), len(samples) // 6)
    for number in range(len(samples) // 6):
        chunk = samples[6 * number : 6 * number + 6]
        parts.fill(number, lambda known, chunk=chunk: annotator.annotations(chunk, known))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """24 pictures, each of another size."""
    found = []
    for number in range(24):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (16 + number, 16), "red").save(path)
        found.append(Sample(str(number), str(path), str(number)))
    return found


def test_a_run_goes_on_when_its_server_is_back(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPA_EDGE_API_KEY", KEY)
    folder = tmp_path / "run"

    def until_15(request: Any, number: int) -> Any:
        if number == 15:
            return server.die()
        return "reset" if server.dead else reply("What colour? Red")

    with serving(until_15) as server:
        vlm = ChatVlm.load(server.url, concurrency=2, max_retries=1)
        with pytest.raises(ModelError, match=r"type the same command again to go on"):
            annotate(vlm, samples, folder)
    assert sorted(path.name for path in folder.glob("part*.jsonl")) == ["part-00000.jsonl", "part-00001.jsonl"]
    with serving(lambda request, number: reply("What colour? Red")) as server:  # on another port
        annotate(ChatVlm.load(server.url), samples, folder)
        assert len(server.asked) == 12
    rows = list(read_parts(folder, Annotation))
    assert [(row.sample_id, row.reason) for row in rows] == [(sample.id, None) for sample in samples]
    assert not [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_budget_ends_a_run_and_the_next_one_goes_on(samples: list[Sample], tmp_path: Path) -> None:
    with serving(lambda request, number: reply("What colour? Red")) as server:
        for attempt in range(3):
            vlm = ChatVlm.load(server.url, concurrency=2, max_requests=10)
            with pytest.raises(BudgetSpent):
                annotate(vlm, samples, tmp_path / "run")
            assert len(list((tmp_path / "run").glob("part*.jsonl"))) == attempt + 1
        annotate(ChatVlm.load(server.url, max_requests=10), samples, tmp_path / "run")
        assert len(server.asked) == 36  # twelve of them for answers of parts that were not finished
    assert [row.sample_id for row in read_parts(tmp_path / "run", Annotation)] == [sample.id for sample in samples]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, gguf_bundle: Any) -> Path:
    """The reference teacher, exported."""
    folder = tmp_path_factory.mktemp("gguf")
    write_bundle(folder, gguf_bundle(REFERENCE / "teacher", folder, name="teacher", tokens=12))
    return folder


@pytest.fixture(scope="module")
def stock_server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of llama-cpp-python's own server, started as people start it, with the files of the bundle."""
    files = {file.role: str(bundle / file.path) for file in read_bundle(bundle).files}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", port, "--n_ctx", "1024"]
    command += ["--model", files["language_model"], "--clip_model_path", files["mmproj"], "--chat_format", "mtmd"]
    command += ["--model_alias", "reference/teacher", "--n_threads", "1", "--verbose", "false"]
    path = tmp_path_factory.mktemp("server") / "log"
    with path.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/v1/models", process, path)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url).close()
        except urllib.error.URLError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Easy questions of the reference test, with the paths of their pictures."""
    folder = tmp_path_factory.mktemp("test")
    rows = [json.loads(line) for line in write_test(folder, 40).read_text().splitlines()]
    easy = [row for row in rows if row["kind"] in ("sign_color", "line_top")]
    return [{**row, "image": str(folder / row["image"])} for row in easy]


def ask_all(vlm: Vlm, rows: list[dict[str, Any]]) -> list[Answer]:
    return vlm.answer([Image.open(row["image"]) for row in rows], [row["question"] for row in rows], Decoding(12))


def share_right(answers: list[Answer], rows: list[dict[str, Any]]) -> float:
    return sum(answer.text in row["answers"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def test_a_stock_server_answers_questions_about_pictures(stock_server: str, test_set: list[dict[str, Any]]) -> None:
    vlm = open_vlm(stock_server, concurrency=3)
    assert (vlm.name, vlm.engine, vlm.describe()["model"]) == ("teacher", "chat", "reference/teacher")
    answers = ask_all(vlm, test_set)
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert all(answer.text and (answer.prompt_tokens or 0) > 36 for answer in answers)
    # Its chat handler has other tokens and other tiles than the model was trained with; colours survive that.
    assert len(test_set) >= 5
    assert share_right(answers, test_set) >= 0.6
    assert [answer.text for answer in ask_all(vlm, test_set)] == [answer.text for answer in answers]
    (cut,) = vlm.answer([RED], ["Write a question about this picture and answer it."], Decoding(2))
    assert cut.finish_reason == "length"
    vlm.close()


def test_a_server_teaches_and_a_bundle_is_asked(
    stock_server: str, bundle: Path, test_set: list[dict[str, Any]]
) -> None:
    teacher, student = open_vlm(stock_server), open_vlm(str(bundle), name="asked", device="cpu", batch_size=4)
    assert (student.name, student.engine) == ("asked", "llama.cpp")
    rows = [Annotation(row["id"], row["id"], row["question"], row["answers"][0], "") for row in test_set]
    cases = Identifier(teacher, student, task_named("reference")).cases(
        rows, {row["id"]: Path(row["image"]) for row in test_set}
    )
    assert len(cases) == len(rows)
    assert {case.verdict for case in cases} <= {"parity", "agree", "unconfirmed"}
    # The runtime gives the model the tokens and pixels that it was trained with.
    assert sum(case.student_score for case in cases) / len(cases) >= 0.8
    student.close()


def test_a_bundle_may_be_the_teacher(bundle: Path, test_set: list[dict[str, Any]]) -> None:
    teacher = open_vlm(str(bundle))
    samples = [Sample(row["id"], row["image"], row["id"]) for row in test_set]
    written = Annotator(teacher, task_named("reference"), temperature=0).annotations(samples)
    assert sum(row.reason is None for row in written) >= len(samples) / 2
    assert teacher.describe()["engine"] == "llama.cpp"
    teacher.close()


def test_bench_measures_a_server_as_a_baseline(
    stock_server: str, test_set: list[dict[str, Any]], tmp_path: Path
) -> None:
    (teacher,) = variants_of((), (f"teacher={stock_server}#reference/teacher",))
    assert (teacher.name, teacher.role, teacher.engine) == ("teacher", "teacher", "chat")
    assert [one.name for one in variants_of((), (f"{stock_server}#reference/teacher",))] == ["teacher"]
    asks = [Ask(row["id"], row["image"], row["question"]).to_json() for row in test_set]
    job = Job(teacher.name, teacher.spec, 1, 12, 32, warm_up=[], latency=asks[:2], accuracy=asks)
    vlm = open_variant(job)
    work(vlm, job, tmp_path, lambda *_: None)
    vlm.close()
    measured = read_measured(tmp_path, reason=None)
    right = [measured.answers[row["id"]].text in row["answers"] for row in test_set]
    assert sum(right) >= 0.6 * len(right)
    assert all((row.wall_ms or 0) > 0 for row in measured.latency)
    assert measured.peak_memory_bytes is None  # ours says nothing about the server's
    assert size_bytes(teacher.spec) is None
    with pytest.raises(InputError, match="password"):
        variants_of((), ("teacher=http://me:word@host/v1",))
