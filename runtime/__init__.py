"""Bundle to answers: numpy, pillow, tokenizers and one engine; never torch.

from mpa_edge.runtime import load

with load("runs/signs/bundles/gguf-q8_0") as vlm:
    print(vlm.ask("photo.jpg", "What does the sign say?").text)
    with vlm.look("photo.jpg") as view:  # encoded once, asked twice
        print(view.ask("What does it cost?").text, view.ask("Which colour is it?").text)
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

from pydantic import ValidationError

from mpa_edge.bundle import Bundle, read_bundle
from mpa_edge.errors import InputError, MissingExtra
from mpa_edge.runtime.answering import AnswerStream
from mpa_edge.runtime.bundle_vlm import CACHE_MB, BundleVlm
from mpa_edge.runtime.families import family_of_bundle
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.look import View
from mpa_edge.runtime.prompts import Turn, id_of, read_tokenizer
from mpa_edge.runtime.vlm import Answer, Decoding, Timings, Vlm

__all__ = [
    "Answer",
    "AnswerStream",
    "BundleVlm",
    "Decoding",
    "Timings",
    "Turn",
    "View",
    "Vlm",
    "load",
    "open_bundle",
    "open_image",
]

# Engine of the manifest -> our module, the library it stands on, its name on PyPI, and the extra that installs it.
# Each module offers `open_engine(folder: Path, bundle: Bundle, image_token: int, threads: int, device: str) -> Engine`.
ENGINES = {
    "llama.cpp": ("mpa_edge.runtime.llamacpp", "llama_cpp", "llama-cpp-python", "gguf"),
    "onnxruntime": ("mpa_edge.runtime.onnx", "onnxruntime", "onnxruntime", "onnx"),
    "openvino": ("mpa_edge.runtime.openvino", "mpa_edge.runtime.openvino_library", "openvino", "openvino"),
}


def load(
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    longest_edge: int | None = None,
    cache_mb: int = CACHE_MB,
) -> BundleVlm:
    """Open the bundle in a folder with the engine that its manifest names.

    `engine` only makes sure that it is this one. `device` is `cpu`, or an accelerator by the engine's name of it;
    `auto` takes what is there. `threads` is for the CPU; by default `OMP_NUM_THREADS`, or all cores that this process
    may use. `longest_edge` lets the model see pictures smaller, or larger, than in training: fewer image tokens are
    faster, and a warning tells that accuracy is not that of the report. `cache_mb` bounds what is kept of recent
    pictures for further questions (see `BundleVlm`); 0 keeps nothing.

    Raises `BundleError` for a damaged bundle, `InputError` for an engine, device or size that cannot be, and
    `MissingExtra` when the engine is not installed. Close the result, or use it in a `with` statement.
    """
    folder = Path(path)
    bundle = read_bundle(folder)
    if engine not in (None, bundle.engine):
        raise InputError(f"{folder} is for {bundle.engine}, not for {engine}; export one for that engine")
    if longest_edge is not None:
        bundle = resized(bundle, longest_edge)
    return open_bundle(folder, bundle, device=device, threads=threads, cache_mb=cache_mb)


def resized(bundle: Bundle, longest_edge: int) -> Bundle:
    """The bundle with pictures of another size, and a warning where that is not the training's."""
    image = family_of_bundle(bundle).limited(bundle.image, longest_edge)
    try:
        changed = Bundle.model_validate(bundle.model_copy(update={"image": image}).model_dump())
    except ValidationError as error:
        raise InputError(f"--longest-edge {longest_edge}: {error.errors()[0]['msg']}") from error
    if changed.image != bundle.image:
        warnings.warn(
            f"{bundle.name} was trained and measured with pictures of another size than a longest edge of "
            f"{longest_edge}; measure it with this one, or align with --longest-edge {longest_edge}",
            stacklevel=3,
        )
    return changed


def open_bundle(
    folder: Path, bundle: Bundle, *, device: str = "auto", threads: int | None = None, cache_mb: int = CACHE_MB
) -> BundleVlm:
    """Like `load`, with a manifest in hand; export uses it to verify a bundle before it writes the manifest."""
    module, library, package, extra = ENGINES[bundle.engine]
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise MissingExtra(package, extra) from error
    tokenizer = read_tokenizer(bundle.path_of(folder, "tokenizer"))
    image_token = id_of(tokenizer, bundle.prompt.image_token)
    opened = importlib.import_module(module).open_engine
    engine = opened(folder, bundle, image_token, threads or usable_cores(), device.lower())
    try:
        return BundleVlm(bundle, engine, tokenizer, cache_mb=cache_mb)
    except BaseException:
        engine.close()
        raise


def usable_cores() -> int:
    """The threads to use where nobody says: OMP_NUM_THREADS, as other numeric libraries have it, else all cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return available_cores()


def available_cores() -> int:
    """The cores that this process may use: those of its affinity mask, or fewer where its container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _quota(Path("/sys/fs/cgroup/cpu.max")) or cores)


def _quota(path: Path) -> int | None:
    """The whole cores that a cgroup may use ("200000 100000" is two), None without a limit."""
    try:
        quota, period = path.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
