"""One way to open any model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mpa_edge.errors import InputError, ModelError
from mpa_edge.models import base_of, open_vlm
from mpa_edge.transformers_vlm import TransformersVlm


def test_a_transformers_folder(tiny_one_tile: Path) -> None:
    vlm = open_vlm(str(tiny_one_tile), name="teacher", device="cpu")
    assert (vlm.name, vlm.engine) == ("teacher", "transformers")
    assert open_vlm(f"{tiny_one_tile}/", device="cpu").name == tiny_one_tile.name


def test_an_adapter_changes_its_bases_answers(tiny_idefics3: Path, tiny_adapter: Path) -> None:
    base, adapted = open_vlm(str(tiny_idefics3), device="cpu"), open_vlm(str(tiny_adapter), device="cpu")
    assert isinstance(base, TransformersVlm)
    assert isinstance(adapted, TransformersVlm)
    inputs = base.encode([Image.new("RGB", (64, 64), "red")], ["What?"])
    with torch.no_grad():
        assert (base.model(**inputs).logits - adapted.model(**inputs).logits).abs().max() > 0.01
    assert adapted.describe()["weights"] == base.describe()["weights"]
    assert adapted.describe()["adapter"]
    assert adapted.name == tiny_adapter.name


def test_an_adapters_base_may_lie_beside_it(tiny_adapter: Path, tiny_idefics3: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "run" / "student")
    shutil.copytree(tiny_idefics3, tmp_path / "models" / "base")
    path = tmp_path / "run" / "student" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "../../models/base"}))
    assert base_of(path.parent) == str((tmp_path / "models" / "base").resolve())
    # Both moved together are still found.
    (tmp_path / "moved").mkdir()
    (tmp_path / "run").rename(tmp_path / "moved" / "run")
    (tmp_path / "models").rename(tmp_path / "moved" / "models")
    assert open_vlm(str(tmp_path / "moved" / "run" / "student"), device="cpu").engine == "transformers"


def test_a_hub_id_stays_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    assert base_of(tmp_path) == "org/model"


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": "/no/x"}']
)
def test_an_adapter_without_its_base_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"base|cannot be read"):
        base_of(tmp_path)


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        open_vlm(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"none of bundle\.json"):
        open_vlm(str(tmp_path))


def test_a_fake() -> None:
    assert open_vlm("fake:?seed=3", name="f").describe()["seed"] == 3
