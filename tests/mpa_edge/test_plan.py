"""What a run would take, told beforehand and measured on a few pictures."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import mpa_edge.datasets
import mpa_edge.plan
from mpa_edge.cli import app
from mpa_edge.config import AlignConfig
from mpa_edge.datasets import scan_images
from mpa_edge.errors import InputError
from mpa_edge.models import open_vlm
from mpa_edge.plan import Plan, Stage, plan_models
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding, Vlm
from mpa_edge.tasks import TASKS

QUESTIONS = ("What is it?", "How many?")


class Teller:
    """A teacher and a student in one: writes a question with the answer that it gives again when asked."""

    name = "teller"

    def __init__(self, engine: str = "fake", fails: bool = False) -> None:
        self.engine, self.sent, self.fails = engine, 0, fails
        self.seen: list[int] = []

    def answer(self, images: Any, prompts: Any, decoding: Decoding = GREEDY) -> list[Answer]:
        self.sent += len(prompts)
        self.seen.append(len(prompts))
        return [Answer(self._text(prompt, decoding.seed)) for prompt in prompts]

    def _text(self, prompt: str, seed: int) -> str:
        if prompt != TASKS["reference"].annotate_prompt:
            return "cat"
        return "no pair" if self.fails else f"Question: {QUESTIONS[seed]}\nAnswer: cat"

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (24, 24), (number, 0, 0)).save(folder / f"{number:02d}.png")
    (folder / "broken.png").write_bytes(b"")
    return folder


def config(images: Path | str, **settings: Any) -> AlignConfig:
    usual = {"teacher": "t", "student": "s", "task": "reference", "questions": 2, "batch_size": 16}
    return AlignConfig(**{**usual, "images": str(images), "out": Path(images).parent / "run", **settings})


def counts(plan: Plan) -> dict[str, dict[str, int]]:
    return {stage.name: stage.counts for stage in plan.stages}


def test_pictures_and_requests_of_each_stage(images: Path) -> None:
    teacher, student = Teller(), Teller()
    plan = plan_models(config(images, votes=3, blind=True, rounds=2), teacher, student)
    assert (plan.pictures, plan.skipped, plan.shared, plan.sampled) == (60, {"unreadable": 1}, None, 24)
    assert counts(plan) == {
        "annotate": {"questions to the teacher": 120},
        "identify": {"votes of the teacher": 360, "blind questions": 120, "questions to the student": 120},
        "rounds": {"questions to the student": 120},
        "train": {"rows": 0},  # the student and the teacher agree blindly
    }
    assert all(stage.seconds and 0 <= stage.seconds[0] <= stage.seconds[1] for stage in plan.stages[:3])
    text = plan.summary()
    assert "60 to ask about; 1 unreadable skipped" in text
    assert "360 votes of the teacher" in text
    assert "measured on 24 pictures" in text


def test_nothing_is_written_into_the_run(images: Path) -> None:
    plan_models(config(images), Teller(), Teller())
    run = images.parent / "run"
    assert not run.exists()
    run.mkdir()
    scan_images(images, cache=run / ".scan.sqlite")
    before = (run / ".scan.sqlite").stat().st_mtime_ns
    plan_models(config(images), Teller(), Teller())
    assert [path.name for path in run.iterdir()] == [".scan.sqlite"]
    assert (run / ".scan.sqlite").stat().st_mtime_ns == before


def test_a_damaged_cache_of_the_run_is_not_used(images: Path) -> None:
    cache = images.parent / "run" / ".scan.sqlite"
    scan_images(images, cache=cache)
    whole = cache.read_bytes()
    kept = 3 * 4096  # the schema and the rules; the checks come after them
    for damaged in (b"no database", whole[:kept], whole[:-1], whole[:kept] + bytes(len(whole) - kept)):
        cache.write_bytes(damaged)
        plan = plan_models(config(images), Teller(), Teller())
        assert (plan.pictures, plan.skipped) == (60, {"unreadable": 1})
        assert cache.read_bytes() == damaged


def test_the_cache_is_copied_while_a_run_writes_to_it(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = images.parent / "run" / ".scan.sqlite"
    scan_images(images, cache=cache)
    with closing(sqlite3.connect(cache, isolation_level=None)) as run:
        run.execute("BEGIN IMMEDIATE")
        run.execute("DELETE FROM checks")
        opened: list[bytes] = []
        monkeypatch.setattr(mpa_edge.datasets, "_read", lambda path, status: opened.append(path))
        assert plan_models(config(images), Teller(), Teller()).pictures == 60
        run.execute("COMMIT")
    assert opened == []


def test_the_sample_is_spread_over_the_pictures(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = mpa_edge.plan.Annotator.annotations

    def noting(self: Any, samples: Any) -> Any:
        asked.extend(Path(sample.path).name for sample in samples)
        return real(self, samples)

    monkeypatch.setattr(mpa_edge.plan.Annotator, "annotations", noting)
    plan_models(config(images), Teller(), Teller())
    assert (len(asked), asked[0]) == (26, "00.png")
    assert asked[-1] > "55"
    assert len(set(asked)) == 26


def test_of_many_pictures_only_the_sample_is_held(images: Path, tmp_path: Path) -> None:
    found = mpa_edge.plan._look(config(images), tmp_path)
    assert (found.count, len(found.samples)) == (60, 26)


def test_what_is_measured_is_one_copy_of_the_models(images: Path) -> None:
    pytest.importorskip("ray")
    plan = plan_models(config(images, engine="ray", actors=4), Teller(), Teller())
    assert "in this process, with one copy of the models; N actors of --engine ray" in plan.summary()
    assert "--engine ray" not in plan_models(config(images), Teller(), Teller()).summary()


def test_slow_models_are_asked_about_few(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpa_edge.plan, "QUICK_SECONDS", 0)
    assert plan_models(config(images), Teller(), Teller()).sampled == 16


@pytest.mark.parametrize(("budget", "pictures"), [(None, 16), (40, 4), (12, 2), (5, 0)])
def test_a_server_is_asked_little_and_its_budget_kept(images: Path, budget: int | None, pictures: int) -> None:
    teacher = Teller("chat")
    plan = plan_models(config(images, max_requests=budget), teacher, Teller())
    assert plan.sampled == pictures
    assert teacher.sent <= (budget or 1000)
    of = f" of the {budget} of --max-requests" if budget else ""
    assert f"the sample took {teacher.sent} requests{of}" in plan.notes
    assert (plan.stages[0].seconds is None) == (pictures == 0)
    assert ("without what was not measured" in plan.summary()) or pictures > 0


def test_limit_and_the_pictures_of_the_test(images: Path, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.png").write_bytes((images / "03.png").read_bytes())
    test = tmp_path / "test" / "t.jsonl"
    test.write_text(json.dumps({"image": "t.png", "question": "q", "answers": ["a"]}))
    plan = plan_models(config(images, limit=10, test=str(test)), Teller(), Teller())
    assert (plan.pictures, plan.shared) == (10, 1)
    assert "1 shared with --test" in plan.summary()
    assert not any("--test" in note for note in plan.notes)
    test.write_text(f'{test.read_text()}\n{{"image": "none.png", "question": "q", "answers": ["a"]}}')
    plan = plan_models(config(images, limit=10, test=str(test)), Teller(), Teller())
    assert "of --test only 1 of 2 pictures could be looked at" in plan.notes
    assert plan_models(config(images, limit=10, test=str(test), keep_shared=True), Teller(), Teller()).pictures == 10


def test_of_a_table_only_the_sample_is_looked_at(images: Path, tmp_path: Path) -> None:
    cells = [path.read_bytes() for path in sorted(images.glob("[0-9]*.png"))] * 5
    pq.write_table(pa.table({"image": cells}), tmp_path / "p.parquet")
    plan = plan_models(config(tmp_path / "p.parquet"), Teller(), Teller())
    assert plan.pictures == 300
    assert plan.disk["pictures"] == pytest.approx(300 * len(cells[0]), rel=0.2)
    assert any("were not looked at but for 26" in note for note in plan.notes)
    assert not any("--test" in note for note in plan.notes)
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "images/03.png", "question": "q", "answers": ["a"]}))
    plan = plan_models(config(tmp_path / "p.parquet", test=str(tmp_path / "t.jsonl")), Teller(), Teller())
    assert plan.shared is None
    assert any("those that --test has too are still counted" in note for note in plan.notes)


def test_a_teacher_that_writes_no_pairs(images: Path) -> None:
    plan = plan_models(config(images), Teller(fails=True), Teller())
    assert counts(plan)["identify"]["questions to the student"] == 0
    assert any("no annotation of the sample could be used" in note for note in plan.notes)


def test_pictures_that_cannot_be_are_refused_before_any_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--images"):
        plan_models(config(tmp_path / "none"), Teller(), Teller())


def test_the_real_pair(tiny_pair: Any, tmp_path: Path) -> None:
    teacher, student = (open_vlm(str(folder), device="cpu") for folder in (tiny_pair.teacher, tiny_pair.student))
    settings = config(tiny_pair.images, out=tmp_path / "run", select="all", epochs=4, save_as=("llava",))
    plan = plan_models(settings, teacher, student)
    train = plan.stages[-1]
    assert train.name == "train"
    assert 10 < train.counts["rows"] <= 48
    assert train.seconds is not None
    assert 0 < train.seconds[0] < train.seconds[1]
    assert plan.disk["student"] > 1000
    # An adapter is its weights in float32; a checkpoint has four such, and there may be two of them.
    adapter = plan.disk["student"] - 3000
    assert 6 * adapter < plan.disk["checkpoints of training"] < 8 * plan.disk["student"]
    assert plan.disk["training set"] > 2 * 200 * train.counts["rows"]
    assert plan.seconds[0] == pytest.approx(sum(stage.seconds[0] for stage in plan.stages if stage.seconds))
    assert not settings.run.exists()


def test_the_command_line(tiny_pair: Any, tmp_path: Path) -> None:
    flags = ["--images", tiny_pair.images, "--teacher", tiny_pair.teacher, "--student", tiny_pair.student]
    words = ["align", "--plan", *flags, "--task", "reference", "--out", tmp_path / "run", "--device", "cpu"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    for word in ("pictures     24 to ask about", "annotate", "identify", "train", "time", "disk"):
        assert word in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((0.2, 0.3), "0 s"),
        ((20, 80), "20 s to 80 s"),
        ((100, 1000), "1.7 min to 17 min"),
        ((9000, 1e6), "2.5 h to 12 days"),
    ],
)
def test_durations_as_people_say_them(seconds: tuple[float, float], text: str) -> None:
    plan = Plan(1, {}, None, 1, (Stage("annotate", {}, seconds),), {})
    assert f"time         {text};" in plan.summary()


def test_the_fake_of_these_tests_is_a_model() -> None:
    assert isinstance(Teller(), Vlm)


def test_an_empty_table_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    command = ["align", "--images", str(tmp_path / "none.parquet"), "--teacher", "fake:", "--student", "fake:"]
    result = CliRunner().invoke(app, [*command, "--task", "reference", "--out", str(tmp_path / "run"), "--plan"])
    assert isinstance(result.exception, InputError)
