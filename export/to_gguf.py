"""Model folder to GGUF: llama.cpp's own converter and quantizer, one conversion for any number of quantizations."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as llama
import torch
from conversion import get_model_class
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpa_edge.bundle import File, describe_file
from mpa_edge.errors import ExportError
from mpa_edge.export.gguf_checks import check_fit, check_projector, check_types
from mpa_edge.export.gguf_names import file_stem, full_name, metadata_of
from mpa_edge.export.gguf_reader import Reader
from mpa_edge.export.gguf_tokenizer import check_pieces, check_tokenizer, pre_tokenizer_name, sentence_pieces
from mpa_edge.export.gguf_vision import vision_converter
from mpa_edge.export.merged import Names
from mpa_edge.export.model_files import without_paths
from mpa_edge.export.quants import GGUF, checked, checked_mmproj
from mpa_edge.runtime import llamacpp

PROJECTORS = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# The language model is converted once, into the type that holds its weights as they are.
LOSSLESS = {
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
}


def to_gguf(
    merged: Path, folders: Mapping[str, Path], names: Names, *, mmproj: str = "f16", base: Path | None = None
) -> dict[str, tuple[list[File], dict[str, Any]]]:
    """Convert a model folder once and quantize it into one folder per quantization.

    `folders` maps a name in `quants.GGUF` to a folder, `mmproj` is a name in `quants.MMPROJ` (beside an f32 model the
    mmproj is f32 too). Writes the language model, the mmproj and `tokenizer.json`; returns per quantization the
    manifest's entries and the outcome of the checks. `base` is the model folder that the merged one was trained from,
    where it is at hand: both mmproj files are compared. Raises `ExportError` when the converter or llama.cpp refuses.
    """
    checked("gguf", list(folders))
    checked_mmproj(mmproj)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    check_pieces(merged)
    # Inside a folder of the caller's, so that it goes with that when this process is killed.
    with tempfile.TemporaryDirectory(dir=next(iter(folders.values())), prefix="full-") as scratch:
        full = _convert_text(merged, Path(scratch), names)
        projectors = {quant: "f32" if quant == "f32" else mmproj for quant in folders}
        vision = {kind: _convert_vision(merged, Path(scratch), kind, names) for kind in set(projectors.values())}
        vision_checks = {}
        for kind, file in vision.items():
            check_fit(full, file)
            of_base = _convert_vision(base, Path(scratch), kind, names, "base") if base else None
            vision_checks[kind] = check_projector(file, of_base)
        tokenizer_checks = check_tokenizer(full, merged)
        stem = file_stem(full)
        results = {}
        for quant, folder in folders.items():
            model, projector = f"{stem}-{quant.upper()}.gguf", f"mmproj-{stem}-{projectors[quant].upper()}.gguf"
            with _whole(folder / model) as part:
                _quantize(full, part, quant)
            with _whole(folder / projector) as part:
                shutil.copyfile(vision[projectors[quant]], part)
            with _whole(folder / "tokenizer.json") as part:
                shutil.copyfile(merged / "tokenizer.json", part)
            files = [
                describe_file(folder, model, "language_model"),
                describe_file(folder, projector, "mmproj"),
                describe_file(folder, "tokenizer.json", "tokenizer"),
            ]
            checks = {**tokenizer_checks, **check_types(folder / model, quant)}
            results[quant] = (files, {**checks, "mmproj": vision_checks[projectors[quant]]})
    return results


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Where to write a file that appears under its name only when it is whole. A full disk is an `ExportError`."""
    part = file.with_name(f"{file.name}.part")
    try:
        yield part
        part.replace(file)
    except OSError as error:
        raise ExportError(f"{file.name} could not be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _convert_text(merged: Path, scratch: Path, names: Names) -> Path:
    """The language model in the type of its own weights."""
    config = _full_config(merged)
    tokenizer = json.loads((merged / "tokenizer.json").read_bytes())
    structure = pre_tokenizer_name(tokenizer)
    pieces = sentence_pieces(tokenizer, config["text_config"]["vocab_size"])
    converter = _text_class(config)

    class Converter(converter):  # type: ignore[misc, valid-type]
        model_arch = converter.model_arch
        ftype: gguf.LlamaFileType

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            types = {tensor.dtype for _, tensor in self.get_tensors() if tensor.dim() > 1}
            if len(types) == 1:
                self.ftype = LOSSLESS.get(types.pop(), self.ftype)

        def set_vocab(self) -> None:
            if pieces is None:
                super().set_vocab()
                return
            self.gguf_writer.add_tokenizer_model("llama")
            self.gguf_writer.add_tokenizer_pre("default")
            self.gguf_writer.add_token_list(pieces.texts)
            self.gguf_writer.add_token_scores(pieces.scores)
            self.gguf_writer.add_token_types(pieces.kinds)
            self.gguf_writer.add_add_space_prefix(pieces.space_first)
            gguf.SpecialVocab(self.dir_model, n_vocab=len(pieces.texts)).add_to_gguf(self.gguf_writer)

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                if structure is None:
                    raise ExportError(
                        "llama.cpp knows no pre-tokenizer of this tokenizer's kind; known: SentencePiece as in Llama 2,"
                        " and byte-level BPE with the splitting of GPT-2, SmolLM, Llama 3 or Qwen2"
                    ) from None
                return structure

    return _run(Converter, merged, config, gguf.LlamaFileType.ALL_F32, scratch / "full.gguf", names)


def _convert_vision(merged: Path, scratch: Path, kind: str, names: Names, whose: str = "own") -> Path:
    config = _full_config(merged)
    return _run(vision_converter(config), merged, config, PROJECTORS[kind], scratch / f"{whose}-{kind}.gguf", names)


def _full_config(merged: Path) -> dict[str, Any]:
    """`config.json` with the defaults that transformers leaves out when it saves; no path of this machine."""
    config: dict[str, Any] = without_paths(AutoConfig.from_pretrained(merged).to_dict())
    config["architectures"] = json.loads((merged / "config.json").read_bytes()).get("architectures") or []
    if not config["architectures"]:
        raise ExportError(f"{merged / 'config.json'} names no architecture")
    return config


def _text_class(config: dict[str, Any]) -> Any:
    """The converter for the language model alone; Qwen-VL's is known by the name of the whole."""
    text = config["text_config"]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text["model_type"], config["architectures"][0])
    architecture = next(iter(text.get("architectures") or []), known)
    try:
        return get_model_class(str(architecture))
    except NotImplementedError as error:
        raise ExportError(f"llama.cpp's converter does not know {architecture}") from error


def _run(converter: Any, merged: Path, config: dict[str, Any], kind: Any, out: Path, names: Names) -> Path:
    metadata = out.with_name("metadata.json")
    try:
        metadata.write_text(json.dumps(metadata_of(merged, names)))
        with _quiet(), torch.inference_mode():
            converter(
                merged, kind, out, hparams=config, metadata_override=metadata, model_name=full_name(names), eager=False
            ).write()
    except ExportError:
        raise
    except Exception as error:  # the converter raises whatever it trips over
        raise ExportError(f"llama.cpp's converter failed: {type(error).__name__}: {error}") from error
    return out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converter logs every tensor and draws a progress bar of its own."""
    logger = logging.getLogger("hf-to-gguf")
    level = logger.level
    logging.getLogger("gguf").setLevel(logging.ERROR)
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _quantize(full: Path, out: Path, quant: str) -> None:
    if GGUF[quant] == Reader(full).fields["general.file_type"].contents():
        shutil.copyfile(full, out)
        return
    llamacpp.silence()
    params = llama.llama_model_quantize_default_params()
    params.ftype = GGUF[quant]
    params.nthread = os.cpu_count() or 1
    if llama.llama_model_quantize(os.fsencode(full), os.fsencode(out), ctypes.byref(params)) != 0:
        raise ExportError(
            f"llama.cpp could not quantize the model to {quant}: the disk is full, or a weight is NaN or larger than "
            f"{quant} can hold; bf16 holds as much as f32"
        )
