"""What is to be exported: a run's student, merged once and kept, or a model folder as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpa_edge import __version__
from mpa_edge.bundle import Source
from mpa_edge.chat_address import is_address, parse_spec
from mpa_edge.digests import digest_of_folder, digest_of_trained
from mpa_edge.errors import InputError
from mpa_edge.export.families import family_of, read_config
from mpa_edge.export.workshop import Workshop
from mpa_edge.models import ADAPTER, WHOLE, base_of
from mpa_edge.records import write_atomic
from mpa_edge.run_folder import RUN, RunFolder, read_run
from mpa_edge.sums import refuse_damaged
from mpa_edge.tasks import Task, task_of_run

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Names:
    """Names for files and metadata: the student that was trained, and what it was trained into (None for itself)."""

    base: str
    finetune: str | None = None


@dataclass(frozen=True)
class Merged:
    """A model folder that is ready for conversion, and what is known about it. `root` is where bundles go, `base` the
    folder of the model that was trained."""

    folder: Path
    root: Path
    provenance: Source
    names: Names
    checks: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None
    task: Task | None = None
    base: Path | None = None

    @property
    def name(self) -> str:
        """How reports call the model."""
        return self.names.finetune or self.names.base.rpartition("/")[2]


def open_source(source: Path, out: Path | None, progress: Progress) -> Merged:
    """The model of a run folder, merged when that is still to be done, or of a plain model folder.

    Raises `InputError` for a path that is neither, `UnknownFamily` before any work, and `ExportError` when a check
    fails.
    """
    if (source / RUN).is_file():
        return _merged_run(source, out, progress)
    if (source / "config.json").is_file():
        return _plain_model(source, out)
    if (source / ADAPTER).is_file():
        raise InputError(f"{source} is an adapter; name the run that holds it, or merge it first")
    raise InputError(f"{source} is neither a run (no {RUN}) nor a model folder (no config.json)")


def root_of(source: Path, out: Path | None) -> Path:
    """Where the bundles of a run or of a model folder go."""
    return out or (source / "bundles" if (source / RUN).is_file() else Path("bundles") / source.resolve().name)


def _plain_model(folder: Path, out: Path | None) -> Merged:
    from mpa_edge.export.merge_checks import check_files, refuse_quantized
    from mpa_edge.export.merge_weights import load_model

    family_of(read_config(folder))
    refuse_quantized(folder)
    load_model(folder)  # refuses one that lacks weights
    name = folder.resolve().name
    return Merged(
        folder=folder,
        root=root_of(folder, out),
        provenance=Source(
            student=name,
            revision=_revision(folder),
            base_sha256=digest_of_folder(folder),
            tool_version=__version__,
        ),
        names=Names(base=name),
        checks={"source": "base", **check_files(folder)},
    )


def _merged_run(run: Path, out: Path | None, progress: Progress) -> Merged:
    content, student = read_run(run), RunFolder(run).student
    if not any((student / name).is_file() for name in (ADAPTER, WHOLE)):
        raise InputError(f"{run} has no trained student yet; finish it with mpa-edge align")
    refuse_damaged(student)
    from mpa_edge.export.merge import base_folder

    config = content.get("config", {})
    task = task_of_run(content)
    family_of(read_config(base_folder(student)))
    folder, checks = _merge_once(run, student, config.get("longest_edge"), progress)
    base = _model_name(base_of(student))
    return Merged(
        folder=folder,
        root=root_of(run, out),
        provenance=Source(
            student=base,
            teacher=_model_name(config["teacher"]) if config.get("teacher") else None,
            revision=_revision(base_folder(student)),
            task=task.name if task else None,
            metric=task.metric if task else None,
            run=run.resolve().name,
            adapter_sha256=digest_of_trained(student),
            base_sha256=checks["base_sha256"],
            tool_version=__version__,
        ),
        names=Names(base=base, finetune=run.resolve().name),
        checks={key: value for key, value in checks.items() if key != "base_sha256"},
        run=run,
        task=task,
        base=base_folder(student),
    )


def _merge_once(run: Path, student: Path, longest_edge: int | None, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """The run's merged model, made when it is not there or is another student's; `merged.json` vouches for it."""
    from mpa_edge.export.merge import base_folder, merge

    folder, record = run / "merged", run / "merged.json"
    inputs = {"adapter": digest_of_trained(student), "base": digest_of_folder(base_folder(student))}
    if longest_edge is not None:
        inputs["longest_edge"] = str(longest_edge)
    try:
        known = json.loads(record.read_bytes())
        if known["inputs"] == inputs and known["output"] == digest_of_folder(folder):
            return folder, {**known["checks"], "base_sha256": inputs["base"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not there, or half of it: make it anew
    progress("merge")
    # Out of reach of an `align` that trains the student anew, and of another export that merges it.
    with RunFolder(run).lock(None), Workshop(run) as workshop:
        fresh = workshop.folder("merged")
        checks = merge(student, fresh, longest_edge=longest_edge)
        record.unlink(missing_ok=True)
        workshop.place(fresh, folder)
        content = {"inputs": inputs, "output": digest_of_folder(folder), "checks": checks, "tool_version": __version__}
        write_atomic(record, json.dumps(content, indent=2) + "\n")
    return folder, {**checks, "base_sha256": inputs["base"]}


def _revision(folder: Path) -> str | None:
    """The commit of a hub model: the hub's cache keeps each in `snapshots/COMMIT`. None for any other folder, of which
    the digest says what it is."""
    folder = folder.resolve()
    return folder.name if folder.parent.name == "snapshots" else None


def _model_name(spec: str) -> str:
    """A hub id as it is, a local path by its last part, a chat server by the model that it serves: a manifest holds no
    machine's paths and no address."""
    if is_address(spec):
        return parse_spec(spec)[1] or "a model behind a chat server"
    path = Path(spec).expanduser()
    is_path = path.is_dir() or spec.startswith((".", "/", "~")) or spec.count("/") > 1
    return path.resolve().name if is_path else spec
