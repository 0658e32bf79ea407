"""One way to open any model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mpa_edge.errors import InputError, MissingExtra, ModelError
from mpa_edge.models import base_of, kind_of, open_vlm
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


def test_the_kind_is_known_before_anything_is_loaded(tmp_path: Path, tiny_one_tile: Path) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    specs = ["fake:", "http://localhost/v1#m", "HTTPS://host/v1", str(tmp_path), str(tiny_one_tile), "org/model"]
    assert list(map(kind_of, specs)) == ["fake", "server", "server", "bundle", "transformers", "transformers"]


@pytest.mark.parametrize(
    ("kind", "setting", "flag"),
    [
        ("bundle", {"four_bit": True}, "--teacher-4bit or --method qlora"),
        ("server", {"four_bit": True}, "--teacher-4bit"),
        ("fake", {"four_bit": True}, "--teacher-4bit"),
        ("bundle", {"longest_edge": 64}, "--teacher-longest-edge"),
        ("bundle", {"max_requests": 5}, "--max-requests"),
        ("transformers", {"max_requests": 5}, "--max-requests"),
    ],
)
def test_a_flag_that_does_not_fit_the_model_is_named(
    kind: str, setting: dict[str, Any], flag: str, tmp_path: Path, tiny_one_tile: Path
) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    specs = {"bundle": str(tmp_path), "server": "http://me:word@host/v1", "fake": "fake:"}
    with pytest.raises(InputError, match=rf"^{flag}.* is for .* models only") as caught:
        open_vlm(specs.get(kind, str(tiny_one_tile)), **setting)
    assert "word" not in str(caught.value)


def test_a_server_without_its_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "mpa_edge.chat_vlm", raising=False)
    with pytest.raises(MissingExtra, match=r'openai is not installed. Run: pip install "mpa-edge\[align\]"'):
        open_vlm("http://localhost:1/v1#m")


def test_settings_of_a_transformers_model_reach_it(tiny_idefics3: Path, tiny_adapter: Path) -> None:
    plain = open_vlm(str(tiny_idefics3), device="cpu").describe()
    for folder in (tiny_idefics3, tiny_adapter):
        limited = open_vlm(str(folder), device="cpu", longest_edge=64, batch_size=3)
        assert limited.describe()["image"] != plain["image"]
        assert limited.batch_size == 3
        with pytest.raises(InputError, match="--teacher-4bit"):
            open_vlm(str(folder), device="cpu", four_bit=True)
