"""What is told about a bundle and a machine, and whether a bundle answers as it did where it was made."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpa_edge.bundle import Bundle, describe_file, read_bundle, write_bundle
from mpa_edge.cli import app
from mpa_edge.errors import BundleError, InputError
from mpa_edge.runtime import doctor, inspect, selfcheck
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.idefics3 import Idefics3

BOARD = doctor.Machine("Linux", "aarch64", 4, 8000, engines={"llama.cpp": "1", "onnxruntime": None})


@pytest.fixture
def folder(served: tuple[Path, Bundle], vlm: BundleVlm, tmp_path: Path) -> Path:
    """A bundle with samples recorded, as export leaves it."""
    made = Path(shutil.copytree(served[0], tmp_path / "bundle"))
    write_bundle(made, served[1].model_copy(update={"checks": {selfcheck.NAME: selfcheck.record(vlm)}}))
    return made


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the first recorded sample."""
    bundle = read_bundle(folder)
    first, *rest = bundle.checks[selfcheck.NAME]
    write_bundle(folder, bundle.model_copy(update={"checks": {selfcheck.NAME: [{**first, **changes}, *rest]}}))


def test_a_bundle_answers_as_it_did(folder: Path) -> None:
    outcome = selfcheck.selfcheck(folder, threads=1)
    assert outcome.passed
    assert outcome.lines() == ["4 of 4 samples are as they were where the bundle was made; log-probabilities within 0"]
    assert CliRunner().invoke(app, ["selfcheck", str(folder), "--threads", "1"]).exit_code == 0


def test_another_device_is_checked_where_it_is_asked_for(folder: Path) -> None:
    with pytest.raises(InputError, match=r"--device cuda: this llama[.]cpp was built for the CPU only"):
        selfcheck.selfcheck(folder, device="cuda")
    result = CliRunner().invoke(app, ["selfcheck", str(folder), "--device", "cpu", "--threads", "1"])
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"tokens": [5]}, "answer"), ({"pixels": "0"}, "pixels"), ({"prompt": "0", "tokens": []}, "prompt and answer")],
)
def test_what_differs_is_told_and_fails(folder: Path, changes: dict[str, Any], what: str) -> None:
    rewrite(folder, **changes)
    result = CliRunner().invoke(app, ["selfcheck", str(folder), "--threads", "1"])
    assert result.exit_code == 1
    assert f"{selfcheck.QUESTIONS[0]!r}: {what} differ" in result.output
    assert "3 of 4 samples" in result.output


def test_other_versions_are_told_where_something_differs(folder: Path) -> None:
    rewrite(folder, pixels="0")
    bundle = read_bundle(folder)
    versions = {selfcheck.MADE_WITH: {"pillow": "1.0", "numpy": importlib.metadata.version("numpy")}}
    write_bundle(folder, bundle.model_copy(update={"checks": {**bundle.checks, **versions}}))
    result = CliRunner().invoke(app, ["selfcheck", str(folder), "--threads", "1"])
    assert f"made with pillow 1.0; here pillow {importlib.metadata.version('pillow')}" in result.output


def test_a_bundle_without_samples_or_with_damage_says_so(folder: Path) -> None:
    bundle = read_bundle(folder)
    write_bundle(folder, bundle.model_copy(update={"checks": {}}))
    with pytest.raises(BundleError, match="export it again"):
        selfcheck.selfcheck(folder)
    write_bundle(folder, bundle.model_copy(update={"checks": {selfcheck.NAME: [{"picture": "x"}]}}))
    with pytest.raises(BundleError, match="samples are damaged"):
        selfcheck.selfcheck(folder)
    write_bundle(folder, bundle)
    file = bundle.path_of(folder, "tokenizer")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="sha256 differs"):
        selfcheck.selfcheck(folder)


def test_the_samples_pictures_never_change() -> None:
    """Their digests are in manifests out there."""
    import hashlib

    digests = [hashlib.sha256(selfcheck.picture(number).tobytes()).hexdigest()[:12] for number in range(4)]
    assert digests == ["450c77c76b00", "ea8a1c7d5958", "50cfe17084e1", "e3c4a8314bc6"]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (640, 480), (30, 400), (400, 30), (333, 334), (1, 1)])
def test_the_grid_is_the_one_that_tiles_are_cut_in(
    size: tuple[int, int], split: bool, served: tuple[Path, Bundle], picture: Any
) -> None:
    settings = served[1].image.model_copy(update={"longest_edge": 256, "split": split})
    cut = Idefics3().cut(picture(*size), settings)
    assert Idefics3().grid(size, settings) == (cut.rows, cut.columns)


def test_costs_are_those_of_real_prompts(
    folder: Path, served: tuple[Path, Bundle], vlm: BundleVlm, picture: Any
) -> None:
    image = served[1].image.model_copy(update={"split": True, "longest_edge": 128})
    found = inspect.costs(folder, served[1].model_copy(update={"image": image}))
    assert {cost.size for cost in found} >= {"longest edge 64", "longest edge 128", "longest edge 192"}
    for cost in found:
        shape = picture(*(edge // 10 for edge in inspect.SHAPES[cost.shape]))
        edge = int(cost.size.split()[-1])
        settings = image.model_copy(update={"longest_edge": edge})
        cut = Idefics3().cut(shape, settings)
        prompt = vlm.prompts.tokens(vlm.put(""), [Idefics3().layout(cut.rows, cut.columns, "<image>", settings)])
        seen = prompt.count(vlm.prompts.image_token_id)
        assert (cost.image_tokens, cost.prompt_tokens) == (seen, len(prompt) if seen < 1024 else None)
        assert cost.tiles == len(cut.tiles)
        assert cost.trained_with == (edge == 128)
        assert cost.fits == (len(prompt) < 1024)
    assert not all(cost.fits for cost in found)


def test_inspect_tells_a_bundle_in_words(folder: Path) -> None:
    (folder / "note").write_text("x")
    bundle = read_bundle(folder)
    steps = [("base", "base", 0.5), ("gguf-f16", "full", 0.75), ("gguf-q8_0", "quantized", 0.7)]
    road = {"metric": "anls", "data": {"n": 1500, "name": "shelves"}}
    road["steps"] = [{"name": name, "step": step, "value": value} for name, step, value in steps]
    checks = {"verify": {"token_agreement": 0.75, "samples": 4}, "road": road}
    files = (*bundle.files, describe_file(folder, "note", "readme"))
    write_bundle(folder, bundle.model_copy(update={"checks": checks, "files": files}))
    told = CliRunner().invoke(app, ["inspect", str(folder)]).output
    for part in ("tiny-f16: idefics3, llama.cpp, f16", "75% of 4 answers", "<- trained with", "mmproj", "note"):
        assert part in told
    assert "anls on 1,500 questions of shelves: base 50.0%, gguf-f16 75.0%\n" in told
    assert "checksums of all 4 files" in told


def test_costs_of_absurd_settings_take_no_time(folder: Path, served: tuple[Path, Bundle]) -> None:
    """Image tokens are counted before they are written out: a gigabyte of them here."""
    bundle = served[1]
    image = bundle.image.model_copy(
        update={"split": True, "tile_size": 32, "longest_edge": 4096, "tokens_per_tile": 65536}
    )
    prompt = bundle.prompt.model_copy(update={"context_length": 65536})
    found = inspect.costs(folder, bundle.model_copy(update={"image": image, "prompt": prompt}))
    assert [(cost.image_tokens, cost.prompt_tokens, cost.fits) for cost in found[:1]] == [(65536, None, False)]
    assert {cost.size for cost in found} == {"longest edge 32"}
    thin = image.model_copy(update={"tokens_per_tile": 1})
    sizes = {cost.size for cost in inspect.costs(folder, bundle.model_copy(update={"image": thin}))}
    assert {"longest edge 32", "longest edge 96"} <= sizes
    assert "longest edge 64" not in sizes


@pytest.mark.parametrize(
    "checks",
    [
        {"verify": [1], "road": "x"},
        {"verify": {"token_agreement": "x", "samples": 4}, "road": {"steps": 1}},
        {"verify": {"token_agreement": 7.0, "samples": 4}},
        {"road": {"metric": "anls\nfake", "data": {"n": 1, "name": "x"}, "steps": []}},
        {"road": {"metric": "anls", "data": {"n": 1, "name": "\x1b[31mfake"}, "steps": []}},
        {"road": {"metric": "anls", "data": {"n": 1, "name": "fake"}, "steps": [{"name": "b", "step": "base"}]}},
    ],
)
def test_inspect_leaves_out_what_it_cannot_read(folder: Path, checks: dict[str, Any]) -> None:
    write_bundle(folder, read_bundle(folder).model_copy(update={"checks": checks}))
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0
    assert "checksums of all" in result.output
    for word in ("verified", "fake", "anls"):
        assert word not in result.output


def test_inspect_tells_files_that_no_checksum_speaks_for(folder: Path) -> None:
    told = CliRunner().invoke(app, ["inspect", str(folder)]).output
    assert "not in the manifest" not in told
    (folder / "more").mkdir()
    (folder / "more" / "adapter\n.gguf").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "index").write_text("x")
    told = CliRunner().invoke(app, ["inspect", str(folder)]).output
    assert "not in the manifest, and not checked: more/adapter .gguf\n" in told


def test_inspect_of_a_tokenizer_that_is_none_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "b")
    bundle = read_bundle(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    files = tuple(describe_file(tmp_path / "b", file.path, file.role) for file in bundle.files)
    write_bundle(tmp_path / "b", bundle.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match=r"tokenizer\.json is no tokenizer"):
        inspect.report(tmp_path / "b")


def test_doctor_tells_what_is_here() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "CPUExecutionProvider" in result.output
    assert "export with --format" in result.output


def test_doctor_names_what_is_missing_and_the_board() -> None:
    told = doctor.report(BOARD)
    assert 'onnxruntime missing; pip install "mpa-edge[onnx]"' in told
    assert "llama.cpp   1, built for the CPU only" in told
    jetson = doctor.Machine(**{**vars(BOARD), "board": "NVIDIA Jetson Orin Nano", "power_mode": "15W"})
    assert "NVIDIA Jetson Orin Nano, power mode 15W" in doctor.report(jetson)


def test_advice_follows_the_machine() -> None:
    def advice(**changes: Any) -> tuple[str, str]:
        given = doctor.advise(doctor.Machine(**{**vars(BOARD), **changes}))
        assert given.reasons
        return given.format, given.quantization

    assert advice() == ("gguf", "q8_0")
    assert advice(memory_mb=2000) == ("gguf", "q4_k_m")
    assert advice(memory_mb=None) == ("gguf", "q8_0")
    assert advice(engines={"llama.cpp": None, "onnxruntime": "1"}) == ("onnx", "int8")


def test_boards_and_power_modes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").write_bytes(b"Raspberry Pi 5 Model B\0")
    assert doctor._board(tmp_path / "model") == "Raspberry Pi 5 Model B"
    assert doctor._board(tmp_path / "none") is None
    program = tmp_path / "nvpmodel"
    program.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.power_mode() == "MAXN"
