"""What an export to GGUF looks at before its files count: whole, fitting, sound weights, the mmproj of the base."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpa_edge.errors import ExportError, InputError
from mpa_edge.export import to_gguf as module
from mpa_edge.export.gguf_checks import check_fit, check_projector
from mpa_edge.export.gguf_reader import Reader
from mpa_edge.export.merged import Names
from mpa_edge.export.quants import checked_mmproj
from mpa_edge.export.to_gguf import to_gguf


def changed(source: Path, target: Path, **steps: Any) -> Path:
    """A copy of a model with its tensors mapped by `of(name, tensor)`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    mapped = {name: steps["of"](name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(mapped, target / "model.safetensors", {"format": "pt"})
    return target


def content(file: Path) -> dict[str, tuple[str, bytes]]:
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in Reader(file).tensors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_a_16_bit_model_is_converted_through_16_bits_with_the_same_outcome(
    dtype: torch.dtype, tiny_qwen2_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = changed(tiny_qwen2_vl, tmp_path / "half", of=lambda name, tensor: tensor.to(dtype))
    single = changed(half, tmp_path / "single", of=lambda name, tensor: tensor.float())
    quants = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
    seen: list[Any] = []
    quantize = module._quantize

    def watched(full: Path, out: Path, quant: str) -> None:
        seen.append(Reader(full).fields["general.file_type"].contents())
        quantize(full, out, quant)

    monkeypatch.setattr(module, "_quantize", watched)
    found = []
    for model in (half, single):
        out = tmp_path / f"{model.name}-out"
        made = to_gguf(model, {quant: out / quant for quant in quants}, Names("x"))
        found.append({quant: content(out / quant / made[quant][0][0].path) for quant in quants})
    assert found[0] == found[1]
    full = {torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16, torch.float16: gguf.LlamaFileType.MOSTLY_F16}[dtype]
    assert seen == [full] * len(quants) + [gguf.LlamaFileType.ALL_F32] * len(quants)


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """As on a full disk: a file cannot grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The model takes 412 kB in float32 and half of it in bfloat16: either the conversion ends early, or what follows it.
@pytest.mark.parametrize(("dtype", "failed"), [(torch.float32, "converter"), (torch.bfloat16, "quantize")])
def test_a_full_disk_leaves_nothing_that_looks_finished(
    dtype: torch.dtype, failed: str, tiny_qwen2_vl: Path, tmp_path: Path
) -> None:
    model = changed(tiny_qwen2_vl, tmp_path / "model", of=lambda name, tensor: tensor.to(dtype))
    out = tmp_path / "out"
    with files_end_at(300_000), pytest.raises(ExportError, match=failed):
        to_gguf(model, {"f32": out}, Names("x"))
    assert list(out.iterdir()) == []


def test_an_interrupted_quantization_leaves_nothing_that_looks_finished(
    tiny_qwen2_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(full: Path, out: Path, quant: str) -> None:
        out.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_gguf(tiny_qwen2_vl, {"q8_0": tmp_path}, Names("x"))
    assert list(tmp_path.iterdir()) == []


def test_the_mmproj_is_compared_with_the_bases(tiny_qwen2_vl: Path, tmp_path: Path) -> None:
    def nudge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.1 if name == "visual.merger.mlp.0.bias" else tensor

    tuned = changed(tiny_qwen2_vl, tmp_path / "tuned", of=nudge)
    for base, verdict, names in (
        (tuned, "equal to the base's", []),
        (tiny_qwen2_vl, "differs from the base's", ["mm.0.bias"]),
    ):
        checks = to_gguf(tuned, {"q8_0": tmp_path / "out"}, Names("x"), base=base)["q8_0"][1]
        assert (checks["mmproj"]["vision"], checks["mmproj"]["changed"]) == (verdict, names)


def test_weights_that_half_precision_cannot_hold_are_refused(tiny_qwen2_vl: Path, tmp_path: Path) -> None:
    def grown(part: str) -> Any:
        return lambda name, tensor: tensor * 1e7 if part in name else tensor

    vision = changed(tiny_qwen2_vl, tmp_path / "vision", of=grown("visual.blocks.0.mlp.fc1.weight"))
    with pytest.raises(ExportError, match=r"v.blk.0.ffn_up.weight.*--mmproj q8_0"):
        to_gguf(vision, {"q8_0": tmp_path / "a"}, Names("x"))
    files = to_gguf(vision, {"q8_0": tmp_path / "b"}, Names("x"), mmproj="q8_0")["q8_0"][0]
    assert files[1].path == "mmproj-x-154K-Q8_0.gguf"
    text = changed(tiny_qwen2_vl, tmp_path / "text", of=grown("layers.1.mlp.up_proj"))
    with pytest.raises(ExportError, match=r"to f16:.*bf16"):
        to_gguf(text, {"f16": tmp_path / "c"}, Names("x"))


def test_halves_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, projector, other = tmp_path / "model", tmp_path / "projector", tmp_path / "other"
    write(model, "llama", {"llama.embedding_length": 64}, {})
    write(projector, "clip", {"clip.vision.projection_dim": 32}, {"mm.0.weight": np.zeros((2, 2), np.float32)})
    write(other, "clip", {}, {"mm.1.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ExportError, match=r"32 values.*64"):
        check_fit(model, projector)
    with pytest.raises(ExportError, match=r"same tensors: mm\.0\.weight, mm\.1\.weight"):
        check_projector(projector, other)
    assert check_projector(projector, None) == {"vision": "not compared", "tensor_types": {"F32": 1}}


def write(path: Path, architecture: str, numbers: dict[str, int], tensors: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in numbers.items():
        writer.add_uint32(key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_mmprojs_precision_is_checked_by_name() -> None:
    assert checked_mmproj("q8_0") == "q8_0"
    with pytest.raises(InputError, match=r"--mmproj q4_0.*f16, q8_0"):
        checked_mmproj("q4_0")


def test_a_file_with_a_vocabulary_is_read_as_by_the_library(tiny_internvl: Path, tmp_path: Path) -> None:
    file = tmp_path / to_gguf(tiny_internvl, {"f16": tmp_path}, Names("x"))["f16"][0][0].path
    quick, whole = Reader(file), gguf.GGUFReader(file)
    assert list(quick.fields) == list(whole.fields)
    assert [(t.name, t.data_offset, t.tensor_type) for t in quick.tensors] == [
        (t.name, t.data_offset, t.tensor_type) for t in whole.tensors
    ]
    scalar = {name: field.contents() for name, field in quick.fields.items() if field.data}
    assert len(scalar) > 10
    assert scalar == {name: whole.fields[name].contents() for name in scalar}
