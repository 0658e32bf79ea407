"""Whether a run's folder holds what these settings would make: seen before anything of it is written or deleted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpa_edge.asking import refuse_small_budget
from mpa_edge.config import AlignConfig
from mpa_edge.errors import FingerprintMismatch
from mpa_edge.parts import asked_about, compare_fingerprints
from mpa_edge.records import Sample, read_rows
from mpa_edge.run_folder import RunFolder, known_run
from mpa_edge.runtime.vlm import Vlm
from mpa_edge.scan import Pictures

# Settings that shape the annotations and cases: what it took hours to ask is not asked again unawares. All others shape
# later stages, which are redone, or none.
SHAPING = ("limit", "seed", "questions", "temperature", "match", "votes", "blind", "chunk_size")


def refuse_other_settings(run: RunFolder, now: dict[str, Any]) -> None:
    """`FingerprintMismatch` when the folder holds what other settings or models were asked; before anything is written.

    Each stage looks again at what shapes its own output; this check sees it first and names the flags.
    """
    before = known_run(run.path)
    if not before or not run.annotations.exists():
        return
    for shaping in (_flags, _models):
        compare_fingerprints(run.path, shaping(before), shaping(now))


def _flags(content: dict[str, Any]) -> dict[str, Any]:
    config = content.get("config", {})
    flags = {f"--{name.replace('_', '-')}": config.get(name) for name in SHAPING}
    return flags | {"--ask": "a bundle" if "ask" in content else None}


def _models(content: dict[str, Any]) -> dict[str, Any]:
    """Models and tasks by what they are, not by their paths."""
    asked = "ask" if "ask" in content else "student"
    sides = {"--task": content.get("task"), "--teacher": content.get("teacher"), f"--{asked}": content.get(asked)}
    return {side: {**(values or {}), "name": None} for side, values in sides.items()}


def refuse_other_pictures(config: AlignConfig, run: RunFolder, pictures: Pictures) -> None:
    """`FingerprintMismatch` when the folder holds what was asked about other pictures."""
    if not run.samples.exists() or not run.annotations.exists():
        return
    if asked_about(run.annotations) == pictures.digest:
        return  # whatever became of the list of them
    rows = zip_longest(_contents(read_rows(run.samples, Sample)), _contents(pictures.samples()))
    if all(before == now for before, now in rows):
        return
    before, now = _keys(read_rows(run.samples, Sample)), _keys(pictures.samples())
    new = len(np.setdiff1d(now, before, assume_unique=True))
    difference = (f"{len(before)} pictures", f"{len(now)} pictures, {new} of them new")
    then = known_run(run.path).get("config", {})
    flags = {"--test": "test", "--keep-shared": "keep_shared"}
    causes = {flag: (then.get(name), getattr(config, name)) for flag, name in flags.items()}
    other = {flag: pair for flag, pair in causes.items() if then and pair[0] != pair[1]}
    raise FingerprintMismatch(run.path, {"--images": difference, **other})


def _contents(samples: Iterable[Sample]) -> Iterator[str]:
    return (sample.sha256 for sample in samples)


def _keys(samples: Iterable[Sample]) -> NDArray[np.uint64]:
    """The different contents, sorted, as the first 64 bits of each: there may be more than fit into memory."""
    return np.unique(np.fromiter((int(content[:16], 16) for content in _contents(samples)), np.uint64))


def move_rounds(run: RunFolder, rounds: int) -> None:
    """Put the rounds of an earlier run with more or fewer of them where they lie now."""
    then = known_run(run.path)
    before = then.get("config", {}).get("rounds", 1) if then else rounds
    if before != rounds:
        run.move_to(run.round(before))
        run.round(rounds).move_to(run)


def refuse_small_parts(config: AlignConfig, teacher: Vlm, pictures: int) -> None:
    """`--max-requests` must do for one part: twice what annotating takes, since attempts that failed count too, and for
    identifying as many questions. There may be more of them; that is known when they are written."""
    asked = config.questions * max(2, config.votes + config.blind)
    refuse_small_budget(teacher, asked * pictures, f"one part of {pictures} pictures")
