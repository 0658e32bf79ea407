"""Each way in which a merge is known to go wrong, done on purpose, is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpa_edge.errors import ExportError, UnknownFamily
from mpa_edge.export.merge import merge
from mpa_edge.export.merge_checks import check_files, check_logits, check_tensors, logits_of, probe_of, refuse_quantized
from mpa_edge.export.merge_trained import AdaptedModel, targeted_tensors
from mpa_edge.export.merge_weights import load_model
from tiny_checkpoints import change_tensor, edit_tensors

QUERY = "model.text_model.layers.0.self_attn.q_proj.weight"
VISION = "model.vision_model.encoder.layers.1.self_attn.v_proj.weight"


@pytest.fixture
def copy(tiny_idefics3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_idefics3, tmp_path / "copy"))


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def renamed(name: str, other: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {other if key == name else key: value for key, value in tensors.items()}


def test_an_untrained_adapter_is_refused(tiny_idefics3: Path, tmp_path: Path, adapter_on: Callable[..., Path]) -> None:
    with pytest.raises(ExportError, match="changed nothing"):
        merge(adapter_on(tiny_idefics3, scale=0.0), tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(
    tiny_idefics3: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    adapter = adapter_on(tiny_idefics3)
    path = adapter / "adapter_model.safetensors"
    save_file({key.replace("text_model", "other_model"): value for key, value in load_file(path).items()}, path)
    with pytest.raises(ExportError, match=r"4 tensors that the checkpoint does not hold.*other_model"):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_that_is_not_finite_is_refused(
    tiny_idefics3: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    adapter = adapter_on(tiny_idefics3)
    path = adapter / "adapter_model.safetensors"
    save_file({key: value * float("nan") for key, value in load_file(path).items()}, path)
    with pytest.raises(ExportError, match=r"cannot be merged into model\.text_model"):
        merge(adapter, tmp_path / "merged")


def test_a_quantized_base_is_refused(copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]) -> None:
    adapter = adapter_on(copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"quantized \(bitsandbytes\)"):
        merge(adapter, tmp_path / "merged")


def test_a_base_of_4_bit_whose_config_does_not_say_so_is_refused(
    copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    adapter = adapter_on(copy)
    change_tensor(copy, QUERY, lambda tensor: torch.zeros((tensor.numel() // 2, 1), dtype=torch.uint8))
    with pytest.raises(ExportError, match="cannot be loaded"):
        merge(adapter, tmp_path / "merged")
    change_tensor(copy, QUERY, lambda _: torch.zeros((64, 64), dtype=torch.int8))
    with pytest.raises(ExportError, match=r"stored as torch\.int8"):
        merge(adapter, tmp_path / "merged")


@pytest.mark.parametrize("edit", [without(VISION), renamed(VISION, "vision." + VISION)], ids=["dropped", "renamed"])
def test_a_base_that_lacks_weights_is_refused(
    edit: Callable[[dict[str, Any]], dict[str, Any]], copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    """transformers would draw them at random, and say so in a warning only."""
    adapter = adapter_on(copy)
    edit_tensors(copy, edit)
    with pytest.raises(ExportError, match=f"lacks 1 tensors of its model, {VISION}"):
        merge(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("edit", "count"),
    [(without(VISION), 1), (renamed(VISION, "v." + VISION), 2), (renamed("nothing", ""), 0)],
    ids=["dropped", "renamed", "as it was"],
)
def test_a_lost_or_renamed_tensor_is_refused(
    edit: Callable[[dict[str, Any]], dict[str, Any]], count: int, tiny_idefics3: Path, copy: Path
) -> None:
    edit_tensors(copy, edit)
    with pytest.raises(ExportError, match=f"{count} differ, .*{VISION}" if count else "changed nothing"):
        check_tensors(tiny_idefics3, copy, {QUERY})


def test_a_changed_tensor_that_is_not_targeted_is_refused(tiny_idefics3: Path, copy: Path) -> None:
    change_tensor(copy, QUERY, lambda tensor: tensor + 1)
    check_tensors(tiny_idefics3, copy, {QUERY})
    change_tensor(copy, VISION, lambda tensor: tensor.nextafter(tensor + 1))
    with pytest.raises(ExportError, match=r"not target: model\.vision_model"):
        check_tensors(tiny_idefics3, copy, {QUERY})


def test_another_type_or_shape_is_refused(tiny_idefics3: Path, copy: Path) -> None:
    change_tensor(copy, QUERY, lambda tensor: tensor.half())
    with pytest.raises(ExportError, match="float16"):
        check_tensors(tiny_idefics3, copy, {QUERY})
    change_tensor(copy, QUERY, lambda tensor: tensor.float().view(-1, 32))
    with pytest.raises(ExportError, match=r"\(128, 32\)"):
        check_tensors(tiny_idefics3, copy, {QUERY})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_that_is_not_the_adapters_is_refused(
    dtype: torch.dtype, copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    edit_tensors(copy, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    adapter, probe = adapter_on(copy), probe_of(copy)
    merge(adapter, tmp_path / "merged")
    names = targeted_tensors(adapter)
    base = logits_of(load_model(copy), probe)
    trained = logits_of(AdaptedModel(load_model(copy), adapter).model, probe)
    check_logits(tmp_path / "merged", probe, base, trained, names)
    with pytest.raises(ExportError, match="disagree"):  # a merge that was none
        check_logits(copy, probe, base, trained, names)
    change_tensor(tmp_path / "merged", VISION, torch.zeros_like)
    with pytest.raises(ExportError, match="disagree"):
        check_logits(tmp_path / "merged", probe, base, trained, names)
    change_tensor(tmp_path / "merged", QUERY, lambda tensor: tensor * float("nan"))
    with pytest.raises(ExportError, match="disagree"):
        check_logits(tmp_path / "merged", probe, base, trained, names)


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_rounding_to_16_bit_is_no_disagreement(
    scale: float, copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    """A weak adapter does less than rounding does: a share of its effect is no measure then."""
    edit_tensors(copy, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    outcome = merge(adapter_on(copy, scale=0.05 * scale), tmp_path / "merged")
    assert outcome["logit_error"] > 0
    assert (outcome["logit_error"] < 0.05 * outcome["adapter_effect"]) == (scale == 1.0)


FILES = ["tokenizer.json", "processor_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_without_what_a_prompt_needs_is_refused(
    name: str, copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    adapter = adapter_on(copy)
    check_files(copy)
    (copy / name).unlink()
    with pytest.raises(ExportError, match=r"tokenizer\.json|processor|chat template"):
        check_files(copy)
    with pytest.raises(ExportError, match=str(copy)):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("family", ["tiny_qwen2_vl", "tiny_llava", "tiny_internvl"])
def test_every_familys_files_are_looked_for(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(family)
    check_files(model)
    for file in model.glob("*processor_config.json"):
        copy = Path(shutil.copytree(model, tmp_path / file.stem))
        for name in model.glob("*processor_config.json"):
            (copy / name.name).unlink()
        with pytest.raises(ExportError, match="processor"):
            check_files(copy)


def test_a_plain_model_folder_that_lacks_weights_is_refused(copy: Path, tmp_path: Path) -> None:
    from mpa_edge.export.merged import open_source

    assert open_source(copy, tmp_path, lambda line: None).checks == {"source": "base", "files": "complete"}
    edit_tensors(copy, without(VISION))
    with pytest.raises(ExportError, match=f"lacks 1 tensors of its model, {VISION}"):
        open_source(copy, tmp_path, lambda line: None)


def test_an_unknown_family_is_named_before_the_merge(
    copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    from mpa_edge.export.merged import open_source

    shutil.copytree(adapter_on(copy), tmp_path / "run" / "student")
    (tmp_path / "run" / "run.json").write_text("{}")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "kosmos-2"}))
    with pytest.raises(UnknownFamily, match="kosmos-2"):
        open_source(tmp_path / "run", None, lambda line: None)
    assert not (tmp_path / "run" / "merged").exists()


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_a_quantized_part_is_refused_and_an_empty_note_is_not(part: str | None, tmp_path: Path) -> None:
    def write(settings: Any) -> None:
        note = {"quantization_config": settings}
        (tmp_path / "config.json").write_text(json.dumps({part: note} if part else note))

    write({"quant_method": "awq"})
    with pytest.raises(ExportError, match=r"is quantized \(awq\)"):
        refuse_quantized(tmp_path)
    write(None)
    refuse_quantized(tmp_path)
