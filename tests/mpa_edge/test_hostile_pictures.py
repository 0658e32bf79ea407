"""A folder of pictures that somebody made to do harm, or that a camera made badly: each is used or has its reason, in a
run's scan, on the device and in a table."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpa_edge.datasets import scan_images
from mpa_edge.errors import ImageError
from mpa_edge.runtime.images import open_image
from tiny_pictures import noise


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"", more: int = 0) -> bytes:
    """A grey PNG; `extra` chunks come before the pixels, and `more` bytes after the last row."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + b"\x80" * width for _ in range(min(height, 100))) + bytes(more)
    body = extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG that says that it is so large."""
    content = bytearray(saved(noise("RGB", (40, 40)), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def gif_of(width: int, height: int) -> bytes:
    content = bytearray(saved(noise("P", (40, 40)), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


FRAMES = [Image.new("RGB", (40, 40), (100 * shade, 50, 200 - 90 * shade)) for shade in range(3)]
ANIMATED = {"save_all": True, "append_images": FRAMES[1:]}
POSTER = zlib.compress(b"a" * 100_000_000, 9)
# Name -> content and what becomes of it: None for one that is used.
PICTURES: dict[str, tuple[bytes, str | None]] = {
    "bomb.png": (png(50_000, 50_000), "too_large"),
    "bomb.jpg": (jpeg_of(65_500, 65_500), "too_large"),
    "bomb.gif": (gif_of(65_535, 65_535), "too_large"),
    "bomb.ppm": (b"P6\n99999 99999\n65535\n", "too_large"),
    "text.png": (png(40, 40, chunk(b"zTXt", b"k\0\0" + POSTER)), "unreadable"),
    "profile.png": (png(40, 40, chunk(b"iCCP", b"k\0\0" + POSTER)), "unreadable"),
    "pixels.png": (png(41, 40, more=100_000_000), None),  # decoded as far as the picture goes
    "panorama.png": (saved(Image.new("1", (20_000, 5_000)), "PNG"), "too_large"),
    "line.png": (png(1_000_000, 1), "too_small"),
    "nothing.png": (png(0, 0), "unreadable"),
    "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "unreadable"),
    "paper.jpg": (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF", "unreadable"),
    "page.gif": (b"<html><script>alert(1)</script></html>", "unreadable"),
    "half.jpg": (saved(noise("RGB", (90, 90)), "JPEG")[:-2000], "truncated"),
    "zip.jpg": (saved(noise("RGB", (40, 41)), "JPEG") + b"PK\3\4" + b"x" * 99, None),
    "script.gif": (saved(noise("P", (40, 42)), "GIF") + b"<script>alert(1)</script>", None),
    "moving.gif": (saved(FRAMES[0], "GIF", **ANIMATED), None),
    "moving.webp": (saved(FRAMES[0], "WEBP", **ANIMATED), None),
    "moving.png": (saved(FRAMES[0], "PNG", **ANIMATED), None),
    "pages.tif": (saved(FRAMES[0], "TIFF", **ANIMATED), None),
    "deep.png": (saved(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40), "PNG"), None),
    "printed.jpg": (saved(Image.new("CMYK", (40, 40), (9, 99, 199, 0)), "JPEG"), None),
    "new\nline.png": (saved(noise("RGB", (40, 43)), "PNG"), None),
    "esc\x1b[2J\u202e漢字🦙.png": (saved(noise("RGB", (40, 44)), "PNG"), None),
    '"quotes" & <b>.png': (saved(noise("RGB", (40, 45)), "PNG"), None),
}
NO_WARNING = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    for name, (content, _) in PICTURES.items():
        (root / name).write_bytes(content)
    return root


@NO_WARNING
def test_every_picture_of_a_folder_is_used_or_has_its_reason(folder: Path) -> None:
    samples, skipped = scan_images(folder)
    found = {Path(sample.path).name: None for sample in samples} | {Path(row.path).name: row.reason for row in skipped}
    assert found == {name: reason for name, (_, reason) in PICTURES.items()}
    for row in (*samples, *skipped):
        assert "\n" not in json.dumps(row.to_json())


@NO_WARNING
@pytest.mark.parametrize("name", PICTURES, ids=ascii)
def test_the_device_says_the_same(name: str, folder: Path) -> None:
    reason = PICTURES[name][1]
    if reason is None:
        assert open_image(folder / name).mode == "RGB"
        return
    with pytest.raises(ImageError) as caught:
        open_image(folder / name, min_edge=8)
    assert caught.value.reason == reason


def test_of_an_animation_the_first_picture_is_seen(folder: Path) -> None:
    for name in ("moving.webp", "moving.png", "moving.gif", "pages.tif"):
        difference = np.asarray(open_image(folder / name)).astype(int) - np.asarray(FRAMES[0])
        others = np.asarray(FRAMES[1]).astype(int) - np.asarray(FRAMES[0])
        assert np.abs(difference).mean() < np.abs(others).mean() / 2, name


@NO_WARNING
def test_every_row_of_a_table_is_used_or_has_its_reason(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [content for content, _ in PICTURES.values()]}), tmp_path / "photos.parquet")
    samples, skipped = scan_images(tmp_path / "photos.parquet", store=tmp_path / "store")
    reasons = {int(row.path.rsplit(":", 1)[1]): row.reason for row in skipped}
    assert reasons == {place: reason for place, (_, reason) in enumerate(PICTURES.values(), 1) if reason}
    assert len(samples) + len(reasons) == len(PICTURES)


SCAN = """
import resource, sys
from mpa_edge.datasets import scan_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
samples, _ = scan_images(sys.argv[1], workers=6)
print(len(samples), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_large_pictures_with_transparency_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    """A file of 30 KB takes 300 MB on its way to RGB; six of them at once took 1.8 GB."""
    for shade in range(6):
        Image.new("LA", (4600, 4500), (shade, 5)).save(tmp_path / f"{shade}.png")
    command: list[str] = [sys.executable, "-c", SCAN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 6
    assert kilobytes < 700_000
