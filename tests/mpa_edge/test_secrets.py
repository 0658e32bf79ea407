"""Keys and passwords that are marked, and everything that a run leaves, grepped for them."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from misbehaving import Misbehaving, prompt_of, reply, serving
from mpa_edge import edge, run_events
from mpa_edge.align import align
from mpa_edge.chat_messages import answer_of
from mpa_edge.chat_vlm import ChatVlm
from mpa_edge.cli import app
from mpa_edge.config import AlignConfig
from mpa_edge.status import status_of
from mpa_edge.tasks import task_named

KEY, TOKEN, PASSWORD = "sk-marked-5f2c", "hf_marked_77aa", "word-marked/9b1d"
MARKED = re.compile("marked")
WRITE = task_named("reference").annotate_prompts[0]
WIDTH = 20
PLACE = "memory:///secrets/run"


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_API_KEY", "MPA_EDGE_API_KEY"):
        monkeypatch.setenv(name, KEY)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def gossip(server: Misbehaving) -> Callable[[dict[str, Any], int], Any]:
    """Whatever the server says has the key in it, which it does know. It writes about each picture another question
    and refuses a wide one. Of its answers one in four has the key, as one that has it is confirmed by none."""

    def script(request: dict[str, Any], number: int) -> Any:
        key, prompt = server.headers[-1]["authorization"], prompt_of(request)
        headers = {"x-request-id": key, "x-echo": key}
        if prompt != WRITE:
            asked = int(re.sub(r"[^0-9]", "", prompt))
            return 200, reply(f"{asked}" if asked % 4 else f"{asked} {key}"), headers
        _, _, picture = request["messages"][0]["content"][0]["image_url"]["url"].partition(",")
        if Image.open(io.BytesIO(base64.b64decode(picture))).width > WIDTH:
            return 400, {"error": {"message": f"no picture for {key}"}}, headers
        return 200, reply(f"{key}\nWhat is number {number}? {number}"), headers

    return script


def run(config: AlignConfig) -> None:
    """As the command line does."""
    with suppress(SystemExit):
        edge.run(lambda: typer.echo(align(config).summary()))


def refused_by(server: Misbehaving, config: AlignConfig) -> None:
    """The teacher's server knows nobody, and repeats the key in saying so."""
    server.models = [401, {"error": {"message": f"nobody knows Bearer {KEY}"}}, {"www-authenticate": KEY}]
    run(config)
    server.models = (f"Bearer {KEY}",)  # its only model's name


def refused_by_store(config: AlignConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store's client tells where it went, and with what: first of all, and where a part is to be copied."""

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(f"https://me:{PASSWORD}@store.example/run does not take {TOKEN}")

    for name in ("ls", "pipe_file"):
        with monkeypatch.context() as patched:
            patched.setattr(MemoryFileSystem, name, refused)
            run(config)


def leave(folder: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is refused by all whom it talks to, and goes on to its end."""
    (folder / "photos").mkdir()
    for number in range(20):
        Image.new("RGB", (WIDTH + number // 19, 20), (10 * number, 0, 0)).save(folder / "photos" / f"{number:02d}.png")
    with serving() as server:
        server.script = gossip(server)
        config = AlignConfig(
            images=str(folder / "photos"),
            teacher=server.url,
            student=str(student),
            task="reference",
            out=folder / "run",
            questions=1,
            mix=0.0,
            device="cpu",
            epochs=1,
            mirror=PLACE,
            metrics_file=folder / "run.prom",
        )
        refused_by(server, config)
        refused_by_store(config, monkeypatch)
        run(config)
    return folder


def found_in(folder: Path, told: str) -> list[str]:
    """Where something marked is."""
    places = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    places |= {f"mirror: {name}": bytes(file.getbuffer()) for name, file in MemoryFileSystem.store.items()}
    status = status_of(folder / "run")
    places |= {"terminal": told.encode(), "status": f"{status.summary()}{status.to_json()}".encode()}
    return sorted(name for name, content in places.items() if MARKED.search(content.decode("utf-8", "replace")))


def test_nothing_that_a_run_leaves_holds_a_key_or_a_password(
    tiny_one_tile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, tiny_one_tile, monkeypatch)
    told = "".join(capfd.readouterr())
    assert found_in(tmp_path, told) == []
    # All of them were met, and the run came to its end.
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    ends = [line for line in log if line["event"] in ("done", "failed")]
    assert [line["event"] for line in ends] == ["failed", "failed", "failed", "done"]
    assert "nobody knows Bearer ***" in ends[0]["message"]
    assert "https://***@store.example/run does not take ***" in ends[1]["message"]
    assert told.count("https://***@store.example/run does not take ***") >= 2
    rows = "".join(path.read_text() for path in (tmp_path / "run" / "annotations").glob("*.jsonl"))
    assert "no picture for Bearer ***" in rows
    assert rows.count('"raw": "Bearer ***') == 19
    assert (tmp_path / "run" / "student").is_dir()


def as_it_is(text: str) -> str:
    return text


@pytest.mark.parametrize(
    ("module", "name", "where"),
    [
        (run_events, "without_secrets", {"run/log.jsonl"}),
        (edge, "without_secrets", {"terminal"}),
        (ChatVlm, "_hidden", {"run/annotations/part-00000.jsonl", "run/cases/part-00000.jsonl", "run/run.json"}),
        (ChatVlm, "_clean", {"run/annotations/part-00000.jsonl"}),
    ],
)
def test_each_of_the_cleaners_is_needed(
    module: Any,
    name: str,
    where: set[str],
    tiny_one_tile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without it the test above would find something there."""
    monkeypatch.setattr(module, name, staticmethod(as_it_is))
    leave(tmp_path, tiny_one_tile, monkeypatch)
    assert where <= set(found_in(tmp_path, "".join(capfd.readouterr())))


@pytest.mark.parametrize(
    ("flag", "address"),
    [
        ("--mirror", f"s3://me:{PASSWORD}@bucket/run"),
        ("--mirror", f"dir::file://me:{PASSWORD}@x"),
        ("--mirror", f"simplecache::ftp://me:{PASSWORD}@h/x"),
        ("--mirror", f"filecache::s3://K:{PASSWORD}@b/r"),
        ("--mirror", f"simplecache::https://h/x?token={PASSWORD}"),
        ("--images", f"https://me:{PASSWORD}@h/a.parquet"),
        ("--images", f"s3://me:{PASSWORD}@bucket/*.parquet"),
        ("--images", f"hf:me:{PASSWORD}@x/y"),
        ("--images", f"hf:{TOKEN}@x/y"),
        ("--test", f"https://me:{PASSWORD}@h/test.jsonl"),
        ("--teacher", "https://me:marked@h/v1#m"),
        ("--teacher", f"http://h/v1,http://me:{PASSWORD}@i/v1#m"),
        ("--student", f"https://{TOKEN}@huggingface.co/me/x"),
        ("--address", f"ray://me:{PASSWORD}@h:1"),
        ("--address", "me:marked@h:1"),
    ],
)
def test_an_address_with_a_password_is_refused_before_anything_is_written(
    flag: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"--images": "photos", "--teacher": "no-such", "--student": "no-such", "--task": "reference"}
    flags |= {"--out": "run", "--engine": "ray", flag: address}
    with pytest.raises(SystemExit) as end:
        edge.run(lambda: app(["align", *(part for pair in flags.items() for part in pair)]))
    told = "".join(capfd.readouterr())
    assert end.value.code == 1
    assert told.startswith(f"error: {flag}: an address with a password")
    assert not MARKED.search(told)
    assert list(tmp_path.iterdir()) == []


def test_half_a_character_in_a_servers_reply_can_be_written() -> None:
    class Reply:
        choices: Any = None
        error = "\udc00"

    assert json.dumps(answer_of(Reply()).error, ensure_ascii=False).encode()
