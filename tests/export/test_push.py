"""What an upload sends, byte for byte, against a server that stands in for the hub's API."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpa_edge.cli import app
from mpa_edge.errors import ExportError, InputError
from mpa_edge.export.push import push

TOKEN = "hf_not_a_real_token"


@dataclass
class Hub:
    """The hub's side: what came in, by path, and the status that every answer has."""

    address: str = ""
    requests: list[tuple[str, str | None, bytes]] = field(default_factory=list)
    status: int = 200
    private: bool = True  # as the repository is, whatever is asked for

    def sent(self, part: str) -> bytes:
        """The body of the one request whose path holds `part`."""
        (found,) = [body for path, _, body in self.requests if part in path]
        return found

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/repos/create"):
            name = f"me/{json.loads(body)['name']}"
            return {"url": f"{self.address}/{name}", "name": name}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/me/signs/commit/0"}
        if path == "/api/models/me/signs":
            return {"id": "me/signs", "private": self.private}
        return {"errors": [], "warnings": []}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0)) or self.chunks()
            hub.requests.append((self.path, self.headers.get("authorization"), body))
            content = json.dumps(hub.answer(self.path, body) if hub.status == 200 else {"error": "no"}).encode()
            self.send_response(hub.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def chunks(self) -> bytes:
            body = b""
            while self.headers.get("transfer-encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                body += self.rfile.read(size)
                self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export, with things beside it that are not to leave the machine."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (folder / ".secret").write_text("stays here")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("stays here too")
    return folder


def test_all_files_of_the_export_and_no_others_reach_the_repository(hub: Hub, folder: Path) -> None:
    upload = push(folder, "me/signs", endpoint=hub.address)
    assert json.loads(hub.sent("/repos/create")) == {"name": "signs", "organization": "me", "visibility": "private"}
    assert all(token == f"Bearer {TOKEN}" for _, token, _ in hub.requests)
    assert {path for path, _, _ in hub.requests if "/commit/" in path} == {"/api/models/me/signs/commit/main"}
    head, *rows = [json.loads(line) for line in hub.sent("/commit/").splitlines()]
    assert head["value"]["summary"] == "Upload a model exported by mpa-edge"
    sent = {row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in rows}
    assert sent == {name: (folder / name).read_bytes() for name in ("README.md", "config.json", "model.safetensors")}
    assert dict(upload.files) == {name: len(content) for name, content in sent.items()}
    assert upload.lines()[0] == f"uploaded to {hub.address}/me/signs: 3 files, 0.0 MB, private"


def test_public_is_public_only_when_it_is_asked_for(hub: Hub, folder: Path) -> None:
    hub.private = False
    upload = push(folder, "signs", private=False, endpoint=hub.address)
    assert json.loads(hub.sent("/repos/create"))["visibility"] == "public"
    assert upload.lines()[0].endswith(", public")


def test_nothing_is_sent_to_a_public_repository_that_was_to_be_private(hub: Hub, folder: Path) -> None:
    """It was there before; the hub creates none, and leaves it as it is."""
    hub.private = False
    with pytest.raises(InputError, match=r"--push me/signs: that repository is public; .* --public"):
        push(folder, "me/signs", endpoint=hub.address)
    assert not [path for path, _, _ in hub.requests if "/commit/" in path or "/preupload/" in path]


def test_a_private_repository_stays_private_and_is_called_so(hub: Hub, folder: Path) -> None:
    assert push(folder, "me/signs", private=False, endpoint=hub.address).lines()[0].endswith(", private")


def test_a_dry_run_lists_what_would_go_and_sends_nothing(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    upload = push(folder, "me/signs", dry_run=True, endpoint=hub.address)
    assert not hub.requests
    assert [path for path, _ in upload.files] == ["README.md", "config.json", "model.safetensors"]
    assert upload.lines()[0].startswith("would be uploaded to me/signs: 3 files")
    assert len(upload.lines()) == 4


def test_the_token_comes_from_the_environment_alone(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="HF_TOKEN"):
        push(folder, "me/signs", endpoint=hub.address)
    assert not hub.requests


@pytest.mark.parametrize("name", ["a/b/c", "me/..", "-x-/y", "", "me/sp ace"])
def test_a_name_that_cannot_be_is_refused_before_anything_is_sent(hub: Hub, folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="--push"):
        push(folder, name, endpoint=hub.address)
    assert not hub.requests


def test_a_folder_that_is_no_export_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="--format hf"):
        push(folder, "me/signs", dry_run=True)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_hub_refuses_is_one_line_without_the_token(hub: Hub, folder: Path, status: int) -> None:
    hub.status = status
    with pytest.raises(ExportError, match=f"--push me/signs.*{status}") as refused:
        push(folder, "me/signs", endpoint=hub.address)
    assert "\n" not in str(refused.value)
    assert TOKEN not in str(refused.value)


def test_what_would_fail_after_the_export_is_refused_before_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run does not even exist."""
    monkeypatch.delenv("HF_TOKEN")
    for flags, words in (
        (["--push", "me/signs"], "HF_TOKEN"),
        (["--push", "me/..", "--dry-run"], "no name of a repository"),
        (["--push", "me/signs", "--dry-run"], "neither a run"),
    ):
        error = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", "hf", *flags]).exception
        assert isinstance(error, InputError)
        assert words in str(error)
