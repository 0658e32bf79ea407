"""The manifest of an exported model: the contract between export, which writes it, and runtime, which trusts only it.

A bundle is a folder with `bundle.json` and the engine's own files, laid out as that ecosystem expects them. One bundle
is one deployable variant: one engine, one quantization.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from mpa_edge.errors import BundleError
from mpa_edge.records import write_atomic

MANIFEST = "bundle.json"

Role = Literal[
    "language_model",  # GGUF, OpenVINO
    "mmproj",  # GGUF
    "vision_encoder",  # ONNX, OpenVINO
    "vision_merger",  # OpenVINO: the second part of Qwen-VL's vision encoder
    "embed_tokens",  # ONNX, OpenVINO
    "decoder",  # ONNX
    "external_data",  # weights beside a graph of ONNX or OpenVINO
    "tokenizer",
    "config",  # config.json, preprocessor_config.json and their like, for other tools
    "readme",
]
# What an engine cannot start without.
NEEDED: dict[str, tuple[Role, ...]] = {
    "llama.cpp": ("language_model", "mmproj", "tokenizer"),
    "onnxruntime": ("vision_encoder", "embed_tokens", "decoder", "tokenizer"),
    "openvino": ("language_model", "vision_encoder", "embed_tokens", "external_data", "tokenizer"),
}
# How folders and reports call an engine's bundles.
FORMATS = {"llama.cpp": "gguf", "onnxruntime": "onnx", "openvino": "openvino"}
SCHEMA_VERSION: Final = 2
# Bundles of these show what conversion costs, all others what quantization costs.
FULL_PRECISION = frozenset(("f32", "fp32", "f16", "fp16", "bf16"))
# A relative path with "/" between its parts, in normal form: no part is empty, "." or "..", none holds a backslash, a
# drive's colon or a control character.
_PART = r"(?!\.{1,2}(?:/|$))[^/\\:\x00-\x1f\x7f]+"
INSIDE = rf"^{_PART}(?:/{_PART})*$"
# A manifest takes some twenty kilobytes, most of them the chat template and the road.
MOST_BYTES = 4 << 20
# Bounds that no model in use comes near: a foreign manifest must not make a reader compute for minutes.
MOST_CONTEXT, MOST_TEMPLATE = 2**20, 2**17


def printable(text: str) -> str:
    """The text as it is; `ValueError` where it would break a line, or reach a terminal as commands."""
    if not text.isprintable():
        raise ValueError(f"{text!r} holds characters that cannot be printed")
    return text


Printable = Annotated[
    str, Field(max_length=500, json_schema_extra={"pattern": r"^[^\x00-\x1f\x7f-\x9f]*$"}), AfterValidator(printable)
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]  # int32 in llama.cpp


class Strict(BaseModel):
    """Unknown keys are errors: a manifest from a newer version is refused, not half understood."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, json_schema_serialization_defaults_required=True
    )


class File(Strict):
    """One file. `path` is relative to the bundle and stays inside it."""

    path: str = Field(json_schema_extra={"pattern": INSIDE})
    role: Role
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if not re.fullmatch(INSIDE, path):
            raise ValueError(f"{path!r} is not a path inside the bundle")
        return printable(path)


# What pixel values are divided by. Of less than this only rounding is left.
Spread = Annotated[float, Field(ge=1e-3, le=1e3)]


class ImageSettings(Strict):
    """How a picture becomes the model's pixel values; the training processor's own values. What only some families
    have stands in the class of their plan."""

    mean: tuple[float, float, float]
    std: tuple[Spread, Spread, Spread]
    rescale_factor: float = Field(ge=1e-6, le=1)
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Idefics3Images(ImageSettings):
    """Square tiles of a picture that is scaled to `longest_edge`, and an overview; see `mpa_edge.runtime.idefics3`."""

    plan: Literal["idefics3"] = "idefics3"
    tile_size: int = Field(ge=32, le=4096)
    longest_edge: int = Field(gt=0, le=16384)
    split: bool
    tokens_per_tile: int = Field(gt=0, le=65536)


class QwenVlImages(ImageSettings):
    """A picture in one piece of dynamic size, `min_pixels` to `max_pixels` in all, as patches of which `merge_size` in
    each direction make one image token; see `mpa_edge.runtime.qwen_vl`."""

    plan: Literal["qwen_vl"] = "qwen_vl"
    patch_size: int = Field(ge=4, le=64)
    merge_size: int = Field(gt=0, le=8)
    temporal_patch_size: int = Field(gt=0, le=4)
    min_pixels: int = Field(gt=0)
    max_pixels: int = Field(gt=0, le=4096**2)

    @model_validator(mode="after")
    def _ordered(self) -> QwenVlImages:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} exceeds max_pixels {self.max_pixels}")
        return self


class LlavaImages(ImageSettings):
    """One square tile: the centre of a picture whose shorter edge is scaled to `shortest_edge`, or the whole picture,
    squeezed, where that is None; see `mpa_edge.runtime.llava`."""

    plan: Literal["llava"] = "llava"
    tile_size: int = Field(ge=16, le=4096)
    shortest_edge: int | None = Field(default=None, gt=0, le=4096)
    tokens_per_tile: int = Field(gt=0, le=65536)


class InternVlImages(ImageSettings):
    """`min_patches` to `max_patches` square tiles in the grid whose shape is nearest to the picture's, and an overview
    where there is more than one; see `mpa_edge.runtime.internvl`."""

    plan: Literal["internvl"] = "internvl"
    tile_size: int = Field(ge=16, le=1024)
    min_patches: int = Field(gt=0)
    max_patches: int = Field(gt=0, le=64)
    tokens_per_tile: int = Field(gt=0, le=65536)

    @model_validator(mode="after")
    def _ordered(self) -> InternVlImages:
        if self.min_patches > self.max_patches:
            raise ValueError(f"min_patches {self.min_patches} exceeds max_patches {self.max_patches}")
        return self


Images: TypeAlias = Idefics3Images | QwenVlImages | LlavaImages | InternVlImages


class PromptSettings(Strict):
    """How a question becomes tokens.

    `chat_template` is the tokenizer's Jinja template; `question_template` is the task's inference prompt with
    `{question}` in it, the same that identification and training used. `begin_token_ids` are what the tokenizer
    puts before a prompt whose template does not.
    """

    chat_template: str = Field(max_length=MOST_TEMPLATE)
    question_template: str = Field(default="{question}", max_length=MOST_TEMPLATE, pattern=r"\{question\}")
    image_token: str = Field(min_length=1, max_length=100)
    begin_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=64)
    stop_token_ids: tuple[TokenId, ...] = Field(max_length=1024)
    max_new_tokens: int = Field(gt=0, le=MOST_CONTEXT)
    context_length: int = Field(ge=16, le=MOST_CONTEXT)

    @model_validator(mode="after")
    def _can_be(self) -> PromptSettings:
        if self.question_template.count("{question}") != 1:
            raise ValueError(f"question_template {self.question_template[:80]!r} must hold {{question}} once")
        if self.max_new_tokens > self.context_length:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} exceeds context_length {self.context_length}")
        return self


class Source(Strict):
    """Where the weights came from. Names and digests, never machine paths."""

    student: Printable
    revision: Printable | None = None
    teacher: Printable | None = None
    task: Printable | None = None
    metric: Printable | None = None
    run: Printable | None = None
    adapter_sha256: Printable | None = None
    base_sha256: Printable | None = None
    tool_version: Printable


class Bundle(Strict):
    """The content of `bundle.json`."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: Printable
    family: Printable
    engine: Literal["llama.cpp", "onnxruntime", "openvino"]
    quantization: Printable
    files: tuple[File, ...]
    image: Annotated[Images, Field(discriminator="plan")]
    prompt: PromptSettings
    source: Source
    # Outcomes of the export checks by name, e.g. {"merge": {...}, "verify": {"token_agreement": 1.0, ...}}.
    checks: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _each_file_once(self) -> Bundle:
        # Two spellings of one name are one file on many devices.
        paths = Counter(file.path.casefold() for file in self.files)
        if twice := [file.path for file in self.files if paths[file.path.casefold()] > 1]:
            raise ValueError(f"files: {twice[0]!r} is named more than once")
        return self

    @property
    def short_name(self) -> str:
        """As export names the folder: gguf-q8_0, onnx-int8."""
        return f"{FORMATS[self.engine]}-{self.quantization}"

    def path_of(self, folder: Path, role: Role) -> Path:
        """The path of the one file with this role; `BundleError` when there is none."""
        for file in self.files:
            if file.role == role:
                return folder / file.path
        raise BundleError(f"{folder / MANIFEST} names no file with the role {role!r}")

    def size_bytes(self) -> int:
        """What the engine's files take on disk; files for other tools and people are not counted."""
        return sum(file.bytes for file in self.files if file.role not in ("config", "readme"))


def describe_file(folder: Path, path: str, role: Role) -> File:
    """The manifest's entry for a file that lies in the folder."""
    full = folder / path
    return File(path=path, role=role, sha256=sha256_of(full), bytes=full.stat().st_size)


def write_bundle(folder: Path, bundle: Bundle) -> None:
    """Write `bundle.json`, last and in one step: a folder without it is no bundle.

    What is written is checked as it will be read; raises `BundleError` where it would be refused.
    """
    content = bundle.model_dump_json(indent=2) + "\n"
    _check_files(folder, _parse(folder / MANIFEST, content.encode()), check_digests=False)
    write_atomic(folder / MANIFEST, content)


def read_bundle(folder: Path, *, check_digests: bool = False) -> Bundle:
    """Read and check a manifest: schema, paths, that it names what its engine needs and all weights that the engine
    would load, and that each file is there with its size (and digest, when asked).

    Raises `BundleError`, one line with the file and the reason.
    """
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise BundleError(f"{folder} is no bundle: {MANIFEST} is no file")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BundleError(f"{folder} is no bundle: {MANIFEST} cannot be read ({error.strerror})") from error
    if len(content) > MOST_BYTES:
        raise BundleError(f"{path}: is no manifest of mpa-edge, it takes more than {MOST_BYTES} bytes")
    bundle = _parse(path, content)
    _check_files(folder, bundle, check_digests)
    return bundle


def _parse(path: Path, content: bytes) -> Bundle:
    try:
        return Bundle.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {one_line(_why(content, error))}") from error


def _why(content: bytes, error: ValidationError) -> str:
    """Why a manifest is refused, in the words of what was probably meant to be one."""
    try:
        found = from_json(content)
    except ValueError as damage:
        return f"is damaged: {damage}"
    version = found.get("schema_version") if isinstance(found, dict) else None
    if not isinstance(version, int):
        return "is no manifest of mpa-edge"
    if version != SCHEMA_VERSION:
        age, cure = ("newer", "update this one") if version > SCHEMA_VERSION else ("older", "export it again")
        return f"was made by a {age} mpa-edge (schema_version {version}, this one reads {SCHEMA_VERSION}); {cure}"
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def one_line(text: str) -> str:
    """What comes from a foreign file must not break the line, or reach a terminal as commands."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:500]


def _check_files(folder: Path, bundle: Bundle, check_digests: bool) -> None:
    for role in NEEDED[bundle.engine]:
        bundle.path_of(folder, role)
    for file in bundle.files:
        _check_file(folder, file, check_digests)
    named = {file.path.casefold() for file in bundle.files}
    for weights in (path for file in bundle.files for path in _read_beside(folder, file)):
        if weights.relative_to(folder).as_posix().casefold() not in named:
            raise BundleError(f"{weights}: the engine would load it, but the manifest does not name it; remove it")


def _read_beside(folder: Path, file: File) -> Iterator[Path]:
    """Weights that an engine would load with this file unasked: a graph's, and the other parts of a split GGUF."""
    full = folder / file.path
    beside = [full.with_name(f"{full.name}_data")]
    if full.suffix == ".xml":
        beside.append(full.with_suffix(".bin"))
    if part := re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", full.name):
        beside += full.parent.glob(f"{glob.escape(part[1])}-*-of-*.gguf")
    yield from (path for path in beside if os.path.lexists(path))


def _check_file(folder: Path, file: File, check_digest: bool) -> None:
    full = folder / file.path
    try:
        if not full.is_file() or not full.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{folder}: {file.path} is missing, or lies outside the bundle")
        if full.stat().st_size != file.bytes:
            raise BundleError(f"{full}: has {full.stat().st_size} bytes where the manifest says {file.bytes}")
        if check_digest and sha256_of(full) != file.sha256:
            raise BundleError(f"{full}: its content is not what the manifest says (sha256 differs)")
    except OSError as error:
        raise BundleError(f"{full}: cannot be read ({error.strerror})") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
