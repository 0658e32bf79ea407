"""Pictures that pool and test share, on the reference world, whose pictures look much alike."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mpa_edge.overlap
from mpa_edge.benchmarks.reference import write_pool, write_test
from mpa_edge.datasets import scan_images
from mpa_edge.errors import InputError
from mpa_edge.labelled import Question
from mpa_edge.overlap import EDGE, LIKELY, Pictures, distance, find_shared, nearest_copies, signature_of
from mpa_edge.records import Sample, read_rows
from mpa_edge.scan_index import Skipped

COUNT = 120


class Split(NamedTuple):
    kept: list[Sample]
    shared: list[Skipped]
    looked_at: int
    pictures: int


def split_shared(samples: list[Sample], test: Path, limit: int | None = None, cache: Path | None = None) -> Split:
    """The samples that the test does not have, up to the limit, and a row for each of the others up to the last."""
    shared, looked_at, count = find_shared(lambda: samples, test, limit=limit, cache=cache)
    kept = list(islice((sample for sample in samples if sample.id not in shared), limit))
    looked = samples[: samples.index(kept[-1]) + 1] if len(kept) == limit else samples
    rows = [Skipped(s.path, "in_test", shared[s.id]) for s in looked if s.id in shared]
    return Split(kept, rows, looked_at, count)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool and a test that share nothing."""
    folder = tmp_path_factory.mktemp("world")
    write_pool(folder / "pool", COUNT)
    write_test(folder / "test", COUNT)
    return folder


@pytest.fixture(scope="module")
def samples(world: Path) -> list[Sample]:
    return scan_images(world / "pool")[0]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    box = (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    return image.crop(box)


def signatures(images: list[Image.Image]) -> Pictures:
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        image.save(file, "PNG")
    found = [signature_of(file.getvalue()) for file in files]
    return np.stack([signature for signature in found if signature is not None])


def test_different_pictures_are_kept(world: Path, samples: list[Sample]) -> None:
    kept, shared, *_ = split_shared(samples, world / "test" / "test.jsonl")
    assert len(shared) <= 1
    assert len(kept) + len(shared) == COUNT


@pytest.mark.parametrize(
    ("changed", "share"),
    [
        (lambda image: jpeg(image, 50), 0.97),
        (lambda image: jpeg(image, 20), 0.85),
        (lambda image: scaled(image, 0.5), 0.97),
        (lambda image: scaled(image, 2), 0.97),
        (lambda image: cropped(image, 0.02, 0.02, 0.02, 0.02), 0.92),
        (lambda image: cropped(image, 0.04, 0.04, 0.04, 0.04), 0.85),
        (lambda image: cropped(image, 0.05, 0, 0, 0), 0.85),
        (lambda image: jpeg(scaled(cropped(image, 0.03, 0.03, 0.03, 0.03), 0.7), 70), 0.8),
    ],
    ids=["jpeg50", "jpeg20", "half", "double", "crop2", "crop4", "left5", "all"],
)
def test_changed_copies_are_found(
    world: Path, samples: list[Sample], tmp_path: Path, changed: Callable[[Image.Image], Image.Image], share: float
) -> None:
    rows = [row.to_json() for row in read_rows(world / "test" / "test.jsonl", Question)]
    for row in rows:
        row["image"] = str(world / "test" / row["image"])
    copied = samples[::2]
    for number, sample in enumerate(copied):
        changed(Image.open(sample.path).convert("RGB")).save(tmp_path / f"{number}.png")
        rows.append({"id": f"copy-{number}", "image": str(tmp_path / f"{number}.png"), "question": "q", "answers": "a"})
    for row in rows:  # no row may name a picture outside of the file's folder
        row["image"] = os.path.relpath(row["image"], world.parent)
        row["answers"] = list(row["answers"])
    path = world.parent / f"{tmp_path.name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    _, shared, *_ = split_shared(samples, path)
    named = {item.path: Path(item.detail.removeprefix("a near-duplicate of ").split(" (")[0]) for item in shared}
    right = [named.get(sample.path) == tmp_path / f"{number}.png" for number, sample in enumerate(copied)]
    assert np.mean(right) >= share
    assert {item.reason for item in shared} == {"in_test"}
    assert len(shared) <= len(copied) + 3


def test_pictures_that_the_test_has_twice_are_found(world: Path, samples: list[Sample]) -> None:
    """The two copies lie near to each other: neither is the next picture, to which the distance must be larger."""
    images = [Image.open(sample.path).convert("RGB") for sample in samples[:30]]
    others = signatures([Image.open(path).convert("RGB") for path in sorted((world / "test").rglob("*.png"))[:60]])
    copies = signatures([jpeg(image, 30) for image in images] + [cropped(image, *[0.04] * 4) for image in images])
    found = nearest_copies(signatures(images), np.concatenate([others, copies]))
    right = [place is not None and (place - len(others)) % 30 == number for number, (place, _) in enumerate(found)]
    assert np.mean(right) >= 0.8


def test_many_pictures_of_one_layout_are_no_copies() -> None:
    """All are within the limit of each other: that none shows something else says nothing about copies."""
    random = np.random.default_rng(0)
    layout = np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((4, 4, 1)))
    pictures = (layout + random.normal(0, 18, (12, EDGE, EDGE, 3))).clip(0, 255).astype(np.uint8)
    assert distance(pictures[:6], pictures[6:]).max() < LIKELY
    assert {place for place, _ in nearest_copies(pictures[:6], pictures[6:])} == {None}


def test_equal_files_are_found_whatever_they_show(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "white").save(tmp_path / "white.png")
    Image.new("RGB", (31, 31), "white").save(tmp_path / "other.png")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.png").write_bytes((tmp_path / "white.png").read_bytes())
    (tmp_path / "test" / "broken.png").write_bytes(b"broken")
    rows = [{"imgname": name, "query": "q", "label": "a"} for name in ("t.png", "broken.png", "gone.png", "t.png")]
    (tmp_path / "test" / "t.json").write_text(json.dumps(rows))
    samples, _ = scan_images(f"{tmp_path}/*.png")
    kept, shared, *_ = split_shared(samples, tmp_path / "test" / "t.json")
    assert [Path(sample.path).name for sample in kept] == ["other.png"]
    assert shared[0].detail == f"the same file as {tmp_path / 'test' / 't.png'}"


def test_a_table_as_test(world: Path, samples: list[Sample], tmp_path: Path) -> None:
    cells = [Path(sample.path).read_bytes() for sample in samples[:3]]
    pq.write_table(pa.table({"image": [*cells, None, b"broken"]}), tmp_path / "t.parquet")  # questions are not needed
    kept, shared, *_ = split_shared(samples[:5], tmp_path / "t.parquet")
    assert kept == samples[3:5]
    assert [item.detail for item in shared] == [f"the same file as {tmp_path}/t.parquet:{n}" for n in (1, 2, 3)]


def test_a_picture_that_is_in_the_test_many_times(world: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Copies in the test lie near to each other too: a distance next to nothing needs no comparison."""
    image = Image.effect_noise((12, 9), 80).resize((400, 300), Image.Resampling.BICUBIC).convert("RGB")
    (tmp_path / "pool").mkdir()
    image.save(tmp_path / "pool" / "p.png")
    for number in range(4):
        scaled(image, 0.9 - number / 10).save(tmp_path / f"{number}.png")
    rows = [{"imgname": f"{number}.png", "query": "q", "label": "a"} for number in range(4)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert split_shared(scan_images(tmp_path / "pool")[0], tmp_path / "t.json")[0] == []


def test_the_outcome_is_remembered(
    world: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, test = tmp_path / "shared.json", world / "test" / "test.jsonl"
    some = samples[:40]
    first = split_shared(some, test, cache=cache)
    monkeypatch.setattr(mpa_edge.overlap, "nearest_copies", None)
    assert split_shared(some, test, cache=cache) == first
    with pytest.raises(TypeError):
        split_shared(samples[:41], test, cache=cache)
    cache.write_text("{}")
    with pytest.raises(TypeError):
        split_shared(some, test, cache=cache)


def test_a_test_that_cannot_be_read(samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.jsonl: cannot be read"):
        split_shared(samples, tmp_path / "none.jsonl")


def test_a_test_whose_pictures_lie_elsewhere(samples: list[Sample], tmp_path: Path) -> None:
    rows = [{"image_id": name, "question_id": 1, "question": "q", "answers": ["a"]} for name in "aab"]
    test = tmp_path / "TextVQA.json"
    test.write_text(json.dumps({"data": rows}))
    with pytest.raises(InputError, match=r"--test .*json: none of its pictures .*a\.jpg is not in .*put the pictures"):
        split_shared(samples[:1], test)
    (tmp_path / "b.jpg").write_bytes(Path(samples[0].path).read_bytes())
    split = split_shared(samples[:2], test)
    assert (split.looked_at, split.pictures, len(split.shared)) == (1, 2, 1)


def test_no_more_is_looked_at_than_the_limit_takes(samples: list[Sample], tmp_path: Path) -> None:
    copies = [scaled(Image.open(sample.path).convert("RGB"), 2) for sample in (*samples[:3], samples[9])]
    for number, image in enumerate(copies):
        image.save(tmp_path / f"{number}.png")
    rows = [{"imgname": f"{number}.png", "query": "q", "label": "a"} for number in range(4)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    split = split_shared(samples[:10], tmp_path / "t.json", limit=4)
    assert (split.kept, len(split.shared)) == (samples[3:7], 3)
    split = split_shared(samples[:10], tmp_path / "t.json", limit=8)
    assert (split.kept, len(split.shared)) == (samples[3:9], 4)


def test_a_rotated_photo_is_seen_upright(tmp_path: Path) -> None:
    image = Image.effect_noise((64, 32), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    turned, upright = (signature_of(tmp_path / name) for name in ("turned.png", "upright.png"))
    assert turned is not None
    assert np.array_equal(turned, upright)


def test_pictures_of_almost_one_colour_are_no_copies_of_each_other() -> None:
    shades = np.random.default_rng(0).integers(-2, 3, (3, EDGE, EDGE, 3))
    flat = np.stack([np.full((EDGE, EDGE, 3), (number, 100, 200)) for number in (0, 3, 3, 250, 3, 8)])
    flat[3:] += shades
    pictures = flat.clip(0, 255).astype(np.uint8)
    assert [place for place, _ in nearest_copies(pictures[::2], pictures[1::2])] == [None, None, None]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tests_of_few_pictures(count: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, EDGE, EDGE, 3)).astype(np.uint8)
    found = nearest_copies(pictures, pictures[:count])
    assert [place for place, _ in found] == [*range(count), *[None] * (4 - count)]
