"""A key that is marked, and everything that a run leaves, grepped for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpa_edge.align import align
from mpa_edge.annotate import Annotator
from mpa_edge.chat_messages import answer_of
from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError
from mpa_edge.fake import open_fake
from mpa_edge.parts import open_parts
from mpa_edge.records import Annotation, Sample
from mpa_edge.run_folder import RunLog
from mpa_edge.tasks import task_named

SECRET = "sk-marked-5f2c"
VARIABLES = ("MPA_EDGE_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SERVE_KEY")


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)


def test_nothing_of_the_environment_is_in_what_a_run_writes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    teacher = open_fake("fake:")
    annotator = Annotator(teacher, task_named("textvqa"))
    folder = tmp_path / "run"
    parts = open_parts(folder / "annotations", Annotation, annotator.fingerprint(), 1)
    parts.fill(0, lambda known: annotator.annotations([Sample("1", str(tmp_path / "a.png"), "1")], known))
    config = AlignConfig(images=str(tmp_path), teacher="https://host.example/v1#m", student="s", task="textvqa")
    RunLog(folder / "run.json", config=config.to_json(), teacher=teacher.describe()).note("annotate", rows=1)
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) >= 3
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in "".join(capfd.readouterr()) + caplog.text


def test_an_address_with_a_password_is_refused_and_nothing_of_it_is_written(
    tiny_one_tile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "a.png")
    teacher, student = f"https://me:{SECRET}@host.example/v1#m", str(tiny_one_tile)
    config = AlignConfig(
        images=str(tmp_path / "photos"), teacher=teacher, student=student, task="textvqa", out=tmp_path / "run"
    )
    with pytest.raises(InputError, match="password") as caught:
        align(config)
    assert SECRET not in str(caught.value) + "".join(capfd.readouterr())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def test_half_a_character_in_a_servers_reply_can_be_written() -> None:
    class Reply:
        choices: Any = None
        error = "\udc00"

    assert json.dumps(answer_of(Reply()).error, ensure_ascii=False).encode()
