"""What a run tells of itself: its log, the metrics file, and `mpa-edge status`, while it runs and afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from mpa_edge import run_events
from mpa_edge.cli import app
from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError, ModelError, RunError
from mpa_edge.fake import FakeVlm
from mpa_edge.run_events import Events, recorded
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.status import is_locked, status_of
from mpa_edge.tasks import task_named
from mpa_edge.training_set import make_training_set

ASKS = task_named("reference").annotate_prompts
KEY = "sk-not-to-be-seen"


class Teacher(FakeVlm):
    """Asks about each picture, but for the first, of which it writes nothing of use; breaks at `breaks_at`."""

    breaks_at = 1000
    asked = 0
    during: Any = None

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        Teacher.asked += len(images)
        if self.asked > self.breaks_at:
            raise ModelError(f"the server says: key {KEY} is over its quota")
        if self.during is not None:
            self.during()
        return [self._say(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _say(self, image: Image.Image, prompt: str) -> Answer:
        red = image.convert("RGB").tobytes()[0]
        if prompt in ASKS:
            return Answer("" if red == 0 else f"How red is {red}? {red}")
        return Answer(str(red))


@pytest.fixture
def config(tmp_path: Path) -> AlignConfig:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / f"{number:02}.png")
    (tmp_path / "photos" / "bad.png").write_text("no picture")
    return AlignConfig(
        images=str(tmp_path / "photos"),
        teacher="fake:",
        student="fake:",
        task="reference",
        out=tmp_path / "run",
        questions=1,
        chunk_size=4,
        metrics_file=tmp_path / "mpa.prom",
    )


def run(config: AlignConfig, **settings: Any) -> None:
    teacher, Teacher.asked = Teacher(), 0
    for name, value in settings.items():
        setattr(teacher, name, value)
    make_training_set(config, teacher, FakeVlm())


def log(config: AlignConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run / "log.jsonl").read_text().splitlines()]


def metrics(config: AlignConfig) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families((config.metrics_file or Path()).read_text())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_log_metrics_and_status_of_a_run_that_fails_and_is_resumed(
    config: AlignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPA_EDGE_API_KEY", KEY)
    with pytest.raises(ModelError):
        run(config, breaks_at=7)  # in the second part: its four annotations are lost with it
    rows = log(config)
    assert [row["event"] for row in rows if row["event"] != "progress"] == ["started", "finished", "failed"]
    assert rows[-1]["error"] == "ModelError"
    assert rows[-1]["message"] == "the server says: key *** is over its quota"
    assert KEY not in (config.run / "log.jsonl").read_text()
    broken = status_of(config.run)
    assert not broken.running
    assert broken.ended == broken.last_error == rows[-1]
    assert broken.stages["samples"]["skipped"] == {"unreadable": 1}
    assert (broken.parts["annotations"].written, broken.parts["annotations"].all) == (1, 3)
    assert metrics(config)["mpa_edge_failed",] == 1
    assert metrics(config)["mpa_edge_up",] == 0
    assert metrics(config)["mpa_edge_rejected_total", "no_question"] == 1

    seen: list[Any] = []
    run(config, during=lambda: seen.append((status_of(config.run), metrics(config))))
    during, scraped = seen[-1]
    assert during.running
    assert during.ended is None
    assert during.last_error == rows[-1]
    assert scraped["mpa_edge_up",] == 1
    done = status_of(config.run)
    assert not done.running
    assert done.ended is not None
    assert done.ended["event"] == "done"
    assert done.last_error is None
    assert "last error" in broken.summary()
    assert "last error" not in done.summary()
    assert {name: parts.written for name, parts in done.parts.items()} == {"annotations": 3, "cases": 3}
    assert done.stages["annotate"]["rejected"] == {"no_question": 1}
    assert done.progress is not None
    assert (done.progress["stage"], done.progress["done"], done.progress["of"]) == ("ask", 12, 12)
    assert metrics(config)["mpa_edge_stage_done", "ask"] == metrics(config)["mpa_edge_stage_all", "ask"] == 12
    assert [row["event"] for row in log(config)].count("started") == 2


def test_what_the_command_prints(config: AlignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config.model_copy(update={"out": tmp_path / "runs" / "a"}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    text = CliRunner().invoke(app, ["status"]).output  # the newest run
    assert "state        not running (done " in text
    assert "annotate     rows 12; rejected 1 no_question" in text
    assert "annotations/ 3 of 3 parts" in text
    told = json.loads(CliRunner().invoke(app, ["status", "runs/a", "--json"]).output)
    assert told["parts"]["cases"] == {"written": 3, "all": 3, "with_failures": 0}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(RunError, match="is no run folder"):
        status_of(tmp_path)


def test_a_log_is_bounded_and_goes_on_after_a_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_events, "MOST_BYTES", 2000)
    for _ in range(50):
        with recorded(tmp_path):
            pass
    assert sum(path.stat().st_size for path in tmp_path.glob("log*.jsonl")) < 5000
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"time": "2026')
    assert status_of(tmp_path).ended is not None
    with recorded(tmp_path):
        pass
    assert status_of(tmp_path).ended is not None


def test_progress_has_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(run_events.time, "monotonic", lambda: now[0])
    events = Events(tmp_path / "log.jsonl")
    for done in range(0, 1001, 10):
        events.progress("ask", done, 1000)
        now[0] += 1
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["done"] for row in rows] == [0, 300, 600, 900, 1000]
    assert rows[2]["rate"] == 10
    assert rows[2]["left_s"] == 40


def test_a_metrics_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(InputError, match=r"--metrics-file .*file/x\.prom: cannot be written")
    with refused, recorded(tmp_path, tmp_path / "file" / "x.prom"):
        raise AssertionError
    assert not is_locked(tmp_path)
    assert "last error" in status_of(tmp_path).summary()
    with pytest.raises(InputError, match=r"--metrics-file \.: cannot be written"), recorded(tmp_path, Path()):
        raise AssertionError


def test_no_message_forges_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError), recorded(tmp_path):
        raise InputError("x\nstate        running")
    (tmp_path / "run.json").write_text('{"stages": {"a\\nstate        running": {"rows": 1}}}')
    lines = status_of(tmp_path).summary().splitlines()
    assert len([line for line in lines if line.startswith("state")]) == 1
    assert [line for line in lines if r"x\nstate        running" in line]
