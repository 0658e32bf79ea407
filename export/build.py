"""A run or a model folder to bundles: merge, convert, quantize, verify, and only then a folder with a manifest.

Everything is made in hidden temporary folders and renamed into place, so that a killed export leaves nothing that looks
like a bundle, and an older bundle stays until the new one is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpa_edge import __version__
from mpa_edge.bundle import Bundle, File, describe_file, write_bundle
from mpa_edge.bundle import Source as Provenance
from mpa_edge.digests import digest_of_adapter, digest_of_folder
from mpa_edge.errors import InputError
from mpa_edge.export.families import family_of, read_config
from mpa_edge.export.samples import run_questions, synthetic_questions
from mpa_edge.export.to_gguf import Names, check_quants, to_gguf
from mpa_edge.models import ADAPTER, base_of
from mpa_edge.records import write_atomic
from mpa_edge.run_folder import RUN, RunFolder, read_run
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.tasks import Task, task_named

Format = Literal["gguf", "onnx"]
Progress = Callable[[str], None]

ENGINES: dict[str, Literal["llama.cpp", "onnxruntime"]] = {"gguf": "llama.cpp", "onnx": "onnxruntime"}
ONNX_QUANTS = ("fp32", "int8", "q4")
SAMPLES = 48


@dataclass(frozen=True)
class Merged:
    """A model folder that is ready for conversion, and what is known about it. `root` is where bundles go."""

    folder: Path
    root: Path
    provenance: Provenance
    names: Names
    checks: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None
    task: Task | None = None

    @property
    def name(self) -> str:
        """How reports call the model."""
        return self.names.finetune or self.names.base.rpartition("/")[2]


def export(
    source: Path,
    format: Format,
    quants: Sequence[str],
    out: Path | None = None,
    *,
    samples: int = SAMPLES,
    progress: Progress = lambda message: None,
) -> list[Path]:
    """Make one bundle per quantization from a run folder or a transformers model folder, and return their folders.

    Bundles go to `<out>/<format>-<quant>/`; without `out` to the run's `bundles/`, or to `bundles/<model>/` here. A
    run's merged model is kept at `<run>/merged/` and used again while adapter and base are the same. `progress` is
    called with a line before each step. Raises `InputError` for what cannot be exported, `UnknownFamily`, and
    `ExportError` when a check fails; nothing that failed a check is kept.
    """
    quants = _checked_quants(format, quants)
    merged = _merged(Path(source), out, progress)
    family_of(read_config(merged.folder))
    with _Workshop(merged.root) as workshop:
        return _build(merged, format, quants, workshop, samples, progress)


def _checked_quants(format: Format, quants: Sequence[str]) -> list[str]:
    wanted = list(dict.fromkeys(quant.strip().lower() for quant in quants if quant.strip()))
    if not wanted:
        raise InputError("--quant: name at least one quantization")
    if format == "gguf":
        check_quants(wanted)
    elif unknown := [quant for quant in wanted if quant not in ONNX_QUANTS]:
        raise InputError(f"--quant {unknown[0]}: not known for --format onnx; known: {', '.join(ONNX_QUANTS)}")
    return wanted


def _merged(source: Path, out: Path | None, progress: Progress) -> Merged:
    if (source / RUN).is_file():
        return _merged_run(source, out, progress)
    if (source / "config.json").is_file():
        return _plain_model(source, out)
    if (source / ADAPTER).is_file():
        raise InputError(f"{source} is an adapter; name the run that holds it, or merge it first")
    raise InputError(f"{source} is neither a run (no {RUN}) nor a model folder (no config.json)")


def _plain_model(folder: Path, out: Path | None) -> Merged:
    from mpa_edge.export.merge import check_files, refuse_quantized

    refuse_quantized(folder)
    name = folder.resolve().name
    return Merged(
        folder=folder,
        root=out or Path("bundles") / name,
        provenance=Provenance(student=name, base_sha256=digest_of_folder(folder), tool_version=__version__),
        names=Names(base=name),
        checks={"source": "base", **check_files(folder)},
    )


def _merged_run(run: Path, out: Path | None, progress: Progress) -> Merged:
    content, adapter = read_run(run), RunFolder(run).student
    if not (adapter / ADAPTER).is_file():
        raise InputError(f"{run} has no trained student yet; finish it with mpa-edge align")
    config = content.get("config", {})
    task = task_named(config["task"]) if config.get("task") else None
    folder, checks = _merge_once(run, adapter, progress)
    base = _model_name(base_of(adapter))
    return Merged(
        folder=folder,
        root=out or run / "bundles",
        provenance=Provenance(
            student=base,
            teacher=_model_name(config["teacher"]) if config.get("teacher") else None,
            task=task.name if task else None,
            metric=task.metric if task else None,
            run=run.resolve().name,
            adapter_sha256=digest_of_adapter(adapter),
            base_sha256=checks["base_sha256"],
            tool_version=__version__,
        ),
        names=Names(base=base, finetune=run.resolve().name),
        checks={key: value for key, value in checks.items() if key != "base_sha256"},
        run=run,
        task=task,
    )


def _merge_once(run: Path, adapter: Path, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """The run's merged model, made when it is not there or is another adapter's; `merged.json` vouches for it."""
    from mpa_edge.export.merge import base_folder, merge

    folder, record = run / "merged", run / "merged.json"
    inputs = {"adapter": digest_of_adapter(adapter), "base": digest_of_folder(base_folder(adapter))}
    try:
        known = json.loads(record.read_bytes())
        if known["inputs"] == inputs and known["output"] == digest_of_folder(folder):
            return folder, {**known["checks"], "base_sha256": inputs["base"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or half of it: make it anew
    progress("merge")
    with _Workshop(run) as workshop:
        fresh = workshop.folder("merged")
        checks = merge(adapter, fresh)
        record.unlink(missing_ok=True)
        workshop.place(fresh, folder)
    content = {"inputs": inputs, "output": digest_of_folder(folder), "checks": checks, "tool_version": __version__}
    write_atomic(record, json.dumps(content, indent=2) + "\n")
    return folder, {**checks, "base_sha256": inputs["base"]}


def _build(
    merged: Merged, format: Format, quants: list[str], workshop: _Workshop, samples: int, progress: Progress
) -> list[Path]:
    settings = _Settings(merged)
    folders = {quant: workshop.folder(f"{format}-{quant}") for quant in quants}
    progress(f"convert to {format}")
    made = _convert(merged, format, folders, workshop)
    progress("ask the merged model")
    reference = settings.reference(samples)
    placed = []
    for quant, (files, checks) in made.items():
        progress(f"verify {format}-{quant}")
        bundle = Bundle(
            name=f"{merged.name}-{format}-{quant}",
            family=settings.family,
            engine=ENGINES[format],
            quantization=quant,
            files=tuple(files),
            image=settings.image,
            prompt=settings.prompt,
            source=merged.provenance,
            checks={"merge": merged.checks, format: checks},
        )
        placed.append(_verify_and_place(bundle, folders[quant], merged.root / f"{format}-{quant}", reference, workshop))
    return placed


def _convert(
    merged: Merged, format: Format, folders: dict[str, Path], workshop: _Workshop
) -> dict[str, tuple[list[File], dict[str, Any]]]:
    for folder in folders.values():
        folder.mkdir()
    if format == "gguf":
        return to_gguf(merged.folder, folders, merged.names)
    from mpa_edge.export.to_onnx import to_onnx

    graphs = workshop.folder("graphs")
    graphs.mkdir()
    return {quant: to_onnx(merged.folder, folder, quant, graphs=graphs) for quant, folder in folders.items()}


def _verify_and_place(bundle: Bundle, folder: Path, target: Path, reference: Any, workshop: _Workshop) -> Path:
    from mpa_edge.export.verify import verify

    with open_bundle(folder, bundle) as vlm:
        checks = {**bundle.checks, "verify": verify(vlm, reference)}
    (folder / "README.md").write_text(_readme(bundle, target))
    files = (*bundle.files, describe_file(folder, "README.md", "readme"))
    write_bundle(folder, bundle.model_copy(update={"checks": checks, "files": files}))
    workshop.place(folder, target)
    return target


class _Settings:
    """What the manifest says about pictures and prompts, from the merged model's own files."""

    def __init__(self, merged: Merged) -> None:
        from transformers import AutoProcessor

        self._merged = merged
        config = read_config(merged.folder)
        family = family_of(config)
        processor = AutoProcessor.from_pretrained(merged.folder)
        task = merged.task
        template, most = (task.question_template, task.max_new_tokens) if task else ("{question}", 32)
        self.family = family.name
        self.image = family.image_settings(config, processor)
        self.prompt = family.prompt_settings(config, processor, template, most)

    def reference(self, samples: int) -> Any:
        """The merged model's answers to the run's own questions, or to drawn ones where there is no run."""
        from mpa_edge.export.verify import ask_reference
        from mpa_edge.transformers_vlm import TransformersVlm

        questions = run_questions(self._merged.run, self._merged.task, samples) if self._merged.run else []
        model = TransformersVlm.load(str(self._merged.folder), device="cpu", dtype="float32")
        try:
            decoding = Decoding(max_new_tokens=min(self.prompt.max_new_tokens, 32))
            return ask_reference(model, questions or synthetic_questions(samples), decoding)
        finally:
            model.close()


class _Workshop:
    """Temporary folders beside the finished ones, removed at the end; those of processes that died are removed too."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __enter__(self) -> _Workshop:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self._root}: cannot be written ({error.strerror})") from error
        for left in self._root.glob(".*.tmp"):
            owner = re.fullmatch(r"\..+\.(\d+)\.tmp", left.name)
            if owner and not _is_running(int(owner.group(1))):
                shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        for left in self._root.glob(f".*.{os.getpid()}.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def folder(self, name: str) -> Path:
        """A temporary path; nothing is there yet."""
        return self._root / f".{name}.{os.getpid()}.tmp"

    def place(self, folder: Path, target: Path) -> None:
        """Put a finished folder in its place, and what was there away."""
        old = self.folder(f"{target.name}-old")
        if target.exists():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _model_name(spec: str) -> str:
    """A hub id as it is, a local path by its last part: a manifest holds no machine's paths."""
    path = Path(spec).expanduser()
    return path.resolve().name if path.is_dir() or spec.startswith((".", "/", "~")) else spec


def _readme(bundle: Bundle, target: Path) -> str:
    lines = [f"# {bundle.name}", "", f"Made by mpa-edge {bundle.source.tool_version} from {bundle.source.student}.", ""]
    lines += ['    mpa-edge ask . photo.jpg "What does the sign say?"']
    if bundle.engine == "llama.cpp":
        model, mmproj = (next(f.path for f in bundle.files if f.role == role) for role in ("language_model", "mmproj"))
        lines += [
            f'    llama-mtmd-cli -m {model} --mmproj {mmproj} --image photo.jpg --temp 0 -p "What does the sign say?"'
        ]
    return "\n".join(lines) + "\n"
