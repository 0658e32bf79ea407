"""Parquet files and Hugging Face datasets as sources of pictures and of labelled questions."""

from __future__ import annotations

import io
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mpa_edge.datasets
from mpa_edge.datasets import scan_images, table_named
from mpa_edge.errors import InputError, MissingExtra
from mpa_edge.records import Sample
from mpa_edge.scan_index import ScanIndex
from mpa_edge.tables import ROWS


def encoded(shade: int, format: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 7)).save(file, format)
    return file.getvalue()


def write_parquet(path: Path, column: list[Any], name: str = "image", type: Any = None, **others: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(column, type), **others}), path)
    return path


def contents(samples: list[Sample]) -> list[bytes]:
    return [Path(sample.path).read_bytes() for sample in samples]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("form", ["binary", "struct", "path", "another name"])
def test_parquet_columns(tmp_path: Path, form: str) -> None:
    pictures = [encoded(1), encoded(2, "JPEG"), encoded(3, "WEBP")]
    if form == "path":
        for number, picture in enumerate(pictures):
            (tmp_path / "data" / f"{number}.bin").parent.mkdir(exist_ok=True)
            (tmp_path / "data" / f"{number}.bin").write_bytes(picture)
        column: list[Any] = [f"{number}.bin" for number in range(3)]
    elif form == "struct":
        column = [{"bytes": picture, "path": "../../any.png"} for picture in pictures]
    else:
        column = pictures
    name = "photo" if form == "another name" else "image"
    source = write_parquet(tmp_path / "data" / "p.parquet", column, name, caption=["a", "b", "c"])
    samples, skipped = scan_images(source, store=tmp_path / "store")
    assert contents(samples) == pictures
    assert skipped == []
    assert [Path(sample.path).suffix for sample in samples] == [".png", ".jpeg", ".webp"]
    assert all(Path(sample.path).stem == sample.sha256 for sample in samples)
    assert {path.parent for path in map(Path, (sample.path for sample in samples))} == {tmp_path / "store"}
    assert not (tmp_path / "any.png").exists()


@pytest.mark.parametrize("named", ["folder", "glob"])
def test_several_parquet_files_in_order(tmp_path: Path, named: str) -> None:
    for number in range(3):
        write_parquet(tmp_path / "data" / f"train-{number}.parquet", [encoded(2 * number), encoded(2 * number + 1)])
    source = tmp_path / "data" if named == "folder" else f"{tmp_path}/data/train-*.parquet"
    samples, _ = scan_images(source, store=tmp_path / "store")
    assert contents(samples) == [encoded(shade) for shade in range(6)]


def test_bad_rows_are_left_out_with_their_place_and_reason(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(99))
    cells = [
        {"bytes": encoded(1), "path": None},
        None,
        {"bytes": b"no picture", "path": None},
        {"bytes": encoded(1), "path": "copy"},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": "gone.png"},
        {"bytes": encoded(2, size=(2, 2)), "path": None},
        {"bytes": encoded(3)[:70], "path": None},
        {"bytes": encoded(4), "path": None},
    ]
    source = write_parquet(tmp_path / "data" / "p.parquet", cells)
    samples, skipped = scan_images(source, store=tmp_path / "store")
    assert contents(samples) == [encoded(1), encoded(4)]
    assert [(item.path, item.reason) for item in skipped] == [
        (f"{source}:2", "no_image"),
        (f"{source}:3", "unreadable"),
        (f"{source}:4", "duplicate"),
        (f"{source}:5", "outside_folder"),
        (f"{source}:6", "outside_folder"),
        (f"{source}:7", "missing"),
        (f"{source}:8", "too_small"),
        (f"{source}:9", "truncated"),
    ]
    assert skipped[2].detail == f"same content as {source}:1"


def test_a_path_that_no_file_can_have_costs_its_row_only(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "good.png").write_bytes(encoded(9))
    column = ["a\0b.png", "x" * 5000 + ".png", "loop.png", "good.png"]
    source = write_parquet(tmp_path / "photos.parquet", column)
    samples, skipped = scan_images(source, store=tmp_path / "store")
    assert contents(samples) == [encoded(9)]
    rows = [(item.path, item.reason) for item in skipped]
    assert [path for path, _ in rows] == [f"{source}:{number}" for number in (1, 2, 3)]
    assert {reason for _, reason in rows} <= {"unreadable", "missing"}


def test_a_table_that_is_damaged_inside_is_one_line(tmp_path: Path) -> None:
    """Its end tells the columns; what comes before is read later, and pyarrow's own error was a traceback."""
    source = write_parquet(tmp_path / "photos.parquet", [encoded(1)])
    data = source.read_bytes()
    source.write_bytes(data[:4] + b"\0" * 40 + data[44:])
    with pytest.raises(InputError, match=r"photos\.parquet: cannot be read \(") as caught:
        scan_images(source, store=tmp_path / "store")
    assert "\n" not in str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A dataset on disk whose Image feature holds the files' bytes."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    rows = {"picture": [str(tmp_path / f"{number}.png") for number in range(4)], "n": list(range(4))}
    features = datasets.Features({"picture": datasets.Image(), "n": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(rows, features=features)
    splits = datasets.DatasetDict({"train": data.select([3, 1]), "test": data.select([0, 2])})
    splits.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_dataset_on_disk(saved: Path, tmp_path: Path) -> None:
    assert contents(scan_images(saved / "test", store=tmp_path / "store")[0]) == [encoded(0), encoded(2)]
    assert contents(scan_images(saved, store=tmp_path / "store")[0]) == [encoded(3), encoded(1)]  # train


def test_a_dataset_by_name(tmp_path: Path, hub_cache: Path) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path / "repo" / "data" / f"{split}-0.parquet", [encoded(len(split))])
    samples, _ = scan_images(f"hf:{tmp_path}/repo:validation", store=tmp_path / "store")
    assert contents(samples) == [encoded(10)]
    assert contents(scan_images(f"hf:{tmp_path}/repo", store=tmp_path / "store")[0]) == [encoded(5)]


def test_a_folder_with_pictures_stays_a_folder_of_pictures(tmp_path: Path) -> None:
    write_parquet(tmp_path / "labels.parquet", ["a"], "label")
    (tmp_path / "a.png").write_bytes(encoded(1))
    assert table_named(tmp_path) is None
    samples, skipped = scan_images(tmp_path)
    assert (len(samples), [item.reason for item in skipped]) == (1, ["not_an_image"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "none of text holds pictures; name the column `image`"),
        ({"a": [b"x"], "b": [b"y"]}, "the columns a, b hold pictures"),
        ({"image": [None]}, r"no usable picture \(1 no_image\)"),
    ],
)
def test_tables_without_pictures(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=rf"p.parquet: {message}"):
        scan_images(tmp_path / "p.parquet", store=tmp_path / "store")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", "expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"),
        ("broken.parquet", "--images broken.parquet: cannot be read"),
        ("none.parquet", "--images none.parquet: no such folder"),
        ("hf:./nothing:train", "--images hf:./nothing:train: cannot be read"),
    ],
)
def test_tables_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=message):
        scan_images(source, store=tmp_path / "store")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(tmp_path / "p.parquet", [encoded(1)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "mpa-edge\[align\]"'):
        scan_images(source, store=tmp_path / "store")


def test_pictures_are_extracted_once_and_again_when_they_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = write_parquet(tmp_path / "p.parquet", [encoded(n) for n in range(5)]), tmp_path / "store"
    opened: list[int] = []
    real = mpa_edge.datasets.open_image

    def counting(data: bytes, **options: int) -> Image.Image:
        opened.append(1)
        return real(data, **options)

    monkeypatch.setattr("mpa_edge.datasets.open_image", counting)
    first = scan_images(source, store=store, cache=tmp_path / "scan.sqlite")
    times = [Path(sample.path).stat().st_mtime_ns for sample in first[0]]
    (store / f".{'0' * 8}.tmp").touch()
    assert scan_images(source, store=store, cache=tmp_path / "scan.sqlite") == first
    assert len(opened) == 5
    Path(first[0][2].path).unlink()
    assert scan_images(source, store=store, cache=tmp_path / "scan.sqlite") == first
    assert len(opened) == 10
    after = [Path(sample.path).stat().st_mtime_ns for sample in first[0]]
    assert [old == new for old, new in zip(times, after, strict=True)] == [True, True, False, True, True]
    assert sorted(path.name for path in store.iterdir()) == sorted(Path(sample.path).name for sample in first[0])
    write_parquet(source, [encoded(9)])
    assert contents(scan_images(source, store=store, cache=tmp_path / "scan.sqlite")[0]) == [encoded(9)]


def test_a_limit_leaves_the_rest_alone(tmp_path: Path) -> None:
    cells = [encoded(0), b"bad", encoded(0), *(encoded(n) for n in range(1, 50))]
    source = write_parquet(tmp_path / "p.parquet", cells)
    samples, skipped = scan_images(source, store=tmp_path / "store", limit=3, cache=tmp_path / "scan.sqlite")
    assert contents(samples) == [encoded(0), encoded(1), encoded(2)]
    assert [item.reason for item in skipped] == ["unreadable", "duplicate"]
    assert len(list((tmp_path / "store").iterdir())) == 3
    assert len(scan_images(source, store=tmp_path / "store", limit=4, cache=tmp_path / "scan.sqlite")[0]) == 4


def test_a_limit_that_is_never_reached_is_not_counted_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row was a transaction, and a count over all of them: hours, where few pictures have many questions each."""
    source = write_parquet(tmp_path / "p.parquet", [encoded(n % 2) for n in range(40)])
    puts: list[int] = []
    real = ScanIndex.put
    monkeypatch.setattr(ScanIndex, "put", lambda self, checks: puts.append(1) or real(self, checks))
    samples, skipped = scan_images(source, store=tmp_path / "store", limit=3, cache=tmp_path / "scan.sqlite")
    assert (len(samples), len(skipped), puts) == (2, 38, [1])


def test_a_large_table_is_not_held_in_memory(tmp_path: Path) -> None:
    noise = [Image.effect_noise((200, 200), 50 + n).tobytes() for n in range(4)]

    def rows(start: int, stop: int) -> pa.Table:
        return pa.table({"image": [b"P5 200 200 255\n" + bytes([n % 256, n // 256]) + noise[n % 4][2:]
                                   for n in range(start, stop)]})  # fmt: skip

    with pq.ParquetWriter(tmp_path / "p.parquet", rows(0, 1).schema, compression="none") as writer:
        for start in range(0, 1000, 100):
            writer.write_table(rows(start, start + 100))
    table = table_named(tmp_path / "p.parquet")
    assert table is not None
    assert table.count == 1000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    most = 0
    for _ in table.rows(["image"]):
        most = max(most, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert most < 8 * ROWS * 40_000 < 1000 * 40_000


def test_progress_counts_rows(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    source = write_parquet(tmp_path / "p.parquet", [encoded(n) for n in range(ROWS + 1)])
    scan_images(source, store=tmp_path / "store", progress=lambda done, of: calls.append((done, of)))
    assert calls == [(ROWS, ROWS + 1), (ROWS + 1, ROWS + 1)]


def test_no_code_of_a_dataset_is_run(hub_cache: Path, tmp_path: Path) -> None:
    """Nor by the oldest `datasets` that may be installed: those before 4.0 run scripts."""
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="cannot be read"):
        table_named(f"hf:{folder}")
    assert not (tmp_path / "ran").exists()
    project = Path(__file__).parents[2] / "pyproject.toml"
    bounds = re.findall(r'"datasets>=(\d+)', project.read_text(encoding="utf-8"))
    assert len(bounds) == 2
    assert all(int(bound) >= 4 for bound in bounds)
