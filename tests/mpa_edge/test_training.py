"""What can be set about a training: methods, parts, accumulation, checkpointing, rows too long, rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpa_edge import level as level_module
from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError, MissingExtra, RunError
from mpa_edge.level import level, steps_of
from mpa_edge.methods import autocast, default_rate, refuse_untrainable
from mpa_edge.models import base_of, open_vlm
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.training_data import Example, TrainingData
from mpa_edge.transformers_vlm import TransformersVlm

Student = Callable[[], TransformersVlm]


@pytest.fixture(scope="module")
def examples(disc_examples: Callable[..., list[Example]]) -> list[Example]:
    """Discs in four colours."""
    return disc_examples(20, "What colour?")


@pytest.fixture
def student(tiny_one_tile: Path) -> Student:
    """A fresh student at each call."""
    torch.set_num_threads(1)
    return lambda: TransformersVlm.load(str(tiny_one_tile), device="cpu")


@pytest.fixture
def config(tiny_one_tile: Path) -> Callable[..., AlignConfig]:
    usual: dict[str, Any] = {"epochs": 2, "train_batch_size": 8, "learning_rate": 5e-3, "rank": 4, "device": "cpu"}
    fixed: dict[str, Any] = {"images": "none", "teacher": "none", "student": str(tiny_one_tile), "task": "reference"}
    return lambda **settings: AlignConfig(**{**usual, **fixed, **settings})


def assert_alike(history: list[dict[str, Any]], other: list[dict[str, Any]], rel: float) -> None:
    assert history[0]["train_loss"] is other[0]["train_loss"] is None
    for row, like in zip(history, other, strict=True):
        for key in ("train_loss", "holdout_loss", "holdout_exact"):
            assert row[key] is None or row[key] == pytest.approx(like[key], rel=rel), (row, like)


def trained_tensors(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    """The tensors that are new or have changed."""
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def answers(vlm: Any, examples: list[Example]) -> list[str]:
    images = [open_image(example.image) for example in examples]
    prompts = [example.prompt for example in examples]
    return [answer.text for answer in vlm.answer(images, prompts, Decoding(max_new_tokens=6))]


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (("connector",), {"connector"}),
        (("vision",), {"vision_model"}),
        (("connector", "language"), {"connector", "text_model"}),
    ],
)
def test_lora_goes_to_the_chosen_parts(
    parts: tuple[str, ...],
    found: set[str],
    student: Student,
    examples: list[Example],
    tmp_path: Path,
    config: Callable[..., AlignConfig],
) -> None:
    model = student()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    metrics = level(model, examples, tmp_path, config(train=parts, epochs=1))
    changed = trained_tensors(before, model.model)
    assert {name.split(".")[1] for name in changed} == found
    assert all(".lora_" in name for name in changed)
    assert {name.partition(".")[0] for name in metrics["parameters"]["trainable"]} == found
    # It did reach the loss.
    assert metrics["history"][1]["holdout_loss"] != metrics["before"]["holdout_loss"]
    assert json.loads((tmp_path / "metrics.json").read_text())["parameters"] == metrics["parameters"]


@pytest.mark.parametrize("parts", [("vision",), ("connector",)])
def test_no_stale_features_when_what_makes_them_is_trained(
    parts: tuple[str, ...],
    student: Student,
    examples: list[Example],
    tmp_path: Path,
    config: Callable[..., AlignConfig],
) -> None:
    """The held-out loss of the last epoch is that of the saved adapter, opened and asked anew."""
    metrics = level(student(), examples, tmp_path / "student", config(train=parts, epochs=1))
    best = metrics["best"]
    again = level(student(), examples, tmp_path / "again", config(train=parts, epochs=1), start=tmp_path / "student")
    assert again["before"]["holdout_loss"] == pytest.approx(best["holdout_loss"], rel=1e-5)


def test_dora_has_magnitudes_and_opens(
    student: Student, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig]
) -> None:
    model = student()
    metrics = level(model, examples, tmp_path, config(method="dora"))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in saved)
    assert metrics["history"][-1]["train_loss"] < metrics["history"][1]["train_loss"]
    assert answers(open_vlm(str(tmp_path), device="cpu"), examples[:4]) == answers(model, examples[:4])


def test_full_trains_the_weights_themselves_and_saves_a_whole_model(
    student: Student, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig], tiny_one_tile: Path
) -> None:
    model = student()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    metrics = level(model, examples, tmp_path / "student", config(method="full", train=("language", "connector")))
    changed = trained_tensors(before, model.model)
    assert {name.split(".")[1] for name in changed} == {"text_model", "connector", "weight"}  # lm_head.weight
    assert metrics["parameters"]["trainable"]["text_model.embed_tokens"] > 0
    assert set(metrics["parameters"]["frozen"]) == {"vision_model"}
    assert Path(base_of(tmp_path / "student")) == tiny_one_tile.resolve()
    opened = open_vlm(str(tmp_path / "student"), device="cpu")
    assert answers(opened, examples[:4]) == answers(model, examples[:4])
    assert str(tiny_one_tile) not in "".join(file.read_text() for file in (tmp_path / "student").glob("*.json"))


def test_a_run_that_trained_in_full_is_exported(
    student: Student, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig], tiny_one_tile: Path
) -> None:
    from mpa_edge.export.merged import open_source

    run, settings = tmp_path / "run", config(method="full", train=("connector",), epochs=1, learning_rate=5e-4)
    metrics = level(student(), examples, run / "student", settings)
    assert metrics["best_epoch"] == 1
    (run / "run.json").write_text(json.dumps({"config": settings.to_json()}))
    merged = open_source(run, None, lambda line: None)
    assert merged.folder == run / "merged"
    assert merged.checks["changed"] == merged.checks["targeted"] == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_one_tile, merged.folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.connector.modality_projection.proj.weight"}
    digest = merged.provenance.adapter_sha256
    assert digest is not None
    assert open_source(run, None, pytest.fail).provenance.adapter_sha256 == digest  # merged once


def test_full_keeps_bfloat16_outside_and_float32_inside(
    tiny_one_tile: Path, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig]
) -> None:
    model = TransformersVlm.load(str(tiny_one_tile), device="cpu", dtype="bfloat16")
    tables = {name: buffer.dtype for name, buffer in model.model.named_buffers()}
    seen = set()

    def look(count: int) -> None:
        seen.add(model.model.dtype)

    assert autocast(model.model, torch.bfloat16).__class__.__name__ == "nullcontext"
    level(model, examples, tmp_path, config(method="full", epochs=1, dtype="bfloat16"), advance=look)
    assert seen == {torch.float32}
    assert model.model.dtype == torch.bfloat16
    assert {name: buffer.dtype for name, buffer in model.model.named_buffers()} == tables
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_adapters_are_float32_on_a_bfloat16_base(
    tiny_one_tile: Path, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig]
) -> None:
    model = TransformersVlm.load(str(tiny_one_tile), device="cpu", dtype="bfloat16")
    level(model, examples, tmp_path, config(epochs=1, dtype="bfloat16"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    kinds = {".lora_" in name: weight.dtype for name, weight in model.model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_what_this_machine_cannot_train_is_said_first(
    config: Callable[..., AlignConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--method qlora: needs a CUDA GPU; --method lora"):
        refuse_untrainable(config(method="qlora"))
    with pytest.raises(InputError, match="--dtype float16"):
        refuse_untrainable(config(dtype="float16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bitsandbytes.*mpa-edge\[cuda\]"):
        refuse_untrainable(config(method="qlora", device="auto"))


def test_weights_themselves_get_a_lower_rate(student: Student) -> None:
    model = student().model
    assert default_rate(model, "full") == pytest.approx(default_rate(model, "lora") / 10)


@pytest.mark.parametrize("cached", [True, False])
def test_accumulation_gives_the_gradient_of_the_whole_step(
    cached: bool,
    student: Student,
    examples: list[Example],
    tmp_path: Path,
    config: Callable[..., AlignConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers differ in length, so the mean of two passes' means would be another gradient."""
    rows = [Example(**{**vars(row), "answer": row.answer * (1 + n % 3)}) for n, row in enumerate(examples)]
    if not cached:
        monkeypatch.setattr(TransformersVlm, "encode_with_features", lambda *_: None)
    whole = level(student(), rows, tmp_path / "whole", config(train_batch_size=16))
    parts = level(student(), rows, tmp_path / "parts", config(train_batch_size=4, accumulate=4))
    assert whole["steps"] == parts["steps"] == 4
    assert_alike(whole["history"], parts["history"], rel=1e-4)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_changes_nothing_but_the_memory(
    student: Student, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig]
) -> None:
    model = student()
    on = level(model, examples, tmp_path / "on", config(checkpointing="on", train=("language", "vision")))
    assert model.model.model.text_model.gradient_checkpointing
    assert not model.model.get_input_embeddings()._forward_hooks  # nothing frozen is made to have gradients
    auto = student()
    off = level(auto, examples, tmp_path / "off", config(train=("language", "vision")))
    assert not auto.model.model.text_model.gradient_checkpointing  # small, and on a CPU
    assert_alike(on["history"], off["history"], rel=1e-5)


def test_the_rate_rises_and_falls(
    student: Student, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig]
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *arguments: Any, **named: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noted)
        level(student(), examples, tmp_path, config(train_batch_size=2, warmup=0.25, patience=9))
    assert len(rates) == 18
    peak = rates.index(max(rates))
    assert (peak, rates[peak]) == (3, 5e-3)  # a quarter of 18 steps, from 1/4 of the peak on
    assert rates[0] == pytest.approx(5e-3 / 4)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.1 * rates[peak]


def test_rows_that_are_too_long_are_dropped_whole(
    student: Student, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig]
) -> None:
    long = Example(**{**vars(examples[0]), "id": "long", "prompt": "why " * 2000})
    gone = Example(**{**vars(examples[0]), "id": "gone", "image": tmp_path / "gone.png"})
    most = len(examples) * 2
    metrics = level(student(), [*examples, *examples, long, gone], tmp_path / "s", config(epochs=1))
    assert set(metrics["dropped"]) == {"long", "gone"}
    assert metrics["dropped"]["long"].startswith("too_long: ")
    assert metrics["dropped"]["long"].endswith("the model takes 1024")
    assert sum(metrics["examples"].values()) == most


@pytest.mark.parametrize("features", [True, False])
def test_many_rows_too_long_are_an_error_before_training(
    features: bool,
    student: Student,
    examples: list[Example],
    tmp_path: Path,
    config: Callable[..., AlignConfig],
) -> None:
    vlm = student()
    vlm.model.config.text_config.max_position_embeddings = 20  # 16 image tokens, and some text
    if not features:
        vlm._features = None
    with pytest.raises(RunError, match=r"20 of 20 .* \(e0: too_long: \d+ tokens, the model takes 20.*--longest-edge"):
        level(vlm, examples, tmp_path, config())
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_steps_are_those_that_are_taken(
    student: Student, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig]
) -> None:
    """Held-out rows are no steps."""
    settings = config(train_batch_size=6, patience=99, holdout=0.2)  # 16 rows to train on
    steps: list[int] = []
    level(student(), examples, tmp_path, settings, advance=steps.append)
    assert sum(steps) == steps_of(examples, settings) == 6


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_second_round_begins_where_the_first_ended(
    method: str, student: Student, examples: list[Example], tmp_path: Path, config: Callable[..., AlignConfig]
) -> None:
    rate = 5e-4 if method == "full" else 5e-3
    settings = config(method=method, learning_rate=rate)
    model = student()
    first = level(model, examples, tmp_path / "rounds" / "1" / "student", settings)
    assert first["best_epoch"] > 0
    start = tmp_path / "rounds" / "1" / "student"
    second = level(model, examples, tmp_path / "student", settings, start=start)
    assert second["before"]["holdout_loss"] == pytest.approx(first["best"]["holdout_loss"], rel=1e-5)
    assert second["before"]["holdout_loss"] < first["before"]["holdout_loss"]
    # The same from a student that is opened anew, killed and resumed.
    monkey = pytest.MonkeyPatch()
    monkey.setattr(level_module, "STEPS_PER_CHECKPOINT", 1)

    def kill(count: int) -> None:
        if (tmp_path / "resumed" / "checkpoint.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        level(student(), examples, tmp_path / "resumed", settings, start=start, advance=kill)
    monkey.undo()
    opened = open_vlm(str(start), device="cpu")
    assert isinstance(opened, TransformersVlm)
    level(opened, examples, tmp_path / "resumed", settings, start=start)
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (tmp_path / "resumed" / weights).read_bytes() == (tmp_path / "student" / weights).read_bytes()
    # A finished round leaves the student as it made it, though nothing is trained.
    again = student()
    assert level(again, examples, tmp_path / "student", settings, start=start) == second
    assert answers(again, examples[:4]) == answers(model, examples[:4])


def test_prompts_with_grids_and_one_tensor_for_all_pictures_are_kept_too(
    student: Student, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen2-VL gives them."""
    vlm = student()
    take = vlm.encode_with_features

    def joined(images: Any, prompts: Any) -> Any:
        inputs = take(images, prompts)
        assert inputs is not None
        found = inputs["mm_encoder_outputs"]["image"]
        found.pooler_output = torch.cat(tuple(found.pooler_output))
        inputs["image_grid_thw"] = torch.tensor([[1, 4, number] for number in range(len(prompts))])
        return inputs

    monkeypatch.setattr(vlm, "encode_with_features", joined)
    data = TrainingData(vlm, examples)
    data.prepare()
    inputs, _ = data.batch([3, 1])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 3], [1, 4, 1]]
    listed = take([open_image(examples[n].image) for n in (3, 1)], [examples[n].prompt for n in (3, 1)])
    assert listed is not None
    expected = torch.cat(tuple(listed["mm_encoder_outputs"]["image"].pooler_output))
    assert torch.equal(inputs["mm_encoder_outputs"]["image"].pooler_output, expected)
