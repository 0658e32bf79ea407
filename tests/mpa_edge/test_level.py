"""The leveler: trains on what inference asks, only LoRA moves, a killed training ends in the same adapter."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpa_edge import level as level_module
from mpa_edge.config import AlignConfig
from mpa_edge.errors import FingerprintMismatch, RunError
from mpa_edge.level import level
from mpa_edge.models import base_of, open_vlm
from mpa_edge.records import write_rows
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.training_data import (
    IGNORED,
    Example,
    TrainingData,
    append_targets,
    loss_and_exact,
    read_examples,
    split_by_group,
)
from mpa_edge.transformers_vlm import TransformersVlm

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def examples(disc_examples: Callable[..., list[Example]]) -> list[Example]:
    """Discs in four colours."""
    return disc_examples(24, "What colour?", "Which colour is it?")


def config(student: Path, **settings: Any) -> AlignConfig:
    usual: dict[str, Any] = {"epochs": 3, "train_batch_size": 8, "learning_rate": 5e-3, "patience": 99, "rank": 4}
    return AlignConfig(images="none", teacher="none", student=str(student), task="reference", **{**usual, **settings})


def student_of(folder: Path) -> TransformersVlm:
    torch.set_num_threads(1)
    return TransformersVlm.load(str(folder), device="cpu")


def output(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_one_tile: Path, examples: list[Example]) -> Path:
    """A whole training, not disturbed."""
    folder = tmp_path_factory.mktemp("trained") / "student"
    level(student_of(tiny_one_tile), examples, folder, config(tiny_one_tile))
    return folder


@pytest.fixture
def student(tiny_one_tile: Path) -> TransformersVlm:
    return student_of(tiny_one_tile)


def test_prompt_tokens_are_those_of_inference_and_labels_mask_exactly_them(
    student: TransformersVlm, examples: list[Example]
) -> None:
    data = TrainingData(student, examples)
    data.prepare()
    places = [1, 2, 4]
    inputs, labels = data.batch(places)
    for row, place in enumerate(places):
        example = examples[place]
        asked = student.encode([open_image(example.image)], [example.prompt])["input_ids"][0].tolist()
        answer = student.target_ids(example.answer)
        seen = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        assert seen == asked + answer
        assert labels[row][labels[row] != IGNORED].tolist() == answer
    assert student.processor.tokenizer.decode(student.target_ids("red")) == " red<end_of_utterance>"
    # The last columns of the batch, and nothing else, are what the loss is on.
    width = labels.shape[1]
    assert torch.equal(inputs["input_ids"][:, -width:][labels != IGNORED], labels[labels != IGNORED])


@pytest.mark.parametrize("model", ["tiny_one_tile", "tiny_idefics3"])
def test_cached_features_give_the_same_loss(
    model: str, examples: list[Example], request: pytest.FixtureRequest
) -> None:
    student = student_of(request.getfixturevalue(model))
    cached, plain = TrainingData(student, examples), TrainingData(student, examples)
    cached.prepare()
    places = [0, 3, 5, 6]
    assert "pixel_values" in plain.batch(places)[0]
    assert "pixel_values" not in cached.batch(places)[0]
    with torch.no_grad():
        (loss, exact), (other_loss, other_exact) = (
            loss_and_exact(student.model, *data.batch(places)) for data in (cached, plain)
        )
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-4)
    assert exact == other_exact


def test_the_loss_is_that_of_unpadded_rows(student: TransformersVlm, examples: list[Example]) -> None:
    """One row at a time, full logits, labels by hand: what the batched loss must add up to."""
    places = [0, 1, 2, 3]
    data = TrainingData(student, examples)
    batched, _ = loss_and_exact(student.model, *data.batch(places))
    total = 0.0
    for place in places:
        example = examples[place]
        prompt = student.encode([open_image(example.image)], [example.prompt])
        target = torch.tensor([student.target_ids(example.answer)])
        ids = torch.cat([prompt["input_ids"], target], dim=1)
        logits = student.model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits
        chances = logits[0, prompt["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
        total -= chances.gather(1, target.T).sum().item()
    assert batched.item() == pytest.approx(total, rel=1e-4)


def test_features_that_do_not_fit_are_not_kept(student: TransformersVlm, examples: list[Example]) -> None:
    data = TrainingData(student, examples, cache_bytes=1000)
    data.prepare()
    assert "pixel_values" in data.batch([0])[0]


def test_targets_go_to_the_right_and_token_types_grow_too() -> None:
    inputs = {
        "input_ids": torch.tensor([[0, 5], [6, 7]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
        "token_type_ids": torch.tensor([[0, 1], [1, 1]]),
        "pixel_values": torch.zeros(2, 3),
    }
    whole, labels = append_targets(inputs, [[1, 2, 3], [4]], pad=9)
    assert labels.tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert whole["input_ids"].tolist() == [[0, 5, 1, 2, 3], [6, 7, 4, 9, 9]]
    assert whole["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert whole["token_type_ids"].tolist() == [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert whole["pixel_values"] is inputs["pixel_values"]


def test_only_lora_moves(
    student: TransformersVlm, examples: list[Example], tmp_path: Path, tiny_one_tile: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    metrics = level(student, examples, tmp_path, config(tiny_one_tile, epochs=1))
    after = {name.replace(".base_layer", ""): tensor for name, tensor in student.model.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    added = {name for name in after if name not in before}
    assert added
    assert all(".lora_" in name and ".text_model.layers." in name for name in added)
    counted = metrics["parameters"]
    assert set(counted["trainable"]) == {
        f"text_model.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert sum(counted["trainable"].values()) == sum(after[name].numel() for name in added)
    assert set(counted["frozen"]) == {"vision_model", "connector", "text_model", "lm_head"}


def test_training_learns(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["examples"] == {"train": 22, "holdout": 2}
    assert [row["epoch"] for row in metrics["history"]] == [0, 1, 2, 3]
    assert metrics["before"]["train_loss"] is None
    assert metrics["history"][3]["train_loss"] < 0.6 * metrics["history"][1]["train_loss"]
    assert metrics["best"]["holdout_loss"] < metrics["before"]["holdout_loss"]


def test_the_adapter_opens_on_its_base_and_answers_otherwise(
    trained: Path, tiny_one_tile: Path, examples: list[Example]
) -> None:
    assert Path(base_of(trained)) == tiny_one_tile.resolve()
    saved = json.loads((trained / "adapter_config.json").read_text())
    assert not saved["base_model_name_or_path"].startswith("/")
    assert saved["target_modules"] == sorted(saved["target_modules"])  # no order of chance: digests name adapters
    aligned, base = open_vlm(str(trained), device="cpu"), open_vlm(str(tiny_one_tile), device="cpu")
    images, prompts = [open_image(e.image) for e in examples[:4]], [e.prompt for e in examples[:4]]
    decoding = Decoding(max_new_tokens=6)
    texts = [answer.text for answer in aligned.answer(images, prompts, decoding)]
    assert texts != [answer.text for answer in base.answer(images, prompts, decoding)]
    assert len(set(texts) & set(COLOURS)) >= 2
    assert aligned.describe()["adapter"] != base.describe().get("adapter")


@pytest.mark.parametrize("dies_after", [1, 3, 4, 8])
def test_a_killed_training_ends_in_the_same_adapter(
    dies_after: int,
    trained: Path,
    tmp_path: Path,
    tiny_one_tile: Path,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """22 rows in batches of 8 are 3 steps an epoch: killed in mid-epoch, at its end, after the next one's begin."""
    monkeypatch.setattr(level_module, "STEPS_PER_CHECKPOINT", 2)
    folder = tmp_path / trained.parent.name / "student"
    steps = 0

    def kill(count: int) -> None:
        nonlocal steps
        steps += count
        if steps == dies_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        level(student_of(tiny_one_tile), examples, folder, config(tiny_one_tile), advance=kill)
    assert (folder / "metrics.json").exists() is False
    level(student_of(tiny_one_tile), examples, folder, config(tiny_one_tile))
    names = sorted(output(trained))
    assert names == ["SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "metrics.json", "stage.json"]
    assert sorted(output(folder)) == names
    for name in ("adapter_model.safetensors", "metrics.json", "stage.json"):
        assert output(folder)[name] == output(trained)[name], name


def test_a_finished_training_is_not_repeated(
    trained: Path, student: TransformersVlm, examples: list[Example], tiny_one_tile: Path
) -> None:
    before = output(trained)
    steps: list[int] = []
    level(student, examples, trained, config(tiny_one_tile), advance=steps.append)
    assert output(trained) == before
    assert steps == []


def test_other_settings_are_refused(
    trained: Path, student: TransformersVlm, examples: list[Example], tiny_one_tile: Path
) -> None:
    with pytest.raises(FingerprintMismatch) as error:
        level(student, examples, trained, config(tiny_one_tile, rank=8, seed=1))
    assert error.value.differences == {"rank": (4, 8), "seed": (0, 1)}


def test_training_stops_early_and_keeps_the_best(
    student: TransformersVlm, examples: list[Example], tmp_path: Path, tiny_one_tile: Path
) -> None:
    """A learning rate that destroys the model: nothing is better than the student as it was."""
    settings = config(tiny_one_tile, learning_rate=0.9, epochs=29, patience=2)
    metrics = level(student, examples, tmp_path, settings)
    assert len(metrics["history"]) < 30
    assert metrics["best"] == metrics["history"][metrics["best_epoch"]]
    if metrics["best_epoch"] == 0:
        from safetensors.torch import load_file

        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert all(not tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_too_little_to_train_on_is_said(student: TransformersVlm, examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="3 training rows are too few"):
        level(student, examples[:3], tmp_path, config(tmp_path))
    one_picture = [Example(f"e{n}", "g", examples[0].image, "?", "x", "parity") for n in range(9)]
    with pytest.raises(RunError, match="one picture only"):
        level(student, one_picture, tmp_path, config(tmp_path))


def test_a_torn_checkpoint_is_named(
    student: TransformersVlm, examples: list[Example], tmp_path: Path, tiny_one_tile: Path
) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"rubbish")
    with pytest.raises(RunError, match=r"checkpoint\.safetensors cannot be read"):
        level(student, examples, tmp_path, config(tiny_one_tile))


def test_whole_pictures_are_held_out() -> None:
    rows = [Example(f"e{n}", f"g{n // 3}", Path("x"), "?", "a", "parity") for n in range(60)]
    train, held = split_by_group(rows, 0.1, seed=0)
    assert sorted(train + held) == list(range(60))
    assert len(held) == 6
    assert not {rows[n].group for n in train} & {rows[n].group for n in held}
    assert split_by_group(rows, 0.1, seed=1)[1] != held


def test_rows_are_read_from_the_file_when_they_are_needed(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        user = [{"type": "image"}, {"type": "text", "text": f"Ünd {number}? " + "x" * 500}]
        texts = [{"role": "user", "content": user}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
        known = {"id": f"{number}", "sample_id": f"s{number // 2}", "verdict": "parity"}
        return {**known, "messages": texts, "images": [f"{number}.png"]}

    write_rows(tmp_path / "parity.jsonl", map(row, range(2000)))
    examples = read_examples(tmp_path / "parity.jsonl")
    train, held = split_by_group(examples, 0.1, seed=0)
    assert not [thing for thing in gc.get_objects() if type(thing) is Example and thing.prompt.startswith("Ünd")]
    assert [example.id for example in examples] == [str(number) for number in range(2000)]
    assert (examples[7].prompt[:8], examples[-1].group, examples[3].image) == ("Ünd 7? x", "s999", tmp_path / "3.png")
    some = examples.only([5, 2, 1999])
    assert [example.id for example in some] == [some[0].id, some[1].id, some[2].id] == ["5", "2", "1999"]
    # As if they all were in memory.
    assert (train, held) == split_by_group(list(examples), 0.1, seed=0)


def test_a_row_that_was_not_finished_is_none(tmp_path: Path) -> None:
    (tmp_path / "parity.jsonl").write_text('{"id": "1"')
    assert list(read_examples(tmp_path / "parity.jsonl")) == []


def test_batches_cover_everything_once(student: TransformersVlm, examples: list[Example]) -> None:
    data = TrainingData(student, examples)
    first, again, other = (list(data.batches(range(23), 4, seed)) for seed in ("0 0", "0 0", "0 1"))
    assert sorted(place for batch in first for place in batch) == list(range(23))
    assert first == again != other
