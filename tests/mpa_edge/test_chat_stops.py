"""What is tried again, what ends a run, and how it goes on: a chat server that fails, hangs, dies, or costs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from misbehaving import RED, SOON, ask, prompt_of, reply, serving
from mpa_edge.annotate import Annotator
from mpa_edge.chat_vlm import FAILED_IN_A_ROW, ChatVlm
from mpa_edge.errors import AGAIN, BudgetSpent, ModelError
from mpa_edge.models import open_vlm
from mpa_edge.parts import open_parts, read_parts
from mpa_edge.records import Annotation, Sample
from mpa_edge.runtime.vlm import Vlm
from mpa_edge.tasks import task_named

KEY = "sk-secret-0123456789"


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
        vlm = ChatVlm(server.url, "only", max_retries=5, timeout=1.0)
        with pytest.raises(ModelError, match="HTTP 401"):
            vlm.answer([RED] * 2, ["late", "bad"])
        assert vlm.answer([RED], ["good"])[0].text == "red"  # not that this call is over
        before = server.prompts.count("late")
        time.sleep(2.0)  # "late" would have been tried again by now
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
