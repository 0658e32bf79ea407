"""The random models are what they stand for: as many weights, and a tokenizer for the whole vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpa_edge.benchmarks import bench, runtime_bundles, smolvlm
from mpa_edge.benchmarks.reference_models import SPECIAL, make_tokenizer
from mpa_edge.benchmarks.smolvlm import (
    IMAGE_TOKENS,
    SHUFFLE,
    TILE,
    VISION,
    VOCABULARY,
    Costs,
    full_tokenizer,
    report_costs,
    smolvlm_config,
)
from mpa_edge.labelled import read_questions


@pytest.mark.parametrize(("size", "weights"), [("256M", 256_484_928), ("500M", 507_482_304)])
def test_the_model_has_the_true_size(size: str, weights: int) -> None:
    """As its model card says; made without memory."""
    from transformers import Idefics3ForConditionalGeneration

    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(smolvlm_config(size))
    assert sum(weight.numel() for weight in model.parameters()) == weights
    assert (TILE // VISION["patch_size"]) ** 2 // SHUFFLE**2 == IMAGE_TOKENS


def test_the_vocabulary_is_full() -> None:
    tokenizer, plain = full_tokenizer(), make_tokenizer()
    assert len(tokenizer) == VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == plain.convert_tokens_to_ids(SPECIAL)
    text = "<image>What does the sign say? 12 EUR\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_one_command_makes_what_is_missing_and_asks_for_costs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model and its bundles take minutes, so their makers only say here what they were asked for."""
    made: list[Any] = []
    monkeypatch.setattr(smolvlm, "write_random_smolvlm", lambda folder, size: made.append((folder.name, size)))
    monkeypatch.setattr(runtime_bundles, "write_bundles", lambda model, out, quants, tokens: made.append(quants))
    monkeypatch.setattr(bench, "bench", lambda config: made.append(config) or config.report / "report.json")
    (tmp_path / "gguf-q8_0").mkdir()
    (tmp_path / "gguf-q8_0" / "bundle.json").write_text("{}")
    costs = Costs(timed=2, quants={"gguf": ("q8_0", "f16"), "onnx": ("int8",)})
    assert report_costs(tmp_path, "500M", costs, threads=1) == tmp_path / "report" / "report.json"
    assert made[:2] == [("SmolVLM-500M-random", "500M"), {"gguf": ["f16"], "onnx": ["int8"]}]
    config = made[2]
    assert (config.costs_only, config.latency_n, config.threads) == (True, 2, "1")
    assert [Path(spec).name for spec in config.bundles] == ["gguf-q8_0", "gguf-f16", "onnx-int8"]
    assert config.baselines == (str(tmp_path / "SmolVLM-500M-random"),)
    assert len(read_questions(config.data[0])) == 12
