"""The models of a run, opened as its settings say."""

from __future__ import annotations

from typing import Any

from mpa_edge.asked import check_bundle
from mpa_edge.askers import Asks, annotator_of, identifier_of, reidentifier_of
from mpa_edge.config import AlignConfig
from mpa_edge.models import open_vlm
from mpa_edge.runtime.vlm import Vlm


def open_models(config: AlignConfig) -> tuple[Vlm, Vlm, Vlm | None]:
    """The teacher, the student, and what is asked in its place if something is, as a run needs them. The student comes
    first, so that a bundle that is not of it is refused before the large model is loaded."""
    student = open_student(config, config.student)
    if config.ask:
        check_bundle(config.ask, student, config.student)
    return open_teacher(config), student, open_vlm(config.ask) if config.ask else None


def open_asks(config: AlignConfig, student: str | None = None) -> Asks:
    """Who asks in the first round with models of its own; with `student`, who asks that one in a later round."""
    if student:
        return Asks(None, reidentifier_of(config, open_student(config, student)))
    asked = open_vlm(config.ask) if config.ask else open_student(config, config.student)
    teacher = open_teacher(config)
    return Asks(annotator_of(config, teacher), identifier_of(config, teacher, asked))


def open_student(config: AlignConfig, spec: str) -> Vlm:
    """The student, or what a round made of it."""
    options = _options(config, longest_edge=config.longest_edge)
    return open_vlm(spec, **options, four_bit=config.method == "qlora")


def open_teacher(config: AlignConfig) -> Vlm:
    """The teacher."""
    return open_vlm(
        config.teacher,
        **_options(config, longest_edge=config.teacher_longest_edge),
        four_bit=config.teacher_4bit,
        max_requests=config.max_requests,
        concurrency=config.concurrency,
        timeout=config.teacher_timeout,
    )


def _options(config: AlignConfig, *, longest_edge: int | None) -> dict[str, Any]:
    """How models are opened."""
    return {
        "device": config.device,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "longest_edge": longest_edge,
        "trust_remote_code": config.trust_remote_code,
    }
