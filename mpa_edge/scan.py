"""The pictures of a run: those that `--images` names, without those that `--test` has too, up to `--limit`."""

from __future__ import annotations

from mpa_edge.config import AlignConfig
from mpa_edge.datasets import Skipped, scan_images
from mpa_edge.errors import InputError
from mpa_edge.overlap import Split, split_shared
from mpa_edge.progress import counting, say
from mpa_edge.records import Sample
from mpa_edge.run_folder import RunFolder


def find_pictures(config: AlignConfig, run: RunFolder) -> tuple[list[Sample], list[Skipped], Split | None]:
    """The pictures, those left out, and what `--test` has of them; None without one.

    Raises `InputError` where no picture is left, or one of the two sources cannot be read.
    """
    if config.test is None:
        samples, skipped = _found(config, run, config.limit)
        return samples[: config.limit], skipped, None
    samples, skipped, split = _split(config, config.test, run)
    if split.looked_at < split.pictures:
        say(f"--test {config.test}: only {split.looked_at} of its {split.pictures} pictures could be looked at")
    if config.keep_shared:
        return samples, skipped, split
    if not split.kept:
        raise InputError(f"--images {config.images}: all pictures are in --test {config.test} too")
    return split.kept, sorted([*skipped, *split.shared], key=lambda item: item.path), split


def _split(config: AlignConfig, test: str, run: RunFolder) -> tuple[list[Sample], list[Skipped], Split]:
    """`--limit` is of pictures that the test does not have; a table is read no further than that takes."""
    wanted, cache = config.limit, run.path / ".shared.json"
    while True:
        samples, skipped = _found(config, run, wanted)
        if config.keep_shared:
            samples = samples[: config.limit]
            return samples, skipped, split_shared(samples, test, cache=cache)
        split = split_shared(samples, test, limit=config.limit, cache=cache)
        if len(split.kept) == config.limit or len(samples) != wanted:
            return samples, skipped, split
        wanted = len(samples) + len(split.shared)


def _found(config: AlignConfig, run: RunFolder, limit: int | None) -> tuple[list[Sample], list[Skipped]]:
    with counting("scan") as tell:
        return scan_images(config.images, store=run.images, limit=limit, cache=run.path / ".scan.jsonl", progress=tell)
