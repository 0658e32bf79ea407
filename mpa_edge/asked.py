"""The bundle that is asked in the student's place (`--ask`): whether it is one, and one of this student."""

from __future__ import annotations

import json
from pathlib import Path

from mpa_edge.bundle import Bundle, read_bundle
from mpa_edge.chat_address import is_address
from mpa_edge.errors import InputError
from mpa_edge.models import kind_of
from mpa_edge.progress import say
from mpa_edge.runtime.vlm import Vlm


def require_bundle(spec: str) -> None:
    """`InputError` for what is no bundle; nothing is loaded."""
    if kind_of(spec) != "bundle":
        # An address may hold what should not be printed.
        raise InputError(
            f"--ask {'an address' if is_address(spec) else spec}: is no bundle. "
            "Name a folder with bundle.json in it, as mpa-edge export makes of the student."
        )


def check_bundle(spec: str, student: Vlm, student_spec: str) -> None:
    """`InputError` for a bundle of another model than the student, as far as both say of which weights they are.

    What may be meant so gets a line: a bundle that cannot be compared and has another name, one that was trained
    further than the student, and one that sees pictures in another size.
    """
    bundle, told = read_bundle(Path(spec).expanduser()), student.describe()
    source, weights = bundle.source, told.get("weights")
    if weights and source.base_sha256:
        if source.base_sha256 == weights:
            if source.adapter_sha256:
                say(f"--ask {spec}: was trained further; --student {student_spec} is trained from where it is itself")
        elif not _is_merged_run(Path(student_spec).expanduser(), weights, bundle):
            raise InputError(
                f"--ask {spec}: was made of {source.student}, with other weights than --student {student_spec}. "
                f"Make a bundle of the student (mpa-edge export {student_spec}), or name the student that it is of."
            )
    elif _last(source.student) != _last(student_spec):
        say(f"--ask {spec}: was made of {source.student}; whether that is --student {student_spec} cannot be told")
    edge = ((told.get("image") or {}).get("size") or {}).get("longest_edge")
    # Qwen-VL's processors call by that name the most pixels of a picture in all.
    seen = getattr(bundle.image, "longest_edge", None) or getattr(bundle.image, "max_pixels", None)
    if edge is not None and seen not in (None, edge):
        say(
            f"--ask {spec}: sees pictures of up to {seen} pixels, --student {student_spec} of up "
            f"to {edge} (--longest-edge)"
        )


def _is_merged_run(folder: Path, weights: str, bundle: Bundle) -> bool:
    """Whether the folder is a run's merged model, and the bundle was made of that run: it names the base below both."""
    try:
        record = json.loads((folder.resolve().parent / "merged.json").read_bytes())
        inputs = record["inputs"]["base"], record["inputs"]["adapter"]
        return record["output"] == weights and inputs == (bundle.source.base_sha256, bundle.source.adapter_sha256)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _last(name: str) -> str:
    return Path(name.rstrip("/")).name
