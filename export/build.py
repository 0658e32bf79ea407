"""A run or a model folder to bundles: merge, convert, quantize, verify, and only then a folder with a manifest.

Everything is made in hidden temporary folders and renamed into place, so that a killed export leaves nothing that looks
like a bundle, and an older bundle stays until the new one is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpa_edge.bundle import Bundle, File, describe_file, write_bundle
from mpa_edge.errors import InputError, require
from mpa_edge.export.families import family_of, prompt_settings, read_config
from mpa_edge.export.merged import Merged, open_source
from mpa_edge.export.quants import Format, checked, checked_mmproj
from mpa_edge.export.samples import run_questions, synthetic_questions
from mpa_edge.export.steps import Steps
from mpa_edge.export.workshop import Workshop
from mpa_edge.processors import load_processor
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.vlm import Decoding

ENGINES: dict[Format, Literal["llama.cpp", "onnxruntime", "openvino"]] = {"gguf": "llama.cpp", "onnx": "onnxruntime"}
# What a format needs, looked for before any work: all of it comes with the extra `export`.
TRAINING_SIDE = ("torch", "transformers", "peft", "safetensors")
LIBRARIES: dict[Format, tuple[str, ...]] = {
    "gguf": (*TRAINING_SIDE, "gguf", "conversion", "llama_cpp"),
    "onnx": (*TRAINING_SIDE, "onnx", "onnxscript", "onnxruntime", "onnxruntime_genai"),
    "hf": TRAINING_SIDE,
}
SAMPLES = 48


@dataclass(frozen=True)
class Options:
    """What an export may be told beside its format: `mmproj` is the precision of a GGUF bundle's vision part,
    `quantize_vision` gives an ONNX bundle's vision encoder the decoder's bits, `repo` is the hub repository that a
    Hugging Face folder's card tells how to load. `data` is a labelled file on which the whole road is scored, `limit`
    that many of its questions."""

    mmproj: str = "f16"
    quantize_vision: bool = False
    repo: str | None = None
    data: Path | None = None
    limit: int | None = None


DEFAULTS = Options()


def export(
    source: Path,
    format: Format,
    quants: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    samples: int = SAMPLES,
    options: Options = DEFAULTS,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Path]:
    """Make one bundle per quantization from a run folder or a transformers model folder, and return their folders.

    Bundles go to `<out>/<format>-<quant>/`, the Hugging Face folder to `<out>/hf/`; without `out` to the run's
    `bundles/`, or to `bundles/<model>/` here. A run's merged model is kept at `<run>/merged/` and used again while
    adapter and base are the same. `samples` many questions verify each bundle; `progress` is called with a line at the
    beginning and at the end of each step. Raises `InputError` for what cannot be exported, `UnknownFamily`, and
    `ExportError` when a check fails; nothing that failed a check is kept.
    """
    wanted = checked(format, quants)
    _check_options(format, wanted, options)
    require("export", LIBRARIES[format])
    with _no_progress_bars(), Steps(progress) as steps:
        merged = open_source(Path(source), out, steps)
        family_of(read_config(merged.folder))
        with Workshop(merged.root) as workshop:
            if format == "hf":
                return [_hf_folder(merged, workshop, samples, options, steps)]
            return _build(merged, format, wanted, workshop, samples, options, steps)


def _check_options(format: Format, quants: Sequence[str], options: Options) -> None:
    """Refuse what does not go together before any work."""
    if format == "gguf":
        checked_mmproj(options.mmproj)
    elif options.mmproj != Options.mmproj:
        raise InputError("--mmproj goes with --format gguf")
    if options.quantize_vision:
        if format != "onnx":
            raise InputError("--quantize-vision goes with --format onnx")
        from mpa_edge.export.to_onnx import graph_precisions

        for quant in quants:
            graph_precisions(quant, quantize_vision=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every model that it loads; the caller has `progress`."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _hf_folder(merged: Merged, workshop: Workshop, samples: int, options: Options, steps: Steps) -> Path:
    from mpa_edge.export.to_hf import to_hf

    settings = _Settings(merged)
    steps("ask the merged model")
    reference = settings.reference(samples)
    steps("write and verify hf")
    return to_hf(merged, merged.root / "hf", reference, workshop, repo=options.repo)


def _build(
    merged: Merged,
    format: Format,
    quants: list[str],
    workshop: Workshop,
    samples: int,
    options: Options,
    steps: Steps,
) -> list[Path]:
    settings = _Settings(merged)
    folders = {quant: workshop.folder(f"{format}-{quant}") for quant in quants}
    steps(f"convert to {format}")
    made = _convert(merged, format, folders, workshop, options)
    steps("ask the merged model")
    reference = settings.reference(samples)
    placed = []
    for quant, (files, checks) in made.items():
        steps(f"verify {format}-{quant}")
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
    merged: Merged, format: Format, folders: dict[str, Path], workshop: Workshop, options: Options
) -> dict[str, tuple[list[File], dict[str, Any]]]:
    for folder in folders.values():
        folder.mkdir()
    if format == "gguf":
        from mpa_edge.export.to_gguf import to_gguf

        return to_gguf(merged.folder, folders, merged.names, mmproj=options.mmproj, base=merged.base)
    from mpa_edge.export.to_onnx import to_onnx

    graphs = workshop.folder("graphs")
    graphs.mkdir()
    return {
        quant: to_onnx(merged.folder, folder, quant, quantize_vision=options.quantize_vision, graphs=graphs)
        for quant, folder in folders.items()
    }


def _verify_and_place(bundle: Bundle, folder: Path, target: Path, reference: Any, workshop: Workshop) -> Path:
    from mpa_edge.export.verify import verify
    from mpa_edge.runtime import selfcheck

    with open_bundle(folder, bundle) as vlm:
        checks = {**bundle.checks, "verify": verify(vlm, reference), selfcheck.NAME: selfcheck.record(vlm)}
    (folder / "README.md").write_text(_readme(bundle))
    files = (*bundle.files, describe_file(folder, "README.md", "readme"), *_for_others(folder, bundle))
    write_bundle(folder, bundle.model_copy(update={"checks": checks, "files": files}))
    workshop.place(folder, target)
    return target


class _Settings:
    """What the manifest says about pictures and prompts, from the merged model's own files."""

    def __init__(self, merged: Merged) -> None:
        self._merged = merged
        config = read_config(merged.folder)
        family = family_of(config)
        processor = load_processor(merged.folder)
        task = merged.task
        template, most = (task.question_template, task.max_new_tokens) if task else ("{question}", 32)
        self.family = family.name
        self.image = family.image_settings(config, processor)
        self.prompt = prompt_settings(config, processor, template, most)

    def reference(self, samples: int) -> Any:
        """The merged model's answers to the run's own questions; where there are too few, to drawn ones as well."""
        from mpa_edge.export.verify import ask_reference
        from mpa_edge.transformers_vlm import TransformersVlm

        questions = run_questions(self._merged.run, self._merged.task, samples) if self._merged.run else []
        model = TransformersVlm.load(str(self._merged.folder), device="cpu", dtype="float32")
        try:
            decoding = Decoding(max_new_tokens=min(self.prompt.max_new_tokens, 32))
            drawn = synthetic_questions(samples - len(questions))
            return ask_reference(model, [*questions, *drawn], decoding, drawn=len(drawn))
        finally:
            model.close()


def _readme(bundle: Bundle) -> str:
    head = f"# {bundle.name}\n\nMade by mpa-edge {bundle.source.tool_version} from {bundle.source.student}.\n\n"
    if bundle.engine == "llama.cpp":
        from mpa_edge.export.gguf_readme import gguf_commands

        return head + gguf_commands(bundle)
    return head + '    mpa-edge ask . photo.jpg "What does the sign say?"\n'


def _for_others(folder: Path, bundle: Bundle) -> list[File]:
    """Files that other programs want beside the engine's own."""
    if bundle.engine != "llama.cpp":
        return []
    from mpa_edge.export.gguf_readme import write_modelfile

    return [write_modelfile(folder, bundle)]
