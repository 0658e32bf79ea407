"""Rows with pictures that are no files of their own: parquet files, and Hugging Face datasets on disk or by name.

    photos.parquet, "data/*.parquet", a folder of .parquet files
    a folder that `Dataset.save_to_disk` wrote                     (one split, or a dictionary of splits)
    hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT                   through `datasets.load_dataset`

A picture's column is binary, or a struct of bytes and path as the Image feature stores it, or a path. Rows are read
some at a time, however large the table is. No code of a dataset is ever run (`datasets` from 4.0 on runs none), and no
name in a row decides what is written.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mpa_edge.errors import ImageError, InputError, require
from mpa_edge.records import write_atomic
from mpa_edge.runtime.images import FORMATS

HUB = "hf:"
PARQUET = ".parquet"
# Rows in memory at a time; a row may hold a photo of some megabytes.
ROWS = 32
# Files that `save_to_disk` writes for one split and for several.
ONE_SPLIT, SPLITS = "state.json", "dataset_dict.json"

Batches = Callable[[Sequence[str]], Iterator[Any]]


@dataclass(frozen=True)
class Table:
    """A source of rows. `schema` is pyarrow's; `count` the number of rows; `fingerprint` changes when the content does.

    `parts` are (name, root, batches): a row is called NAME:NUMBER (from 1), a path in it must lie below root.
    """

    source: str
    schema: Any
    count: int
    fingerprint: tuple[Any, ...]
    parts: tuple[tuple[str, Path, Batches], ...]

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.schema.names)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, Path, dict[str, Any]]]:
        """Yield (what to call the row, the root for paths in it, its values) in order; `InputError` where the table is
        damaged further on."""
        for name, root, batches in self.parts:
            number = 0
            for batch in _lists(self.source, batches, columns):
                for row in batch:
                    number += 1
                    yield f"{name}:{number}", root, row

    def picture_column(self) -> str:
        """The column with the pictures: `image`, or the only one that can hold any; else an `InputError`."""
        import pyarrow.types as types

        if "image" in self.columns:
            return "image"
        fits = [
            field.name
            for field in self.schema
            if types.is_binary(field.type)
            or types.is_large_binary(field.type)
            or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
        ]
        if len(fits) != 1:
            held = f"the columns {', '.join(fits)} hold" if fits else f"none of {', '.join(self.columns)} holds"
            raise InputError(f"{self.source}: {held} pictures; name the column `image`")
        return str(fits[0])


def picture_bytes(value: Any, root: Path, most: int) -> bytes:
    """The bytes of a picture's cell: at most so many. Raises `ImageError` where the cell has none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        value = _read(root / value, root, most)
    if not isinstance(value, bytes) or not value:
        raise ImageError("row", "no_image", "the cell is empty" if not value else f"holds {type(value).__name__}")
    if len(value) > most:
        raise ImageError("row", "too_large", f"{len(value):,} bytes, at most {most:,}")
    return value


def _read(path: Path, root: Path, most: int) -> bytes:
    """A file that a row names. A foreign table must not make us send any file of this machine to a teacher."""
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ImageError("row", "outside_folder", f"{path} is not in {root}")
        if not path.is_file():
            raise ImageError("row", "missing", os.fspath(path))
        with path.open("rb") as file:
            return file.read(most + 1)
    except ImageError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL
        raise ImageError("row", "unreadable", getattr(error, "strerror", None) or str(error)) from error


def name_of(data: bytes) -> str:
    """What a picture's file is called: the SHA-256 of its bytes, and a suffix for its format. It comes from the content
    alone: nothing in a row says where we write."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return f"{hashlib.sha256(data).hexdigest()}.{(image.format or 'img').lower()}"
    except Exception as error:  # Pillow's readers raise whatever they trip over
        raise ImageError("row", "unreadable", "not a picture") from error


def keep(path: Path, data: bytes) -> None:
    """Write a picture under the name that its content gave, unless it is there."""
    if not is_there(path, len(data)):
        write_atomic(path, data)


def is_there(path: Path, size: int) -> bool:
    """Whether a file of this size lies there; files are written whole or not at all."""
    return path.is_file() and path.stat().st_size == size


def open_table(source: str | Path, *, flag: str = "", extra: str, split: str | None = None) -> Table | None:
    """The table that a source names, None where it names something else. `split` is taken where a dataset has several
    and the source names none.

    Raises `InputError` where the table cannot be read, naming `flag`, and `MissingExtra`.
    """
    spec, folder = os.fspath(source), Path(source).expanduser()
    files = _parquet_files(spec, folder)
    if not (spec.startswith(HUB) or files or _is_saved(folder)):
        return None
    require(extra, ("datasets", "pyarrow"))
    try:
        return _parquet(spec, files) if files else _dataset(spec, folder, split)
    except InputError:
        raise
    except Exception as error:  # datasets and pyarrow raise whatever they trip over
        raise _unreadable(f"{flag} {spec}".lstrip(), error) from error


def _lists(source: str, batches: Batches, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each batch."""
    try:
        found = batches(columns)
        while (batch := next(found, None)) is not None:
            rows: list[dict[str, Any]] = batch.to_pylist()
            yield rows
    except Exception as error:  # as above
        raise _unreadable(source, error) from error


def _unreadable(what: str, error: Exception) -> InputError:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return InputError(f"{what}: cannot be read ({reason})")


def _parquet_files(spec: str, folder: Path) -> list[Path]:
    """The parquet files that are named one by one or by a pattern, or that a folder holds beside no pictures."""
    if folder.is_dir():
        return [] if _is_saved(folder) else sorted(folder.rglob(f"*{PARQUET}"))
    if not spec.lower().endswith(PARQUET):
        return []
    return sorted(Path(name) for name in glob.glob(os.fspath(folder), recursive=True))  # noqa: PTH207


def _is_saved(folder: Path) -> bool:
    return (folder / ONE_SPLIT).is_file() or (folder / SPLITS).is_file()


def _parquet(spec: str, files: list[Path]) -> Table:
    import pyarrow.parquet as pq

    def batches(path: Path) -> Batches:
        # Read in pieces: pyarrow would take whole row groups otherwise, or all of them before the first row.
        return lambda columns: pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False).iter_batches(
            ROWS, columns=list(columns)
        )

    schema = pq.read_schema(files[0])
    for path in files[1:]:
        if pq.read_schema(path).names != schema.names:
            raise InputError(f"{spec}: {path.name} has other columns than {files[0].name}")
    stats = [(os.fspath(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Table(
        source=spec,
        schema=schema,
        count=sum(pq.read_metadata(path).num_rows for path in files),
        fingerprint=tuple(stats),
        parts=tuple((os.fspath(path.absolute()), path.absolute().parent, batches(path)) for path in files),
    )


def _dataset(spec: str, folder: Path, usual: str | None) -> Table:
    import datasets

    name, config, split = _hub_name(spec)
    if name:
        found = datasets.load_dataset(name, config, split=split)
        root = Path(name).absolute() if Path(name).is_dir() else Path(datasets.config.HF_CACHE_HOME)
    else:
        found, root = datasets.load_from_disk(os.fspath(folder)), folder.absolute()
    data = _one_split(spec, found, usual)
    arrow = data.with_format("arrow")

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        return iter(arrow.select_columns(list(columns)).iter(batch_size=ROWS))

    return Table(
        source=spec,
        schema=data.features.arrow_schema,
        count=len(data),
        fingerprint=(data._fingerprint, len(data)),
        parts=((spec, root, batches),),
    )


def _hub_name(spec: str) -> tuple[str, str | None, str | None]:
    if not spec.startswith(HUB):
        return "", None, None
    name, *rest = spec.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise InputError(f"{spec}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else None


def _one_split(spec: str, found: Any, usual: str | None) -> Any:
    if not isinstance(found, dict):
        return found
    splits = list(found)
    if len(splits) > 1 and usual not in splits:
        how = f"{spec}:{splits[0]}" if spec.startswith(HUB) else os.fspath(Path(spec, splits[0]))
        raise InputError(f"{spec}: has the splits {', '.join(splits)}; name one of them ({how})")
    return found[splits[0] if len(splits) == 1 else usual]
