"""From pictures to the training set, with models that are told what to say: no torch, no weights."""

from __future__ import annotations

import json
import random
import shutil
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mpa_edge import asking, scan
from mpa_edge.bundle import sha256_of
from mpa_edge.config import AlignConfig
from mpa_edge.errors import FingerprintMismatch, InputError
from mpa_edge.fake import FakeVlm
from mpa_edge.parts import read_parts
from mpa_edge.records import Annotation, Case, Sample, read_rows
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.scan_index import Check, ScanIndex
from mpa_edge.tasks import task_named
from mpa_edge.training_set import TrainingSet, make_training_set

ASKS = task_named("reference").annotate_prompts
FAILED = Answer("", finish_reason="error", error="time-out")


class Teacher(FakeVlm):
    """Asks for the red of the corner and knows it; of pictures whose red is in `silent` it says nothing. A grey picture
    is answered with its own red, 128."""

    silent: frozenset[int] = frozenset()
    max_requests: int | None = None
    log: list[str]

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        self.log = [*getattr(self, "log", []), *prompts]
        return [self._say(image.getpixel((0, 0))[0], prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _say(self, red: int, prompt: str) -> Answer:
        if red in self.silent:
            return FAILED
        return Answer(f"What is the red of {red}? {red}" if prompt in ASKS else str(red))


class Student(FakeVlm):
    """Knows even reds."""

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        reds = [image.getpixel((0, 0))[0] for image in images]
        return [Answer(str(red) if red % 2 == 0 else "?") for red in reds]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 pictures of noise, with reds from 110 on in their corners."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for red in range(110, 140):
        image = Image.frombytes("RGB", (12, 12), random.Random(red).randbytes(12 * 12 * 3))
        image.putpixel((0, 0), (red, 0, 0))
        image.save(folder / f"{red}.png")
    return folder


def make(photos: Path | str, out: Path, teacher: FakeVlm | None = None, **settings: Any) -> TrainingSet:
    usual: dict[str, Any] = {"chunk_size": 8, "mix": 0.0, "questions": 1, "task": "reference"}
    config = AlignConfig(images=str(photos), teacher="t", student="s", out=out, **{**usual, **settings})
    return make_training_set(config, teacher or Teacher(), Student())


def files(out: Path) -> dict[str, bytes]:
    """All but the lock and run.json, which holds times."""
    ours = (
        path
        for path in out.rglob("*")
        if path.is_file() and path.name not in (".lock", ".scan.sqlite", "log.jsonl", "run.json")
    )
    return {str(path.relative_to(out)): path.read_bytes() for path in ours}


def test_parts_of_cases_are_those_of_the_same_pictures(photos: Path, tmp_path: Path) -> None:
    made = make(photos, tmp_path / "run")
    assert made.counts.verdicts == {"agree": 15, "parity": 15}
    assert made.counts.training == {"parity": 15}
    for number in range(4):
        name = f"part-{number:05d}.jsonl"
        of = [
            [json.loads(line)["sample_id"] for line in (tmp_path / "run" / stage / name).read_text().splitlines()]
            for stage in ("annotations", "cases")
        ]
        assert of[0] == of[1]
        assert len(of[0]) == (8 if number < 3 else 6)


def test_each_part_is_identified_before_the_next_is_annotated(photos: Path, tmp_path: Path) -> None:
    teacher = Teacher()
    make(photos, tmp_path / "run", teacher)
    kinds = "".join("w" if prompt in ASKS else "a" for prompt in teacher.log)
    assert kinds == ("w" * 8 + "a" * 8) * 3 + "w" * 6 + "a" * 6


def test_votes_and_the_blind_check_reach_the_cases(photos: Path, tmp_path: Path) -> None:
    made = make(photos, tmp_path / "run", votes=3, blind=True)
    assert made.counts.verdicts == {"agree": 14, "blind": 1, "parity": 15}  # 128 is the grey picture's red
    cases = list(read_parts(tmp_path / "run" / "cases", Case))
    assert all(len(case.votes) == 3 for case in cases)
    assert {case.blind_answer for case in cases} == {"128"}
    assert make(photos, tmp_path / "all", votes=3, blind=True, select="all").counts.training == {
        "agree": 14,
        "parity": 15,
    }


def test_a_question_that_comes_too_often_is_collapsed(photos: Path, tmp_path: Path) -> None:
    class Bore(Teacher):
        def _say(self, red: int, prompt: str) -> Answer:
            return Answer("How red? 7" if prompt in ASKS else "7")

    made = make(photos, tmp_path / "run", Bore(), question_share=0.1)
    assert (made.counts.collapsed, sum(made.counts.training.values())) == (10, 20)  # 20 always may stay
    dropped = [json.loads(line)["id"] for line in (tmp_path / "run" / "collapsed.jsonl").read_text().splitlines()]
    trained = [json.loads(line)["id"] for line in made.path.read_text().splitlines()]
    assert not set(dropped) & set(trained)
    assert len(dropped) == 10
    log = json.loads((tmp_path / "run" / "run.json").read_text())
    assert log["stages"]["select"]["collapsed"] == 10


def test_what_failed_is_asked_again_by_the_next_run_and_nothing_else(photos: Path, tmp_path: Path) -> None:
    teacher = Teacher()
    teacher.silent = frozenset((111, 112, 125))
    first = make(photos, tmp_path / "run", teacher)
    assert first.rejected == {"teacher_error": 3}
    teacher.silent, teacher.log = frozenset((112,)), []
    second = make(photos, tmp_path / "run", teacher)
    assert second.rejected == {"teacher_error": 1}
    assert [prompt in ASKS for prompt in teacher.log] == [True, True, False, True, False]
    teacher.silent, teacher.log = frozenset(), []
    make(photos, tmp_path / "run", teacher)
    assert [prompt in ASKS for prompt in teacher.log] == [True, False]
    make(photos, tmp_path / "undisturbed")
    assert {name: data for name, data in files(tmp_path / "run").items() if not name.startswith(".")} == {
        name: data for name, data in files(tmp_path / "undisturbed").items() if not name.startswith(".")
    }


def test_what_failed_stays_once_there_was_training(photos: Path, tmp_path: Path) -> None:
    teacher = Teacher()
    teacher.silent = frozenset((111,))
    first = make(photos, tmp_path / "run", teacher)
    before = first.path.read_bytes()
    (tmp_path / "run" / "student").mkdir()
    (tmp_path / "run" / "student" / "stage.json").write_text("{}")
    teacher.silent, teacher.log = frozenset(), []
    second = make(photos, tmp_path / "run", teacher)
    assert (second.rejected, second.path.read_bytes(), teacher.log) == ({"teacher_error": 1}, before, [])


def test_a_run_that_is_finished_asks_nothing(photos: Path, tmp_path: Path) -> None:
    before = make(photos, tmp_path / "run")
    teacher = Teacher()
    assert make(photos, tmp_path / "run", teacher) == before
    assert not hasattr(teacher, "log")


def test_the_list_of_pictures_is_written_again_only_where_it_is_another(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "run")
    samples = tmp_path / "run" / "samples.jsonl"
    written, content = samples.stat().st_mtime_ns, samples.read_bytes()
    make(photos, tmp_path / "run")
    assert samples.stat().st_mtime_ns == written
    samples.write_bytes(content[:-9])
    make(photos, tmp_path / "run")
    assert samples.read_bytes() == content
    photos.rename(tmp_path / "moved")
    make(tmp_path / "moved", tmp_path / "run")
    assert samples.read_bytes() == content.replace(b"/photos/", b"/moved/") != content


def test_a_run_and_its_pictures_can_be_moved(photos: Path, tmp_path: Path) -> None:
    before = make(photos, tmp_path / "a" / "run")
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "a" / "run", tmp_path / "b" / "run")
    moved = photos.rename(tmp_path / "b" / "pictures")
    teacher = Teacher()
    after = make(moved, tmp_path / "b" / "run", teacher)
    assert not hasattr(teacher, "log")
    assert after.counts == before.counts
    row = json.loads((tmp_path / "b" / "run" / "parity.jsonl").read_text().splitlines()[0])
    assert (tmp_path / "b" / "run" / row["images"][0]).is_file()


def test_settings_of_the_training_set_redo_it_from_the_answers_that_are_there(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "run")
    teacher = Teacher()
    for settings in ({"select": "all"}, {"mix": 0.5}, {"target": "written"}, {"question_share": 0.5}, {"epochs": 1}):
        again = make(photos, tmp_path / "run", teacher, **settings)
        make(photos, tmp_path / "fresh", fresh=True, **settings)
        assert again.path.read_bytes() == (tmp_path / "fresh" / "parity.jsonl").read_bytes()
    assert not hasattr(teacher, "log")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"questions": 2}, "--questions: was 1, is 2"),
        ({"votes": 3}, "--votes: was 1, is 3"),
        ({"blind": True}, "--blind: was False, is True"),
        ({"limit": 7}, "--limit: was None, is 7"),
        ({"task": "textvqa"}, "--task"),
    ],
)
def test_what_was_asked_is_not_mixed_with_other_questions(
    photos: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    make(photos, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(FingerprintMismatch, match=says) as error:
        make(photos, tmp_path / "run", **settings)
    assert "--fresh" in str(error.value)
    assert files(tmp_path / "run") == before


def test_fresh_deletes_nothing_before_there_are_pictures(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "run")
    (tmp_path / "run" / "merged").mkdir()
    before = {name for name in files(tmp_path / "run") if not name.startswith(".")}
    with pytest.raises(InputError, match="--images"):
        make(str(photos) + "typo", tmp_path / "run", fresh=True)
    assert before <= files(tmp_path / "run").keys()
    assert (tmp_path / "run" / "merged").exists()
    make(photos, tmp_path / "run", fresh=True, limit=9)
    assert not (tmp_path / "run" / "merged").exists()  # of a student that is no more


def test_the_training_set_is_written_for_other_trainers_too(photos: Path, tmp_path: Path) -> None:
    made = make(photos, tmp_path / "run", save_as=("llava",))
    rows = json.loads((tmp_path / "run" / "parity.llava.json").read_text())
    assert len(rows) == sum(made.counts.training.values()) == 15


def test_pictures_of_the_test_are_kept_out_unless_asked_for(photos: Path, tmp_path: Path) -> None:
    row = {"image": str(photos / "111.png"), "question": "What?", "answers": ["x"]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    made = make(photos, tmp_path / "run", test=str(tmp_path / "test.jsonl"))
    assert made.scanned.shared == made.scanned.skipped["in_test"] > 0
    assert made.scanned.pictures == 30 - made.scanned.shared
    skipped = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert "111.png" in skipped
    kept = make(photos, tmp_path / "kept", test=str(tmp_path / "test.jsonl"), keep_shared=True)
    with pytest.raises(FingerprintMismatch, match=r"--images: was .*--test: was .*, is None"):
        make(photos, tmp_path / "run")
    assert (kept.scanned.pictures, kept.scanned.shared, kept.scanned.skipped) == (30, made.scanned.shared, {})


@pytest.mark.parametrize("source", ["folder", "table"])
def test_limit_counts_pictures_that_the_test_does_not_have(photos: Path, tmp_path: Path, source: str) -> None:
    rows = [
        {"image": str(photos / f"{red}.png"), "question": "What?", "answers": ["x"]} for red in (111, 113, 115, 139)
    ]
    test, images = tmp_path / "test.jsonl", photos
    test.write_text("\n".join(map(json.dumps, rows)))
    if source == "table":
        images = tmp_path / "photos.parquet"
        cells = [path.read_bytes() for path in sorted(photos.iterdir())]
        parquet.write_table(pyarrow.table({"image": cells}), images)
    run = tmp_path / "run"
    for _ in range(2):  # going on finds the same pictures
        scanned = make(images, run, test=str(test), limit=5).scanned
        assert (scanned.pictures, scanned.shared, scanned.skipped) == (5, 3, {"in_test": 3})
    used = {row.sha256 for row in read_rows(run / "samples.jsonl", Sample)}
    assert used == {sha256_of(photos / f"{red}.png") for red in (110, 112, 114, 116, 117)}
    assert make(images, tmp_path / "all", test=str(test), limit=30).scanned.pictures == 26
    assert make(images, tmp_path / "kept", test=str(test), limit=5, keep_shared=True).scanned.pictures == 5


def test_pictures_of_the_test_that_cannot_be_looked_at_are_counted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": str(photos / name), "question": "What?", "answers": ["x"]} for name in ("111.png", "none.png")]
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(map(json.dumps, rows)))
    made = make(photos, tmp_path / "run", test=str(test))
    assert made.scanned.test_pictures == (1, 2)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["samples"]["test_pictures"] == [1, 2]
    assert f"--test {test}: only 1 of its 2 pictures could be looked at" in capsys.readouterr().err
    test.write_text(json.dumps(rows[1]))
    with pytest.raises(InputError, match=f"--test {test}: none of its pictures can be read"):
        make(photos, tmp_path / "other", test=str(test))


def test_a_budget_that_no_part_fits_in_is_said_at_once(photos: Path, tmp_path: Path) -> None:
    teacher = Teacher()
    teacher.max_requests = 20
    with pytest.raises(InputError, match=r"--max-requests 20: one part of 8 pictures may take 24.*--chunk-size"):
        make(photos, tmp_path / "run", teacher, votes=3)
    teacher.max_requests = 15  # no room for an attempt that fails
    with pytest.raises(InputError, match=r"--max-requests 15: one part of 8 pictures may take 16"):
        make(photos, tmp_path / "run", teacher)
    teacher.max_requests = 24
    make(photos, tmp_path / "run", teacher, votes=3)


def test_a_part_of_more_questions_than_the_budget_is_not_begun(photos: Path, tmp_path: Path) -> None:
    class Eager(Teacher):
        """Writes three questions where one is wanted."""

        def _say(self, red: int, prompt: str) -> Answer:
            several = "\n".join(f"What is {n} and the red of {red}? {red + n}" for n in range(3))
            return Answer(several if prompt in ASKS else str(red))

    teacher = Eager()
    teacher.max_requests = 20
    for _ in range(2):
        with pytest.raises(InputError, match=r"--max-requests 20: a part of 24 questions may take 24.*--chunk-size"):
            make(photos, tmp_path / "run", teacher)
    assert len(teacher.log) == 8  # what was annotated is kept, and paid for once
    teacher.max_requests = 24
    make(photos, tmp_path / "run", teacher)


# --- many pictures ---------------------------------------------------------------------------------------------------


def growth(monkeypatch: pytest.MonkeyPatch, out: Path, pictures: int) -> tuple[int, float]:
    """The peak of traced memory from the first question on, in bytes, and the seconds of a resume."""
    image = Image.new("RGB", (8, 8), (3, 0, 0))
    monkeypatch.setattr(asking, "open_image", lambda path: image)

    def scanned(*_: Any, **__: Any) -> ScanIndex:
        index = ScanIndex(None, {})
        names = ((number, number.to_bytes(32, "big")) for number in range(pictures))
        index.put(Check(digest, f"/photos/{number}.jpg", sha256=digest) for number, digest in names)
        index.finish()
        return index

    monkeypatch.setattr(scan, "scan", scanned)
    listed = out.with_suffix(".txt")
    listed.write_text("".join(f"/photos/{number}.jpg\n" for number in range(pictures)))

    class Starts(Teacher):
        log: list[str] = []  # noqa: RUF012
        places = iter(range(10 * pictures))
        now: dict[bool, int] = {}  # noqa: RUF012

        def answer(self, images: Sequence[Any], prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[Answer]:
            if not tracemalloc.is_tracing():
                tracemalloc.start()
            asks = prompts[0] in ASKS
            return [Answer(f"What is {next(self.places)}? red" if asks else "red") for _ in prompts]

    make(listed, out, Starts(), chunk_size=128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    start = time.perf_counter()
    make(listed, out, chunk_size=128)
    return peak, time.perf_counter() - start


def test_memory_hardly_grows_with_the_number_of_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A picture's rows are some two kilobytes; what is kept of each is some keys."""
    # Not from nearly none on: what blocks and buffers take is there at a thousand.
    few, _ = growth(monkeypatch, tmp_path / "few", 1280)
    many, seconds = growth(monkeypatch, tmp_path / "many", 2560)
    assert (many - few) / 1280 < 500
    assert seconds < 30
    assert sum(1 for _ in read_parts(tmp_path / "many" / "annotations", Annotation)) == 2560
