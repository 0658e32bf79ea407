"""Pictures from anywhere to upright RGB, and pixels to pixel values: numpy and Pillow only.

What lies between, resizing and cutting, is each family's own: see `mpa_edge.runtime.families`.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
import threading
from contextlib import nullcontext
from typing import IO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mpa_edge.bundle import ImageSettings
from mpa_edge.errors import ImageError

Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8] | NDArray[np.uint16]"

# Below the size from which Pillow itself warns of decompression bombs; 240 MB as RGB.
MAX_PIXELS = 80_000_000
# A picture of MAX_PIXELS with transparency takes 1.2 GB on its way to RGB, from a file of 100 KB: of pictures beyond
# this size one is decoded at a time, however many threads there are.
LARGE_PIXELS = 16_000_000
_LARGE = threading.Lock()
# Formats that Pillow decodes by itself: EPS and the like would start other programs on a file from anywhere.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def open_image(source: Source, *, min_edge: int = 1, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as upright RGB: EXIF orientation applied, transparency laid on white, 16 bit scaled to 8.

    `source` is a path, a data URL (a string that starts with `data:`), the bytes of a file, a PIL image, or an array
    (height, width[, 1 | 3 | 4]) of uint8 or uint16.
    Raises `ImageError` with the reason `unreadable`, `truncated`, `too_large` (checked before decoding) or `too_small`
    (an edge below `min_edge`).
    """
    name = _name_of(source)
    # Pillow's decoders raise whatever they trip over; one bad file must stay one bad file.
    try:
        image = _undecoded(source)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, "too_large", str(error)) from error
    except Exception as error:
        raise _image_error(name, error) from error
    try:
        if image.width * image.height > max_pixels:
            raise ImageError(name, "too_large", f"{image.width}x{image.height}, at most {max_pixels:,} pixels")
        if min(image.size) < min_edge:
            raise ImageError(name, "too_small", f"{image.width}x{image.height}, at least {min_edge}x{min_edge}")
        with _LARGE if image.width * image.height > LARGE_PIXELS else nullcontext():
            return _decoded(image, name)
    finally:
        if image is not source:
            image.close()


def normalise(tiles: NDArray[np.uint8], settings: ImageSettings) -> NDArray[np.float32]:
    """The model's pixel values: uint8 (tiles, height, width, 3) -> float32 (tiles, 3, height, width).

    Rescaled in double and normalised in single precision, as transformers does.
    """
    pixels = (tiles.astype(np.float64) * settings.rescale_factor).astype(np.float32)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    return cast("NDArray[np.float32]", np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2)))


def _undecoded(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        array = source[..., 0] if source.ndim == 3 and source.shape[-1] == 1 else source
        if array.dtype == np.uint16:
            array = (array >> 8).astype(np.uint8)
        if array.dtype != np.uint8:
            raise ValueError(f"an array of {array.dtype}; uint8 or uint16 is needed")
        return Image.fromarray(np.ascontiguousarray(array))
    if isinstance(source, (bytes, bytearray, memoryview)):
        file: IO[bytes] | str | os.PathLike[str] = io.BytesIO(source)
    elif _is_data_url(source):
        file = io.BytesIO(_data_of(str(source)))
    elif isinstance(source, (str, os.PathLike)):
        if not stat.S_ISREG(os.stat(source).st_mode):  # noqa: PTH116 (a pipe would be waited for without end)
            raise ValueError("not a regular file")
        file = source
    elif hasattr(source, "read"):
        file = source
    else:
        kind = type(source).__name__
        raise ValueError(f"{kind} is no picture: give a path, a data URL, bytes, a PIL image or an array")
    return Image.open(file, formats=FORMATS)


def _is_data_url(source: object) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _data_of(url: str) -> bytes:
    """The content of `data:image/png;base64,…` (RFC 2397). What it says it is does not matter: the bytes tell."""
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("a data URL must look like data:image/png;base64,…")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL's content is not base64: {error}") from error


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:
        raise _image_error(name, error) from error


def _upright(image: Image.Image) -> Image.Image:
    """The picture itself where nothing is to be done: Pillow's function would copy it, 36 MB of a photo."""
    return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit grey, which Pillow would clip instead of scaling
        values = np.asarray(image)
        wide = image.mode != "I" or values.max() > 255
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8 if wide else values).astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    # A fresh image: no file handle, no metadata that a later step could act on again.
    rgb = image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgb.info = {}
    return rgb


def _name_of(source: Source) -> str:
    if _is_data_url(source):
        return "data URL"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return {bytes: "picture in memory", np.ndarray: "array"}.get(type(source), "picture")


def _image_error(name: str, error: Exception) -> ImageError:
    if isinstance(error, UnidentifiedImageError):
        return ImageError(name, "unreadable", f"no picture in one of the formats {', '.join(FORMATS)}")
    why = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return ImageError(name, "truncated" if "truncated" in why.lower() else "unreadable", why)
