"""The manifest: its published schema, and what is refused in one line that names the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mpa_edge.bundle import (
    MANIFEST,
    NEEDED,
    Bundle,
    Idefics3Images,
    ImageSettings,
    InternVlImages,
    LlavaImages,
    PromptSettings,
    QwenVlImages,
    Source,
    describe_file,
    read_bundle,
    write_bundle,
)
from mpa_edge.bundle_schema import PATH, as_text
from mpa_edge.errors import BundleError

SCALE: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "rescale_factor": 1 / 255, "resample": "bicubic"}
IMAGES: dict[str, ImageSettings] = {
    "idefics3": Idefics3Images(tile_size=64, longest_edge=128, split=True, tokens_per_tile=16, **SCALE),
    "qwen2_vl": QwenVlImages(
        patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=3136, max_pixels=401408, **SCALE
    ),
    "llava": LlavaImages(tile_size=336, shortest_edge=336, tokens_per_tile=576, **SCALE),
    "internvl": InternVlImages(tile_size=448, min_patches=1, max_patches=12, tokens_per_tile=256, **SCALE),
}
Damage = Callable[[dict[str, Any]], object]


def make(folder: Path, family: str = "idefics3", engine: Any = "llama.cpp", **changes: Any) -> Bundle:
    """Write a bundle of little files that have the roles which the engine needs."""
    (folder / "sub").mkdir(parents=True)
    for role in NEEDED[engine]:
        (folder / "sub" / f"{role}.file").write_text(f"the {role}")
    prompt = PromptSettings(
        chat_template="t", image_token="<image>", stop_token_ids=(1,), max_new_tokens=8, context_length=64
    )
    values: dict[str, Any] = {
        "name": "tiny",
        "family": family,
        "engine": engine,
        "quantization": "q8_0",
        "files": tuple(describe_file(folder, f"sub/{role}.file", role) for role in NEEDED[engine]),
        "image": IMAGES[family],
        "prompt": prompt,
        "source": Source(student="s", tool_version="0"),
        "checks": {"verify": {"token_agreement": 1.0}},
    }
    bundle = Bundle(**{**values, **changes})
    write_bundle(folder, bundle)
    return bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    found = json.loads(PATH.read_bytes())
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST).read_text()))


def rewrite(folder: Path, damage: Damage) -> dict[str, Any]:
    content = manifest(folder)
    damage(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    return content


def refused(folder: Path, reason: str, **options: Any) -> None:
    """Refused for this reason, in one line that names the manifest or the file."""
    with pytest.raises(BundleError, match=reason) as error:
        read_bundle(folder, **options)
    assert str(folder) in str(error.value)
    assert str(error.value).isprintable()


def test_the_schema_in_the_tree_is_the_one_that_the_code_makes() -> None:
    assert PATH.read_text() == as_text(), "run: python -m mpa_edge.bundle_schema"


@pytest.mark.parametrize("engine", sorted(NEEDED))
@pytest.mark.parametrize("family", sorted(IMAGES))
def test_what_is_written_is_valid_and_read_back(
    family: str, engine: str, tmp_path: Path, schema: Draft202012Validator
) -> None:
    bundle = make(tmp_path / "b", family, engine)
    schema.validate(manifest(tmp_path / "b"))
    assert read_bundle(tmp_path / "b", check_digests=True) == bundle


def other_path(path: str) -> Damage:
    return lambda content: content["files"][0].update(path=path)


ESCAPES = (
    *("../outside", "sub/../../outside", "..", "/etc/hostname", "//host/share", "C:/Windows", "c:model.gguf"),
    *("sub\\model.gguf", "..\\outside", "sub/\0model", "sub/model\n", "", ".", "./sub/model", "sub//model", "sub/"),
)


@pytest.mark.parametrize("path", ESCAPES)
def test_a_path_that_is_not_plainly_inside_is_refused(path: str, folder: Path, schema: Draft202012Validator) -> None:
    (folder.parent / "outside").write_text("x")
    content = rewrite(folder, other_path(path))
    refused(folder, r"files\.0\.path: .*is not a path inside the bundle")
    assert not schema.is_valid(content) or path.endswith("\n")  # "$" also matches before a last newline in Python


@pytest.mark.parametrize("target", ["outside", "sub"])
def test_a_link_out_of_the_folder_is_refused(target: str, folder: Path) -> None:
    """Of a file, and of the folder that it lies in."""
    outside = folder.parent / "outside"
    (folder / "sub").rename(outside)
    if target == "sub":
        (folder / "sub").symlink_to(outside)
    else:
        (folder / "sub").mkdir()
        for path in outside.iterdir():
            (folder / "sub" / path.name).symlink_to(path)
    refused(folder, "sub/language_model.file is missing, or lies outside the bundle")


def test_a_bundle_in_a_linked_folder_is_read(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert read_bundle(folder.parent / "link", check_digests=True).name == "tiny"


@pytest.mark.parametrize("path", ["sub/mmproj.file", "SUB/MMProj.file"])
def test_a_path_that_comes_twice_is_refused(path: str, folder: Path) -> None:
    (folder / "SUB").mkdir()
    (folder / "SUB" / "MMProj.file").write_text("the mmproj")
    rewrite(folder, lambda content: content["files"].append({**content["files"][1], "path": path, "role": "readme"}))
    refused(folder, "'sub/mmproj.file' is named more than once")


@pytest.mark.parametrize("engine", sorted(NEEDED))
def test_a_missing_role_is_refused(engine: Any, tmp_path: Path) -> None:
    make(tmp_path / "b", engine=engine)
    for place, role in enumerate(NEEDED[engine]):
        content = manifest(tmp_path / "b")
        rewrite(tmp_path / "b", lambda found, place=place: found["files"].pop(place))
        refused(tmp_path / "b", f"bundle.json names no file with the role '{role}'")
        (tmp_path / "b" / MANIFEST).write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Damage, str]] = {
    "unknown key": (lambda c: c.update(colour="red"), "colour: Extra inputs"),
    "unknown key that would break the line": (lambda c: c.update({"a\n\x1b[31mb": 1}), r"a \[31mb: Extra"),
    "unknown engine": (lambda c: c.update(engine="tflite"), "engine: Input should be 'llama.cpp'"),
    "unknown plan": (lambda c: c["image"].update(plan="mosaic"), "image: .*'mosaic'"),
    "settings of another plan": (lambda c: c["image"].update(plan="llava"), r"image\.llava"),
    "no plan": (lambda c: c["image"].pop("plan"), "image: .*plan"),
    "absurd tile": (lambda c: c["image"].update(tile_size=10**9), r"image\.idefics3\.tile_size"),
    "no prompt": (lambda c: c.pop("prompt"), "prompt: Field required"),
    "bad digest": (lambda c: c["files"][0].update(sha256="0"), r"files\.0\.sha256"),
    "negative size": (lambda c: c["files"][0].update(bytes=-1), r"files\.0\.bytes"),
    "unknown role": (lambda c: c["files"][0].update(role="virus"), r"files\.0\.role"),
    "tiny tile": (lambda c: c["image"].update(tile_size=1), r"image\.idefics3\.tile_size"),
    "std of nothing": (lambda c: c["image"].update(std=[0, 0, 0]), r"image\.idefics3\.std\.0"),
    "endless factor": (lambda c: c["image"].update(rescale_factor=float("inf")), r"image\.idefics3\.rescale_factor"),
    "endless context": (lambda c: c["prompt"].update(context_length=2**40), r"prompt\.context_length"),
    "no context": (lambda c: c["prompt"].update(context_length=1), r"prompt\.context_length"),
    "endless answer": (lambda c: c["prompt"].update(max_new_tokens=10**12), r"prompt\.max_new_tokens"),
    "no place for a question": (lambda c: c["prompt"].update(question_template="Q"), r"prompt\.question_template"),
    "negative token": (lambda c: c["prompt"].update(begin_token_ids=[-1]), r"prompt\.begin_token_ids\.0"),
    "token beyond int32": (lambda c: c["prompt"].update(stop_token_ids=[2**31]), r"prompt\.stop_token_ids\.0"),
    "endless template": (lambda c: c["prompt"].update(chat_template="x" * 2**18), r"prompt\.chat_template"),
    "name for a terminal": (lambda c: c.update(name="evil\x1b[31m\nfake line"), "name: "),
    "quantization for a terminal": (lambda c: c.update(quantization="q8\r"), "quantization: "),
    "student for a terminal": (lambda c: c["source"].update(student="a\nb"), r"source\.student"),
}
# What a JSON schema cannot say.
UNSAID: dict[str, tuple[Damage, str]] = {
    "mean that is no number": (lambda c: c["image"].update(mean=[float("nan")] * 3), r"image\.idefics3\.mean\.0"),
    "a question put twice": (
        lambda c: c["prompt"].update(question_template="{question} {question}"),
        r"prompt: .*must hold \{question\} once",
    ),
    "an answer beyond the context": (
        lambda c: c["prompt"].update(max_new_tokens=65),
        "prompt: .*max_new_tokens 65 exceeds context_length 64",
    ),
    "name that turns the line around": (lambda c: c.update(name="a\u202eb"), "name: .*cannot be printed"),
    "path that turns the line around": (lambda c: c["files"][0].update(path="a\u202eb"), r"files\.0\.path: .*printed"),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_a_damaged_manifest_is_refused(name: str, folder: Path, schema: Draft202012Validator) -> None:
    damage, reason = DAMAGE[name]
    content = rewrite(folder, damage)
    refused(folder, f"{MANIFEST}: {reason}")
    assert not schema.is_valid(content)


@pytest.mark.parametrize("name", sorted(UNSAID))
def test_what_the_schema_cannot_say_is_refused_too(name: str, folder: Path) -> None:
    damage, reason = UNSAID[name]
    rewrite(folder, damage)
    refused(folder, f"{MANIFEST}: {reason}")


@pytest.mark.parametrize(
    ("engine", "listed", "beside"),
    [
        ("onnxruntime", "decoder.onnx", "decoder.onnx_data"),
        ("openvino", "language_model.xml", "language_model.bin"),
        ("llama.cpp", "model-00001-of-00002.gguf", "model-00002-of-00002.gguf"),
    ],
)
def test_weights_that_an_engine_would_load_unnamed_are_refused(
    engine: Any, listed: str, beside: str, tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    bundle = make(folder, engine=engine)
    (folder / bundle.files[0].path).rename(folder / "sub" / listed)
    rewrite(folder, other_path(f"sub/{listed}"))
    (folder / "sub" / "stranger.bin").write_text("no engine looks for it")
    read_bundle(folder)
    (folder / "sub" / beside).write_text("other weights")
    refused(folder, f"{beside}: the engine would load it, but the manifest does not name it")
    named = describe_file(folder, f"sub/{beside}", "external_data").model_dump()
    rewrite(folder, lambda content: content["files"].append(named))
    read_bundle(folder)


def test_a_gigantic_manifest_is_not_read_to_its_end(folder: Path) -> None:
    rewrite(folder, lambda content: content.update(checks={"x": "y" * (4 << 20)}))
    refused(folder, "is no manifest of mpa-edge, it takes more than 4194304 bytes")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is damaged: EOF"),
        (b"{", "is damaged"),
        (b"\xff\xfe{\x00}\x00", "is damaged"),
        (b"[" * 100_000, "is damaged: recursion limit"),
        (b"[]", "is no manifest of mpa-edge"),
        (b'"bundle"', "is no manifest of mpa-edge"),
        (b'{"targets": [{"path": "main.js"}], "files": {}}', "is no manifest of mpa-edge"),
        (b'{"schema_version": "2"}', "is no manifest of mpa-edge"),
        (b'{"schema_version": 3, "anything": 1}', r"newer mpa-edge \(schema_version 3, this one reads 2\); update"),
        (b'{"schema_version": 1}', r"older mpa-edge \(schema_version 1, this one reads 2\); export it again"),
    ],
)
def test_what_is_no_manifest_of_this_version_is_refused(content: bytes, reason: str, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content)
    refused(folder, f"{MANIFEST}: .*{reason}")


def test_a_truncated_manifest_is_refused_wherever_it_ends(folder: Path) -> None:
    whole = (folder / MANIFEST).read_bytes().rstrip()
    for end in range(0, len(whole), 37):
        (folder / MANIFEST).write_bytes(whole[:end])
        refused(folder, f"{MANIFEST}: is damaged")


def test_a_folder_without_a_readable_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    refused(folder, "is no bundle: bundle.json cannot be read")
    (folder / MANIFEST).mkdir()
    refused(folder, "is no bundle: bundle.json is no file")
    (folder / MANIFEST).rmdir()
    os.mkfifo(folder / MANIFEST)  # reading one would wait for ever
    refused(folder, "is no bundle: bundle.json is no file")
    refused(folder / "nowhere", "is no bundle")
    refused(folder / "sub" / "mmproj.file", "is no bundle")


def test_a_file_that_is_gone_or_no_file_is_refused(folder: Path) -> None:
    file = folder / "sub" / "mmproj.file"
    file.unlink()
    refused(folder, "sub/mmproj.file is missing")
    file.mkdir()
    refused(folder, "sub/mmproj.file is missing")
    file.rmdir()
    os.mkfifo(file)  # reading one would wait for ever
    refused(folder, "sub/mmproj.file is missing", check_digests=True)
    rewrite(folder, other_path("a" * 5000))
    refused(folder, "cannot be read|is missing")


def test_a_truncated_or_changed_file_is_refused(folder: Path) -> None:
    file = folder / "sub" / "mmproj.file"
    file.write_text("THE mmproj")
    read_bundle(folder)  # the same size: only the digest tells
    refused(folder, r"mmproj\.file: its content is not what the manifest says \(sha256 differs\)", check_digests=True)
    file.write_text("the")
    refused(folder, r"mmproj\.file: has 3 bytes where the manifest says 10")


def test_nothing_is_written_that_would_be_refused(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    before = (tmp_path / "b" / MANIFEST).read_bytes()
    for changes, reason in (
        ({"engine": "tflite"}, "engine"),
        ({"files": bundle.files[:2]}, "no file with the role 'tokenizer'"),
        ({"files": bundle.files * 2}, "more than once"),
        ({"files": (*bundle.files, bundle.files[0].model_copy(update={"path": "../x"}))}, "inside the bundle"),
        ({"files": (*bundle.files, bundle.files[0].model_copy(update={"path": "none"}))}, "none is missing"),
    ):
        with pytest.raises(BundleError, match=reason):
            write_bundle(tmp_path / "b", bundle.model_copy(update=changes))
    assert (tmp_path / "b" / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("damage", ["content", "size", "manifest"])
def test_inspect_says_which_file_is_wrong_and_fails(damage: str, folder: Path) -> None:
    file = folder / "sub" / "language_model.file"
    if damage == "manifest":
        (folder / MANIFEST).write_text("{")
    else:
        file.write_text("THE language_model" if damage == "content" else "short")
    command = [sys.executable, "-m", "mpa_edge.cli", "inspect", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {folder / MANIFEST if damage == 'manifest' else file}: ")
