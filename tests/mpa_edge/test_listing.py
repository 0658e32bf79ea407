"""A resume looks at the pictures again where their source has changed, and only then."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mpa_edge import datasets, training_set
from mpa_edge.config import AlignConfig
from mpa_edge.fake import FakeVlm
from mpa_edge.run_folder import RunFolder
from mpa_edge.training_set import Scanned, TrainingSetMaker, describe


def photo(path: Path, red: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), (red, 0, 0)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for red in range(3):
        photo(tmp_path / "photos" / f"{red}.png", red)
    return tmp_path / "photos"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that the pictures are looked at."""
    times: list[int] = []
    find = training_set.find_pictures

    def finds(config: AlignConfig, run: RunFolder) -> object:
        times.append(1)
        return find(config, run)

    monkeypatch.setattr(training_set, "find_pictures", finds)
    return times


def scan(images: Path, **settings: object) -> Scanned:
    out = images.with_name("run")
    config = AlignConfig(images=str(images), teacher="t", student="s", task="reference", out=out, **settings)  # type: ignore[arg-type]
    return TrainingSetMaker(config, RunFolder(out), describe(teacher=FakeVlm(), student=FakeVlm())).scan()


def test_a_source_that_is_as_it_was_is_not_looked_at(photos: Path, looks: list[int]) -> None:
    (photos / "notes.txt").write_text("not a picture")
    first = scan(photos)
    assert (first, first.pictures, first.skipped, looks) == (scan(photos), 3, {"not_an_image": 1}, [1])


def times_later(photos: Path) -> None:
    path = photos / "0.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "pictures"),
    [
        (lambda photos: photo(photos / "deep" / "3.png", 3), 4),
        (lambda photos: (photos / "0.png").unlink(), 2),
        (lambda photos: (photos / "0.png").rename(photos / "new.png"), 3),
        (lambda photos: (photos / "0.png").write_bytes(b"rubbish"), 2),
        (times_later, 3),
        (lambda photos: (photos.with_name("run") / "samples.jsonl").write_text(""), 3),
        (lambda photos: (photos.with_name("run") / "skipped.jsonl").unlink(), 3),
    ],
    ids=["more", "fewer", "renamed", "rewritten", "touched", "list damaged", "skipped gone"],
)
def test_a_source_that_changed_is_looked_at_again(
    photos: Path, looks: list[int], change: Callable[[Path], object], pictures: int
) -> None:
    scan(photos)
    change(photos)
    assert (scan(photos).pictures, looks) == (pictures, [1, 1])
    lines = (photos.with_name("run") / "samples.jsonl").read_text().splitlines()
    assert len(lines) == pictures


def test_settings_that_choose_pictures_are_part_of_it(photos: Path, looks: list[int]) -> None:
    scan(photos)
    assert scan(photos, limit=2).pictures == 2
    assert scan(photos, limit=2, fresh=True).pictures == 2
    assert looks == [1, 1, 1]


def test_a_test_that_changed_is_looked_at_again(photos: Path, looks: list[int], tmp_path: Path) -> None:
    test = tmp_path / "test" / "test.jsonl"
    photo(test.with_name("t.png"), 200)
    test.write_text('{"image": "t.png", "question": "?", "answers": ["x"]}\n')
    assert (scan(photos, test=str(test)).shared, scan(photos, test=str(test)).test_pictures) == (0, (1, 1))
    photo(test.with_name("t.png"), 1)
    again = scan(photos, test=str(test))
    assert (again.shared, again.pictures, looks) == (1, 2, [1, 1])


def test_a_picture_that_moves_from_the_pool_to_the_test_is_missed_in_the_pool(photos: Path, tmp_path: Path) -> None:
    names = [str(photos / f"{red}.png") for red in range(3)]
    pool, test = tmp_path / "pool.txt", tmp_path / "test.jsonl"

    def cut(count: int) -> Scanned:
        pool.write_text("\n".join(names[:count]))
        rows = [{"image": f"photos/{Path(name).name}", "question": "?", "answers": ["x"]} for name in names[count:]]
        test.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return scan(pool, test=str(test))

    assert [cut(2).pictures, cut(1).pictures] == [2, 1]


def test_a_file_that_the_system_did_not_give_is_tried_again(
    photos: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_read", fails_for("1.png", datasets._read))
        assert (scan(photos).skipped, scan(photos).skipped) == ({"unreadable": 1}, {"unreadable": 1})
    assert (scan(photos).pictures, scan(photos).pictures, looks) == (3, 3, [1, 1, 1])


def test_a_picture_of_the_test_that_the_system_did_not_give_is_tried_again(
    photos: Path, looks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test" / "test.jsonl"
    for red in (1, 200):
        photo(test.with_name(f"{red}.png"), red)
    rows = [{"image": f"{red}.png", "question": "?", "answers": ["x"]} for red in (1, 200)]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails_for("test/1.png", Path.read_bytes))
        for _ in range(2):
            assert scan(photos, test=str(test)).test_pictures == (1, 2)
            assert "only 1 of its 2 pictures" in capsys.readouterr().err
    again = [scan(photos, test=str(test)) for _ in range(2)]
    assert ([found.shared for found in again], [found.pictures for found in again]) == ([1, 1], [2, 2])
    assert looks == [1, 1, 1]


def fails_for(name: str, read: Callable[..., bytes]) -> Callable[..., bytes]:
    def reads(path: Path, *arguments: object) -> bytes:
        if str(path).endswith(name):
            raise OSError(errno.EIO, "Input/output error")
        return read(path, *arguments)

    return reads


def test_a_tables_pictures_that_went_missing_are_written_again(photos: Path, looks: list[int], tmp_path: Path) -> None:
    table = tmp_path / "photos.parquet"
    rows = [{"image": {"bytes": path.read_bytes()}} for path in sorted(photos.iterdir())]
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    assert scan(table) == scan(table)
    next((tmp_path / "run" / "images").iterdir()).unlink()
    assert (scan(table).pictures, looks) == (3, [1, 1])
    assert len(list((tmp_path / "run" / "images").iterdir())) == 3


def test_fresh_sees_a_picture_that_took_the_place_of_one_that_a_table_names(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "photos.parquet"
    rows = [{"image": f"photos/{path.name}"} for path in sorted(photos.iterdir())]
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    before = scan(table)
    photo(photos / "1.png", 9)
    assert scan(table, fresh=True).digest != before.digest


def test_a_note_of_which_a_byte_flipped_counts_for_nothing(photos: Path, looks: list[int]) -> None:
    scan(photos)
    note = photos.with_name("run") / ".samples.json"
    note.write_text(note.read_text().replace('"pictures": 3', '"pictures": 2'))
    assert (scan(photos).pictures, looks) == (3, [1, 1])
