from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.datasets import MIN_EDGE, Skipped, scan_images
from mpa_edge.errors import InputError
from mpa_edge.records import Sample


def picture(path: Path, shade: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.effect_noise(size, 60).convert("RGB")
    image.putpixel((0, 0), (shade, shade, shade))
    image.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good pictures, one of each kind of bad one."""
    root = tmp_path / "pictures"
    for number, name in enumerate(("b.jpg", "a.PNG", "sub/c.webp", "sub/deep/d.gif")):
        picture(root / name, number)
    (root / "sub" / "copy.jpg").write_bytes((root / "b.jpg").read_bytes())
    whole = picture(root / "truncated.jpg", 9, (200, 150)).read_bytes()
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("this is no picture")
    (root / "empty.png").write_bytes(b"")
    picture(root / "one.png", 1, (1, 1))
    (root / "notes.txt").write_text("about the pictures")
    (root / ".hidden.png").write_bytes(b"")
    picture(root / ".thumbnails" / "t.png", 3)
    return root


def names(rows: list[Sample] | list[Skipped], root: Path) -> list[str]:
    return [Path(row.path).relative_to(root).as_posix() for row in rows]


def test_every_file_is_a_sample_or_has_a_reason(folder: Path) -> None:
    samples, skipped = scan_images(folder)
    assert names(samples, folder) == ["a.PNG", "b.jpg", "sub/c.webp", "sub/deep/d.gif"]
    assert {Path(item.path).name: item.reason for item in skipped} == {
        "copy.jpg": "duplicate",
        "empty.png": "unreadable",
        "notes.txt": "not_an_image",
        "one.png": "too_small",
        "text.png": "unreadable",
        "truncated.jpg": "truncated",
    }
    duplicate = next(item for item in skipped if item.reason == "duplicate")
    assert duplicate.detail == f"same content as {folder / 'b.jpg'}"
    assert all(item.detail for item in skipped if item.reason != "not_an_image")


def test_ids_are_unique_come_from_the_content_and_survive_a_move(folder: Path) -> None:
    before, _ = scan_images(folder)
    moved = folder.rename(folder.with_name("moved"))
    after, _ = scan_images(moved)
    assert len({sample.id for sample in before}) == 4
    assert [sample.id for sample in before] == [sample.id for sample in after]
    assert all(sample.sha256.startswith(sample.id) for sample in before)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(folder: Path, workers: int) -> None:
    assert scan_images(folder, workers=workers) == scan_images(folder)


def test_min_edge(tmp_path: Path) -> None:
    picture(tmp_path / "small.png", 1, (MIN_EDGE - 1, 50))
    picture(tmp_path / "enough.png", 2, (MIN_EDGE, 50))
    samples, skipped = scan_images(tmp_path)
    assert (names(samples, tmp_path), names(skipped, tmp_path)) == (["enough.png"], ["small.png"])
    assert len(scan_images(tmp_path, min_edge=1)[0]) == 2


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "fine.png", 1)
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    _, skipped = scan_images(tmp_path)
    assert [item.reason for item in skipped] == ["too_large"]
    monkeypatch.setattr("mpa_edge.datasets.MAX_BYTES", (tmp_path / "fine.png").stat().st_size)
    _, skipped = scan_images(tmp_path)
    assert "bytes, at most" in skipped[0].detail


def test_a_glob_and_a_single_file(folder: Path) -> None:
    samples, skipped = scan_images(f"{folder}/**/*.*g")
    assert names(samples, folder) == ["b.jpg"]
    assert Counter(item.reason for item in skipped)["duplicate"] == 1
    assert names(scan_images(folder / "a.PNG")[0], folder) == ["a.PNG"]


def test_a_list_file(folder: Path) -> None:
    listed = folder / "list.txt"
    listed.write_text(f"b.jpg\r\n\nsub/c.webp\nb.jpg\ngone.png\n{folder / 'a.PNG'}\nnotes.txt\n")
    samples, skipped = scan_images(listed)
    assert names(samples, folder) == ["a.PNG", "b.jpg", "sub/c.webp"]
    assert {Path(item.path).name: item.reason for item in skipped} == {"gone.png": "missing", "notes.txt": "unreadable"}


def test_names_of_a_list_are_as_short_as_those_of_a_folder(folder: Path) -> None:
    (folder / "list.txt").write_text(f"./b.jpg\nsub//c.webp\nsub/./c.webp\n{folder}/./a.PNG\n")
    samples, skipped = scan_images(folder / "list.txt")
    assert [sample.path for sample in samples] == [f"{folder}/{name}" for name in ("a.PNG", "b.jpg", "sub/c.webp")]
    assert skipped == []


def test_a_list_with_a_nul_in_a_name(folder: Path) -> None:
    (folder / "list.txt").write_text("b.jpg\na\0.PNG\n")
    samples, skipped = scan_images(folder / "list.txt")
    assert names(samples, folder) == ["b.jpg"]
    assert [(item.path, item.reason) for item in skipped] == [(f"{folder}/a\0.PNG", "unreadable")]


def test_odd_files(tmp_path: Path) -> None:
    picture(tmp_path / "fine.png", 1)
    (tmp_path / "dangling.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes((tmp_path / "fine.png").read_bytes())
    (tmp_path / "folder.png").mkdir()
    samples, skipped = scan_images(tmp_path)
    assert names(samples, tmp_path) == ["fine.png"]
    assert [item.reason for item in skipped] == ["unreadable", "missing", "unreadable"]
    assert "caf\ufffd.png" in skipped[0].path


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "no such folder"), ("no/*.png", "no file matches"), ("bad", r"no usable picture \(1 unreadable\)")],
)
def test_nothing_to_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--images {source.split('*')[0]}.*{message}"):
        scan_images(source)


def test_the_cache_saves_opening_what_has_not_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "scan.sqlite"
    opened: list[bytes] = []
    from mpa_edge.runtime.images import open_image

    def counting(data: bytes, **options: int) -> Image.Image:
        opened.append(data)
        return open_image(data, **options)

    monkeypatch.setattr("mpa_edge.datasets.open_image", counting)
    first = scan_images(folder, cache=cache)
    assert len(opened) == 9
    opened.clear()
    assert scan_images(folder, cache=cache) == first
    assert opened == []
    picture(folder / "b.jpg", 77)
    picture(folder / "new.png", 78)
    samples, _ = scan_images(folder, cache=cache)
    assert len(opened) == 2
    assert (samples, _) == scan_images(folder)
    opened.clear()
    scan_images(folder, cache=cache, min_edge=20)
    assert len(opened) == 10
    cache.write_text("not a cache")
    assert scan_images(folder, cache=cache)[0] == samples


def test_progress(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    scan_images(folder, progress=lambda done, of: calls.append((done, of)))
    assert calls[-1] == (10, 10)
    assert calls == sorted(calls)
