"""Settings of a model folder, and folders whose parts disagree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.errors import ExportError, UnknownFamily
from mpa_edge.export.families import FAMILIES, family_of, prompt_settings, read_config
from mpa_edge.runtime.families import family_named


def settings(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoProcessor

    config, processor = read_config(folder), AutoProcessor.from_pretrained(folder)
    family = family_of(config)
    return family.image_settings(config, processor), prompt_settings(config, processor, "Q {question}", 9)


def test_settings_are_the_folders(tiny_idefics3: Path) -> None:
    image, prompt = settings(tiny_idefics3)
    assert (image.tile_size, image.longest_edge, image.split, image.tokens_per_tile) == (64, 192, True, 16)
    assert (image.resample, image.rescale_factor) == ("lanczos", 1 / 255)
    assert (prompt.question_template, prompt.max_new_tokens, prompt.image_token) == ("Q {question}", 9, "<image>")


@pytest.fixture
def copy(tiny_idefics3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_idefics3, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_stop_tokens_are_those_of_generate(copy: Path) -> None:
    end = settings(copy)[1].stop_token_ids
    edit(copy / "generation_config.json", eos_token_id=[7, 9])
    assert settings(copy)[1].stop_token_ids == tuple(sorted({7, 9, *end}))
    (copy / "generation_config.json").unlink()
    assert settings(copy)[1].stop_token_ids == end


def test_model_and_processor_must_agree(copy: Path) -> None:
    edit(copy / "processor_config.json", image_seq_len=64)
    with pytest.raises(ExportError, match="disagree"):
        settings(copy)


def test_a_step_that_is_switched_off_is_refused(copy: Path) -> None:
    images = json.loads((copy / "processor_config.json").read_text())["image_processor"]
    edit(copy / "processor_config.json", image_processor={**images, "do_normalize": False})
    with pytest.raises(ExportError, match="do_normalize"):
        settings(copy)


def test_unknown_families_are_named() -> None:
    with pytest.raises(UnknownFamily, match=r"'florence2'; known: idefics3"):
        family_of({"model_type": "florence2"})


def test_the_runtime_knows_every_family_under_the_same_name() -> None:
    for family in FAMILIES:
        assert family_named(family.name).name == family.name


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no transformers model folder"):
        read_config(tmp_path)
