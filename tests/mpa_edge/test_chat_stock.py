"""llama-cpp-python's own chat server with a model of ours: asked, teaching, measured."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mpa_edge.benchmarks
from misbehaving import RED
from mpa_edge.annotate import Annotator
from mpa_edge.benchmarks.measure import read_measured
from mpa_edge.benchmarks.reference import write_test
from mpa_edge.benchmarks.variants import size_bytes, variants_of
from mpa_edge.benchmarks.worker import Ask, Job, open_variant, work
from mpa_edge.bundle import read_bundle, write_bundle
from mpa_edge.errors import InputError
from mpa_edge.identify import Identifier
from mpa_edge.models import open_vlm
from mpa_edge.records import Annotation, Sample
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm
from mpa_edge.tasks import task_named

REFERENCE = Path(mpa_edge.benchmarks.__file__).parent / "reference"


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
