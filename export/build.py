"""A run or a model folder to bundles: merge, convert, quantize, verify, and only then a folder with a manifest.

Everything is made in hidden temporary folders and renamed into place, so that a killed export leaves nothing that looks
like a bundle, and an older bundle stays until the new one is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpa_edge.bundle import FORMATS, Bundle, File, describe_file, write_bundle
from mpa_edge.errors import InputError, require
from mpa_edge.export.families import family_of, read_config, read_settings
from mpa_edge.export.merged import Merged, open_source, root_of
from mpa_edge.export.model_files import CONFIG
from mpa_edge.export.quants import Format, checked, checked_mmproj
from mpa_edge.export.road import NAME as ROAD
from mpa_edge.export.road import Asked, Road, missing_full_precision, read_asked
from mpa_edge.export.samples import run_questions, synthetic_questions
from mpa_edge.export.steps import Steps
from mpa_edge.export.workshop import Workshop
from mpa_edge.lock import kept
from mpa_edge.run_folder import RUN
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.selfcheck import MADE_WITH, SHAPING
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.versions import installed

ENGINES: dict[str, Any] = {format: engine for engine, format in FORMATS.items()}
# What a format needs, looked for before any work; it comes with the extra `export`, or with its own.
TRAINING_SIDE = ("torch", "transformers", "peft", "safetensors")
LIBRARIES: dict[Format, tuple[str, ...]] = {
    "gguf": (*TRAINING_SIDE, "gguf", "conversion", "llama_cpp"),
    "onnx": (*TRAINING_SIDE, "onnx", "onnxscript", "onnxruntime", "onnxruntime_genai"),
    "openvino": (*TRAINING_SIDE, "openvino", "nncf"),
    "hf": TRAINING_SIDE,
}
EXTRAS: dict[Format, str] = {"openvino": "export-openvino"}
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
    require(EXTRAS.get(format, "export"), LIBRARIES[format])
    with _no_progress_bars(), Steps(progress) as steps:
        asked = _asked(Path(source), out, options)
        merged = open_source(Path(source), out, steps)
        family_of(read_config(merged.folder))
        road = Road(merged, asked) if asked else None
        with kept(merged.run) if merged.run else nullcontext(), Workshop(merged.root) as workshop:
            if format == "hf":
                return [_hf_folder(merged, road, workshop, samples, options, steps)]
            return _bundles(_Job(merged, format, options), wanted, road, workshop, samples, steps)


def _check_options(format: Format, quants: Sequence[str], options: Options) -> None:
    """Refuse what does not go together before any work."""
    if format == "gguf":
        checked_mmproj(options.mmproj)
    elif options.mmproj != Options.mmproj:
        raise InputError("--mmproj goes with --format gguf")
    if options.limit is not None and options.data is None:
        raise InputError("--limit goes with --data FILE")
    if options.quantize_vision:
        if format != "onnx":
            raise InputError("--quantize-vision goes with --format onnx")
        from mpa_edge.export.to_onnx import graph_precisions

        for quant in quants:
            graph_precisions(quant, quantize_vision=True)


def _asked(source: Path, out: Path | None, options: Options) -> Asked | None:
    """The questions of `--data`; what is neither a run nor a model is for `open_source` to tell."""
    if options.data is None or not any((source / name).is_file() for name in (RUN, CONFIG)):
        return None
    return read_asked(source, root_of(source, out), options.data, options.limit)


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


def _hf_folder(
    merged: Merged, road: Road | None, workshop: Workshop, samples: int, options: Options, steps: Steps
) -> Path:
    from mpa_edge.export.to_hf import to_hf

    scored = road.checks(progress=steps) if road else None
    steps("ask the merged model")
    reference = _Settings(merged).reference(samples)
    steps("write and verify hf")
    return to_hf(merged, merged.root / "hf", reference, workshop, road=scored, repo=options.repo)


def _bundles(
    job: _Job, quants: list[str], road: Road | None, workshop: Workshop, samples: int, steps: Steps
) -> list[Path]:
    """Make, verify and place one bundle after the other; then score the road, where there is one, and note it down."""
    wanted = [*quants, *(missing_full_precision(job.format, quants) if road else [])]
    folders = {quant: workshop.folder(f"{job.format}-{quant}") for quant in wanted}
    steps(f"convert to {job.format}")
    made = {quant: job.bundle(quant, *given) for quant, given in job.convert(folders, workshop).items()}
    steps("ask the merged model")
    reference = job.settings.reference(samples)
    placed: list[tuple[Path, Bundle]] = []
    for quant in quants:
        steps(f"verify {job.format}-{quant}")
        target = job.merged.root / f"{job.format}-{quant}"
        whole = _verify_and_place(made[quant], folders[quant], target, reference, workshop)
        for warning in _warnings(whole):
            steps.warn(warning)
        placed.append((target, whole))
    if road:
        besides = [(folders[quant], made[quant]) for quant in wanted if quant not in quants]
        scored = road.checks([*placed, *besides], steps)
        for folder, bundle in placed:
            write_bundle(folder, bundle.model_copy(update={"checks": {**bundle.checks, ROAD: scored}}))
    return [folder for folder, _ in placed]


class _Job:
    """One model on its way to one format."""

    def __init__(self, merged: Merged, format: Format, options: Options) -> None:
        self.merged, self.format, self.settings = merged, format, _Settings(merged)
        self._options = options

    def bundle(self, quant: str, files: Sequence[File], checks: dict[str, Any]) -> Bundle:
        return Bundle(
            name=f"{self.merged.name}-{self.format}-{quant}",
            family=self.settings.family,
            engine=ENGINES[self.format],
            quantization=quant,
            files=tuple(files),
            image=self.settings.image,
            prompt=self.settings.prompt,
            source=self.merged.provenance,
            checks={"merge": self.merged.checks, self.format: checks, MADE_WITH: installed(SHAPING)},
        )

    def convert(self, folders: dict[str, Path], workshop: Workshop) -> dict[str, tuple[list[File], dict[str, Any]]]:
        """Write the engine's files of every quantization into its folder."""
        for folder in folders.values():
            folder.mkdir()
        merged, options = self.merged, self._options
        if self.format == "gguf":
            from mpa_edge.export.to_gguf import to_gguf

            return to_gguf(merged.folder, folders, merged.names, mmproj=options.mmproj, base=merged.base)
        graphs = workshop.folder("graphs")
        graphs.mkdir()
        if self.format == "openvino":
            from mpa_edge.export.to_openvino import to_openvino

            return {quant: to_openvino(merged.folder, folders[quant], quant, graphs=graphs) for quant in folders}
        from mpa_edge.export.to_onnx import to_onnx

        return {
            quant: to_onnx(merged.folder, folder, quant, quantize_vision=options.quantize_vision, graphs=graphs)
            for quant, folder in folders.items()
        }


def _verify_and_place(bundle: Bundle, folder: Path, target: Path, reference: Any, workshop: Workshop) -> Bundle:
    from mpa_edge.export.verify import verify
    from mpa_edge.runtime import selfcheck

    with open_bundle(folder, bundle) as vlm:
        checks = {**bundle.checks, "verify": verify(vlm, reference), selfcheck.NAME: selfcheck.record(vlm)}
    others = _for_others(folder, bundle)
    (folder / "README.md").write_text(_readme(folder, bundle, others), encoding="utf-8")
    files = (*bundle.files, describe_file(folder, "README.md", "readme"), *others)
    whole = bundle.model_copy(update={"checks": checks, "files": files})
    write_bundle(folder, whole)
    workshop.place(folder, target)
    return whole


class _Settings:
    """What the manifest says about pictures and prompts, from the merged model's own files."""

    def __init__(self, merged: Merged) -> None:
        self._merged = merged
        task = merged.task
        template, most = (task.question_template, task.max_new_tokens) if task else ("{question}", 32)
        family, self.image, self.prompt = read_settings(merged.folder, template, most)
        self.family = family.name

    def reference(self, samples: int) -> Any:
        """The merged model's answers to the run's own questions; where there are too few, to drawn ones as well."""
        from mpa_edge.export.verify import ask_reference
        from mpa_edge.transformers_vlm import TransformersVlm

        questions = run_questions(self._merged.run, self._merged.task, samples) if self._merged.run else []
        # One at a time: a picture of 17 tiles takes 0.3 GB on its way through SmolVLM's vision tower.
        model = TransformersVlm.load(str(self._merged.folder), device="cpu", dtype="float32", batch_size=1)
        try:
            decoding = Decoding(max_new_tokens=min(self.prompt.max_new_tokens, 32))
            drawn = synthetic_questions(samples - len(questions))
            return ask_reference(model, [*questions, *drawn], decoding, drawn=len(drawn))
        finally:
            model.close()


def _warnings(bundle: Bundle) -> list[str]:
    """What is to be told of a bundle that passed its checks all the same."""
    found = [bundle.checks["verify"].get("warning")]
    if bundle.engine == "llama.cpp":
        from mpa_edge.export.gguf_readme import tokenizer_warning

        found.append(tokenizer_warning(bundle))
    return [f"{bundle.short_name}: {warning}" for warning in found if warning]


def _readme(folder: Path, bundle: Bundle, others: Sequence[File]) -> str:
    head = f"# {bundle.name}\n\nMade by mpa-edge {bundle.source.tool_version} from {bundle.source.student}.\n\n"
    if bundle.engine == "llama.cpp":
        from mpa_edge.export.gguf_readme import gguf_commands

        return head + gguf_commands(bundle, modelfile=bool(others))
    if bundle.engine == "openvino":
        from mpa_edge.export.to_openvino import openvino_commands

        return head + openvino_commands(bundle)
    from mpa_edge.export.onnx_readme import onnx_commands

    return head + onnx_commands(folder, bundle)


def _for_others(folder: Path, bundle: Bundle) -> list[File]:
    """Files that other programs want beside the engine's own."""
    if bundle.engine != "llama.cpp":
        return []
    from mpa_edge.export.gguf_readme import write_modelfile

    modelfile = write_modelfile(folder, bundle)
    return [modelfile] if modelfile else []
