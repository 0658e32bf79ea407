"""Pictures that the unlabeled pool shares with a labelled test set: equal files, and resized, recompressed or slightly
cropped copies. A student that was trained on the test's pictures would be measured too well.

A picture's signature is its colours at 32x32. Candidates are the test pictures nearest by correlation at 16x16; each is
then laid over the pool's picture (shift and scale along both axes by least squares, Lucas and Kanade 1981), and one
minus the correlation of what overlaps is their distance. It is a copy when the distance is next to nothing, or small
and much smaller than to the next test picture (Lowe's ratio test, 2004): where all pictures have one layout, all are
near to each other. The test's own copies of the nearest one are no such next picture.

Measured on the reference world, 1,500 pictures of the pool against 1,500 of the test, 96x96, many of which differ in
the word on a sign only: 4 (0.3%) are taken for copies and are none (a sign of one colour at one place). Copies that are
found: JPEG at quality 50 100%, at 20 94%, half and double size 100%, cropped by 2% on each side 98%, by 4% 95%, by 5%
on one side 96%, on two 89%, and cropped by 4%, at 60% of the size and JPEG at 60 at once 83%; with two or three such
copies of each in the test 97% of the pictures, with four 99%. The limits below were chosen there. Hashes were worse: at
the distance within which pHash (64 bits) finds 90% of the pictures that were cropped by 2% lie more than 200 pairs of
different pictures, and with dHash or 256 bits it is no better. Pictures of almost one colour are told apart by their
bytes alone.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpa_edge.errors import ImageError, InputError
from mpa_edge.labelled import pictures_in
from mpa_edge.records import Sample
from mpa_edge.runtime.images import FORMATS, open_image
from mpa_edge.shared import Shared, read_cache, write_cache

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]
Item = TypeVar("Item")

EDGE = 32
# Test pictures that are looked at closely for each picture of the pool, if they are nearer than this at 16x16.
NEAREST, NEAR = 5, 0.4
# A copy: nearer than SURE; or nearer than LIKELY, and than RATIO times the distance to the next test picture that is
# not within LIKELY of the nearest one.
SURE, LIKELY, RATIO = 0.005, 0.1, 0.2
# Crops and shifts up to this share of an edge are undone.
MOST = 0.12
STEPS, DAMPING = 4, 100.0
# Below this standard deviation (of 0 to 255) a picture shows nothing by which to tell it from others of its colour.
LEAST_CONTRAST = 2.0
CHUNK = 512
# Raise it when any of this changes: it is part of the cache's key.
RULES = 2


class Overlap(NamedTuple):
    """What `find_shared` found: why each shared sample is one, by its id. `looked_at` counts the pictures of the test
    that could be read, `pictures` all."""

    shared: Shared
    looked_at: int
    pictures: int


def find_shared(
    samples: Callable[[], Iterable[Sample]],
    test: str | Path,
    *,
    limit: int | None = None,
    cache: Path | None = None,
    workers: int | None = None,
) -> Overlap:
    """Which samples the test has too; after `limit` others the rest is not looked at. `samples` is called each time
    that they are read, in one order: they need not fit into memory.

    `test` is a labelled test set as `mpa_edge.labelled` reads it; only its pictures are looked at. A detail names
    the test's picture and, for a near-duplicate, the distance. `cache` names a file that remembers the outcome.
    Memory grows with the test, not with the pool, nor with what they share. Raises `InputError` where the test, or
    all of its pictures, cannot be read.
    """
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        pictures = _TestPictures.of(test, pool)
        key = _key(samples(), pictures, limit)
        shared = read_cache(cache, key) if cache else None
        if shared is None:
            shared = _shared(samples, pictures, pool, limit)
            if cache:
                write_cache(cache, key, shared)
    return Overlap(shared, pictures.looked_at, pictures.count)


@dataclass(frozen=True)
class _TestPictures:
    """The different pictures of a test: names by digest, and their signatures in that order where they have one. Of
    `count` pictures so many were `looked_at`."""

    names: dict[str, str]
    signed: list[str]
    signatures: Pictures
    looked_at: int
    count: int

    @classmethod
    def of(cls, test: str | Path, pool: ThreadPoolExecutor) -> _TestPictures:
        names: dict[str, str] = {}
        signed, signatures = [], [np.zeros((0, EDGE, EDGE, 3), np.uint8)]
        looked_at, wrong = 0, list[str]()
        for chunk in _chunks(pictures_in(test), 64):
            for (name, source), (sha256, signature) in zip(chunk, pool.map(_signed, chunk), strict=True):
                if signature is None:
                    wrong.append(str(source) if isinstance(source, ImageError) else f"{name}: unreadable")
                    continue
                looked_at += 1
                if sha256 not in names:
                    names[sha256] = name
                    signed.append(name)
                    signatures.append(signature[None])
        if not looked_at:
            why = f"the first: {wrong[0]}" if wrong else "it has none"
            raise InputError(
                f"--test {test}: none of its pictures can be read ({why}). What the pool shares with it cannot be told "
                "without them: put the pictures into the folder of the file."
            )
        return cls(names, signed, np.concatenate(signatures), looked_at, looked_at + len(wrong))


def _signed(picture: tuple[str, Path | bytes | ImageError]) -> tuple[str, Pictures | None]:
    """The SHA-256 of a picture of the test, and its signature; ("", None) where it cannot be read."""
    source = picture[1]
    try:
        if isinstance(source, ImageError):
            raise source
        data = source if isinstance(source, bytes) else source.read_bytes()
    except (ImageError, OSError):
        return "", None
    return hashlib.sha256(data).hexdigest(), signature_of(source)


def signature_of(source: Path | bytes) -> Pictures | None:
    """A picture at 32x32, uint8 (32, 32, 3); None where it cannot be opened."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            image.draft("RGB", (4 * EDGE, 4 * EDGE))  # JPEG: decode at the size that is needed
            small = open_image(image).resize((EDGE, EDGE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    except (ImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return np.asarray(small, np.uint8)


def _shared(
    samples: Callable[[], Iterable[Sample]], test: _TestPictures, pool: ThreadPoolExecutor, limit: int | None
) -> Shared:
    """Why each shared sample is one, by its id; of all samples, or of as many as `limit` others take."""
    equal = (sample for sample in samples() if sample.sha256 in test.names)
    shared = Shared((sample.id, f"the same file as {test.names[sample.sha256]}") for sample in equal)
    others = (sample for sample in samples() if sample.sha256 not in test.names)
    kept = 0
    for chunk in _chunks(others, min(CHUNK, limit or CHUNK)):
        if limit is not None and kept >= limit:
            break
        found = list(pool.map(lambda sample: signature_of(Path(sample.path)), chunk))
        signed = [(sample, signature) for sample, signature in zip(chunk, found, strict=True) if signature is not None]
        kept += len(chunk)
        if not signed:
            continue
        copies = nearest_copies(np.stack([signature for _, signature in signed]), test.signatures)
        for (sample, _), (place, distance) in zip(signed, copies, strict=True):
            if place is not None:
                detail = f"a near-duplicate of {test.signed[place]} (distance {distance:.3f})"
                shared.add([(sample.id, detail)])
                kept -= 1
    return shared


def nearest_copies(pool: Pictures, test: Pictures) -> list[tuple[int | None, float]]:
    """For each signature of the pool: the place of the test's signature that it is a copy of, or None; and the distance
    to the nearest one. Shapes (pictures, 32, 32, 3)."""
    coarse = 1 - _unit(_half(pool)) @ _unit(_half(test)).T
    near = np.argsort(coarse, axis=1)[:, :NEAREST]
    distances = np.ones(near.shape, np.float32)
    rows, ranks = np.nonzero(np.take_along_axis(coarse, near, axis=1) < NEAR)
    if len(rows):
        distances[rows, ranks] = distance(pool[rows], test[near[rows, ranks]])
    order = np.argsort(distances, axis=1)
    near, distances = np.take_along_axis(near, order, axis=1), np.take_along_axis(distances, order, axis=1)
    first = distances[:, 0]
    copy = (first < SURE) | ((first < LIKELY) & (first < RATIO * _next(near, distances, test)))
    return [(int(place) if yes else None, float(far)) for place, yes, far in zip(near[:, 0], copy, first, strict=True)]


def _next(near: NDArray[np.intp], distances: Floats, test: Pictures) -> Floats:
    """The distance to the nearest candidate that is no copy of the best one: a test may show one picture many times.
    Where all are copies of it, to the second candidate: of so many, it is rather the layout that is the same.

    `near` and `distances`, shape (pictures, candidates), are sorted by distance.
    """
    following = distances[:, 1:]
    rows, ranks = np.nonzero((distances[:, :1] < LIKELY) & (following < 1))
    other = np.ones(following.shape, bool)
    if len(rows):
        other[rows, ranks] = distance(test[near[rows, 0]], test[near[rows, 1 + ranks]]) >= LIKELY
    if len(test) >= NEAREST:
        other |= ~other.any(axis=1, keepdims=True)
    return np.asarray(np.where(other, following, 1).min(axis=1, initial=1), np.float32)


def distance(left: Pictures, right: Pictures) -> Floats:
    """One minus the correlation of each pair of signatures, the right one laid over the left one: 0 for copies."""
    ours, theirs = left.astype(np.float32), right.astype(np.float32)
    rows, columns, inside = _resampling(_alignment(ours, theirs), EDGE)
    laid: Floats = np.stack([rows @ theirs[..., band] @ columns for band in range(3)], axis=-1)
    ours, laid = _centred(ours, inside), _centred(laid, inside)
    power = np.sqrt(np.square(ours).sum((1, 2, 3)) * np.square(laid).sum((1, 2, 3)))
    least = np.float32(ours[0].size * LEAST_CONTRAST**2)
    return np.asarray(1 - (ours * laid).sum((1, 2, 3)) / np.maximum(power, least), np.float32)


def _alignment(ours: Floats, theirs: Floats) -> Floats:
    """(pairs, 4): shift and growth along x, then y, in shares of the edge, that lay `theirs` over `ours`.

    Gauss-Newton on the grey values, at half the size first, where a crop is a smaller step.
    """
    found = np.zeros((len(ours), 4), np.float32)
    grey = ours.mean(axis=3), theirs.mean(axis=3)
    for left, right in ([_half(image[..., None])[..., 0] for image in grey], grey):
        edge = left.shape[1]
        place = ((np.arange(edge, dtype=np.float32) + 0.5) / edge - 0.5)[None]
        for _ in range(STEPS):
            rows, columns, inside = _resampling(found, edge)
            laid = rows @ right @ columns
            error = (_centred(left[..., None], inside) - _centred(laid[..., None], inside)).reshape(len(left), -1, 1)
            along_y, along_x = (slope * edge * inside for slope in np.gradient(laid, axis=(1, 2)))
            slopes = np.stack([along_x, along_x * place[:, None], along_y, along_y * place[..., None]], axis=-1)
            slopes = slopes.reshape(len(left), -1, 4)
            turned = slopes.transpose(0, 2, 1)
            damped = turned @ slopes + DAMPING * np.eye(4, dtype=np.float32)
            found = np.clip(found + np.linalg.solve(damped, turned @ error)[..., 0], -MOST, MOST)
    return found


def _resampling(alignment: Floats, edge: int) -> tuple[Floats, Floats, Floats]:
    """Matrices that move pictures of this edge, `rows @ picture @ columns`, and what of the result was inside (1 or 0,
    shape (pairs, edge, edge))."""
    place = (np.arange(edge, dtype=np.float32) + 0.5) / edge - 0.5
    matrices, insides = [], []
    for shift, growth in ((alignment[:, 2:3], alignment[:, 3:4]), (alignment[:, :1], alignment[:, 1:2])):
        source = (place * (1 + growth) + shift + 0.5) * edge - 0.5
        # Linear interpolation: a picture's row k counts for as much as the wanted place is nearer to it than one row.
        bounded = np.clip(source, 0, edge - 1)
        matrices.append(np.maximum(0, 1 - np.abs(bounded[..., None] - np.arange(edge, dtype=np.float32))))
        insides.append(((source > -0.75) & (source < edge - 0.25)).astype(np.float32))
    return matrices[0], matrices[1].transpose(0, 2, 1), insides[0][:, :, None] * insides[1][:, None, :]


def _centred(images: Floats, inside: Floats) -> Floats:
    """Without each band's mean of what is inside; 0 outside."""
    weight = inside[..., None]
    total = (images * weight).sum((1, 2), keepdims=True)
    centred: Floats = (images - total / inside.sum((1, 2))[:, None, None, None]) * weight
    return centred


def _half(images: NDArray[np.uint8] | Floats) -> Floats:
    """At half the size."""
    count, edge, _, bands = images.shape
    blocks = images.reshape(count, edge // 2, 2, edge // 2, 2, bands)
    return np.asarray(blocks.mean(axis=(2, 4), dtype=np.float32), np.float32)


def _unit(images: Floats) -> Floats:
    """Vectors of length 1, of mean 0 in each band; shorter ones of pictures of almost one colour."""
    flat = (images - images.mean(axis=(1, 2), keepdims=True)).reshape(len(images), -1)
    least = LEAST_CONTRAST * flat.shape[1] ** 0.5
    units: Floats = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), least)
    return units


def _key(samples: Iterable[Sample], pictures: _TestPictures, limit: int | None) -> str:
    """Names all that the outcome depends on."""
    digest = hashlib.sha256(f"{RULES} {limit}".encode())
    for part in chain((f"{sample.id}={sample.sha256}" for sample in samples), sorted(pictures.names)):
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
