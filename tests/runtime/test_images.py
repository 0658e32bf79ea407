"""The runtime's pictures against transformers' processor, tolerance 0, and pictures that cannot be used."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mpa_edge.bundle import Idefics3Images
from mpa_edge.errors import ImageError
from mpa_edge.runtime.idefics3 import Idefics3
from mpa_edge.runtime.images import open_image
from tiny_pictures import PROCESSORS_MODES, noise, on_white

SIZES = [(1, 1), (2, 5), (64, 64), (65, 64), (63, 17), (96, 96), (128, 128), (200, 150), (150, 200), (37, 400)]
SIZES += [(400, 37), (1000, 3), (3, 1000), (192, 191), (191, 192), (640, 480), (333, 334), (1, 300), (300, 1)]


def settings(longest_edge: int, split: bool, tile: int = 64, resample: str = "lanczos") -> Idefics3Images:
    half = (0.5, 0.5, 0.5)
    return Idefics3Images(
        tile_size=tile, longest_edge=longest_edge, split=split, mean=half, std=(0.5, 0.25, 0.3),
        rescale_factor=1 / 255, resample=resample, tokens_per_tile=16,
    )  # fmt: skip


def processor_of(wanted: Idefics3Images, kind: type[Idefics3ImageProcessorPil]) -> Idefics3ImageProcessorPil:
    return kind(
        size={"longest_edge": wanted.longest_edge},
        max_image_size={"longest_edge": wanted.tile_size},
        do_image_splitting=wanted.split,
        image_mean=list(wanted.mean),
        image_std=list(wanted.std),
        resample=Image.Resampling[wanted.resample.upper()],
    )


def assert_same(
    image: Image.Image, wanted: Idefics3Images, kind: type[Idefics3ImageProcessorPil] = Idefics3ImageProcessorPil
) -> None:
    expected = processor_of(wanted, kind)([[image]], return_row_col_info=True, return_tensors="np")
    cut = Idefics3().cut(open_image(image), wanted)
    assert ([[cut.rows]], [[cut.columns]]) == (expected["rows"], expected["cols"])
    np.testing.assert_array_equal(Idefics3().pixel_values(cut, wanted)["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("longest_edge", "split"), [(64, True), (64, False), (192, True), (192, False), (250, True)])
def test_tiles_equal_the_processors(size: tuple[int, int], longest_edge: int, split: bool) -> None:
    assert_same(noise("RGB", size), settings(longest_edge, split))


@pytest.mark.parametrize("mode", PROCESSORS_MODES)
def test_colour_modes_equal_the_processors(mode: str) -> None:
    assert_same(noise(mode, (120, 90)), settings(192, True))


@on_white
def test_palette_with_transparency_equals_the_processors() -> None:
    image = noise("P", (50, 40))
    image.info["transparency"] = 17
    assert_same(image, settings(128, True))


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "nearest"])
def test_other_filters_equal_the_processors(resample: str) -> None:
    assert_same(noise("RGB", (130, 70)), settings(192, True, resample=resample))


@pytest.mark.parametrize("longest_edge", [1456, 5000])
def test_real_tile_sizes_and_the_4096_limit_equal_the_processors(longest_edge: int) -> None:
    assert_same(noise("RGB", (97, 9)), settings(longest_edge, True, tile=364))


@pytest.mark.parametrize("kind", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
def test_random_sizes_equal_the_processors(kind: type[Idefics3ImageProcessorPil]) -> None:
    random = np.random.default_rng(5)
    for seed in range(40):
        width, height, edge = (int(n) for n in random.integers([1, 1, 32], [300, 300, 400]))
        assert_same(noise("RGB", (width, height), seed), settings(edge, bool(seed % 4), tile=32), kind)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10), "white")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (10, 30)


@pytest.mark.parametrize("value", [0, 300, 32768, 65535])
def test_sixteen_bit_grey_is_scaled(value: int, tmp_path: Path) -> None:
    array = np.full((4, 5), value, dtype=np.uint16)
    Image.fromarray(array).save(tmp_path / "deep.png")
    for source in (tmp_path / "deep.png", array):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (5, 4))
        assert image.getpixel((0, 0)) == (value >> 8,) * 3


def test_every_kind_of_source_gives_the_same_noise(tmp_path: Path) -> None:
    image = noise("RGB", (20, 10))
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, image, np.asarray(image)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(image))


def test_grey_arrays_are_taken() -> None:
    assert open_image(np.zeros((4, 5), np.uint8)).mode == "RGB"
    assert open_image(np.zeros((4, 5, 1), np.uint8)).mode == "RGB"


def reason(source: object, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source, **limits)  # type: ignore[arg-type]
    return caught.value.reason


def test_truncated_jpeg_and_png(tmp_path: Path) -> None:
    for suffix in ("jpg", "png"):
        file = io.BytesIO()
        noise("RGB", (200, 200)).save(file, "JPEG" if suffix == "jpg" else "PNG")
        assert reason(file.getvalue()[: len(file.getvalue()) // 2]) == "truncated", suffix


def test_text_named_png_missing_file_folder_and_rubbish(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("not a picture")
    assert reason(tmp_path / "note.png") == "unreadable"
    assert reason(tmp_path / "missing.png") == "unreadable"
    assert reason(tmp_path) == "unreadable"
    os.mkfifo(tmp_path / "pipe.png")  # reading one would wait for ever
    assert reason(tmp_path / "pipe.png") == "unreadable"
    assert reason(b"") == "unreadable"
    assert reason(np.zeros((3, 3), np.float64)) == "unreadable"
    with pytest.raises(ImageError, match="NoneType is no picture: give a path, a data URL"):
        open_image(None)  # type: ignore[arg-type]


def test_postscript_is_not_opened() -> None:
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "unreadable"


def test_limits_hold_before_decoding() -> None:
    file = io.BytesIO()
    Image.new("L", (4000, 4000)).save(file, "PNG")
    truncated = file.getvalue()[:100]  # decoding it would say `truncated`
    assert reason(truncated, max_pixels=15_000_000) == "too_large"
    bomb = bytearray(file.getvalue())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    assert reason(bytes(bomb)) in ("too_large", "unreadable")  # Pillow may trip over the checksum first
    assert reason(Image.new("L", (10_000, 10_000))) == "too_large"


def test_the_caller_decides_what_is_too_small() -> None:
    assert open_image(Image.new("RGB", (1, 1))).size == (1, 1)
    assert reason(Image.new("RGB", (1, 1)), min_edge=2) == "too_small"


def test_a_data_url_is_a_noise() -> None:
    file, image = io.BytesIO(), noise("RGB", (30, 20))
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    np.testing.assert_array_equal(np.asarray(open_image(url)), np.asarray(image))


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,@@", "data:image/png,plain", "data:", "data:image/png;base64,", "DATA:;base64,aGk="]
)
def test_a_bad_data_url_is_an_image_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(ImageError, match=r"^data URL: unreadable"):
        open_image(url)
