"""An exported Hugging Face folder to a repository on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpa_edge.errors import ExportError, InputError

TOKEN = "HF_TOKEN"
MESSAGE = "Upload a model exported by mpa-edge"


@dataclass(frozen=True)
class Upload:
    """What goes, or would go, where: `files` are paths in the repository with their sizes in bytes. `private` is what
    the hub says of the repository; before an upload, what a new one would be."""

    repo: str
    private: bool
    files: tuple[tuple[str, int], ...]
    url: str | None = None

    def lines(self) -> list[str]:
        """For people: the repository, then a line for each file."""
        total = sum(size for _, size in self.files) / 1e6
        what = f"{len(self.files)} files, {total:.1f} MB, {'private' if self.private else 'public'}"
        head = f"uploaded to {self.url}: {what}" if self.url else f"would be uploaded to {self.repo}: {what}"
        return [head, *(f"  {size / 1e6:9.2f} MB  {path}" for path, size in self.files)]


def push(
    folder: Path, name: str, *, private: bool = True, dry_run: bool = False, endpoint: str | None = None
) -> Upload:
    """Upload a model folder's files to the hub repository `name` (`organisation/model`, or `model` for one's own), made
    when it is not there.

    A new repository is private unless told otherwise: a model may remember the pictures that it was trained on, and
    making one public later takes a click. One that exists stays as it is, and to a public one nothing is sent unless
    `private` is false. The token comes from the environment variable HF_TOKEN alone. `dry_run` sends nothing and needs
    no token. `endpoint` is another hub's address; by default huggingface_hub's own (HF_ENDPOINT). Raises `InputError`
    for a name or a folder that cannot be, for a missing token, and for a public repository where a private one is
    wanted; `ExportError` when the hub refuses.
    """
    files = _files(folder)
    token = check_push(name, dry_run=dry_run)
    return Upload(name, private, files) if dry_run else _upload(folder, name, files, private, token, endpoint)


def check_push(name: str, *, dry_run: bool = False) -> str:
    """The token from the environment, empty where none is needed; `InputError` for what would fail after an hour of
    export: a name that cannot be, a token that is not set."""
    _check_name(name)
    token = os.environ.get(TOKEN, "").strip()
    if not token and not dry_run:
        raise InputError(f"--push {name}: set {TOKEN} to a token of the hub that may write; --dry-run needs none")
    return token


def _files(folder: Path) -> tuple[tuple[str, int], ...]:
    """The files of an export; hidden ones, and folders that others may have put there, stay at home."""
    files = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    names = {path.name for path in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"--push: {folder} is no exported Hugging Face folder (mpa-edge export --format hf makes one)")
    return tuple((path.name, path.stat().st_size) for path in files)


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push {name}: no name of a repository ({_one_line(error)})") from None


def _upload(
    folder: Path, name: str, files: tuple[tuple[str, int], ...], private: bool, token: str, endpoint: str | None
) -> Upload:
    from huggingface_hub import HfApi

    api: Any = HfApi(endpoint=endpoint, token=token, library_name="mpa-edge")
    try:
        repo = api.create_repo(name, private=private, exist_ok=True)
        # One that was there keeps its own visibility, and the hub does not say so by itself.
        is_private = bool(api.repo_info(repo.repo_id).private)
        if private and not is_private:
            raise InputError(f"--push {name}: that repository is public; name another one, or say --public")
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=[path for path, _ in files],
            commit_message=MESSAGE,
        )
    except InputError:
        raise
    except Exception as error:  # errors of the hub, of HTTP, of the network, of its upload library
        raise ExportError(f"--push {name}: the hub refused or cannot be reached ({_one_line(error)})") from error
    return Upload(name, is_private, files, str(repo))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
