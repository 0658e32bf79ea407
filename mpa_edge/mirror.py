"""A second home for what the models were asked: `--mirror s3://BUCKET/RUN`, or any other place that fsspec reaches.

What lies there are the parts of the annotations and of each round's cases, each copied when it is done: the nights of
GPU time, so that they outlive this machine. The same command with the same `--mirror` on another machine fetches
them and goes on. Everything reads the copy in the run's folder: a million pictures are a few gigabytes of parts, which
selection reads several times, and a bucket would be asked for each of thousands of parts each time. The lock, the
pictures (mount the bucket) and the student, which is made anew from the parts in hours, stay on this machine.

Where the two differ, what lies in the mirror counts. A part is whole there or absent, as it is here: object stores put
files so, local paths (NFS too) are renamed into place, other stores get a temporary file that is moved. What a store
tore nevertheless is found by the part's digest, and made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpa_edge.config import IN_FILES
from mpa_edge.errors import AGAIN, FingerprintMismatch, InputError, RunError
from mpa_edge.parts import DIGEST, STAGE, compare_fingerprints, is_damaged, stage_in
from mpa_edge.passwords import holds_secret
from mpa_edge.progress import say
from mpa_edge.records import write_atomic
from mpa_edge.run_events import without_secrets

# The digest goes before its part, and the note of failed rows before both: see `mpa_edge.parts`.
OURS = re.compile(r"stage\.json|part-\d{5,}\.(failed|sha256|jsonl)")
ORDER = (".failed", ".sha256", ".jsonl")
# A file that is put there appears in one step.
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"))


class Mirror:
    """The copies of some stages' folders below `url`; `stages` maps their names there to the folders here.

    Raises `InputError` for a place that cannot be, and `RunError` when it cannot be reached.
    """

    def __init__(self, url: str, stages: Mapping[str, Path]) -> None:
        self._fs, root = _store(url)
        self._url, self._stages = url, dict(stages)
        self._roots = {name: f"{root.rstrip('/')}/{name}" for name in stages}
        # What is the same on both sides: the size and time of the file here.
        self._same: dict[Path, tuple[int, int]] = {}
        self._there: dict[str, dict[str, int]] = {}
        self._behind = False

    def check(self, fingerprints: Mapping[str, Mapping[str, Any]], *, drop: bool = False) -> None:
        """See what lies there: `RunError` when that is of other settings than these, by stage. Nothing is written; with
        `drop` what is of other settings is deleted there instead."""
        for stage, fingerprint in fingerprints.items():
            self._there[stage] = self._list(stage)
            other = self._other_settings(stage, json.loads(json.dumps(fingerprint)))  # as it will read back
            if other and drop:
                say(f"--mirror {self._url}: what lies in {stage} {other}; it is deleted there, and asked again")
                self._delete(stage, self._there[stage])
            elif other:
                raise self._refusal(stage, other)

    def fetch(self) -> int:
        """After `check`: copy to here what is there and not the same; returns the number of files."""
        count = 0
        for stage, folder in self._stages.items():
            groups = sorted({name.partition(".")[0] for name in self._there[stage]} - {"stage"})
            for group in ("stage", *groups):
                count += self._fetch_group(stage, folder, group)
        return count

    def clear(self) -> None:
        """Delete there what lies there of this folder's run, and nothing else; `RunError` where it is another one's."""
        there = {stage: self._list(stage) for stage in self._stages}
        # The first stage goes last, and its settings last of all: whoever is stopped meanwhile can do it again.
        stage, folder = next(iter(self._stages.items()))
        ours = (folder / STAGE).read_bytes() if (folder / STAGE).is_file() else None
        if any(there.values()) and (STAGE not in there[stage] or self._read(stage, STAGE) != ours):
            raise RunError(
                f"--mirror {self._url}: what lies there is not what {folder.parent} holds; --fresh would delete it. "
                "Leave --fresh away to go on from there, use another --mirror, or delete it yourself."
            )
        for stage in reversed(self._stages):
            self._delete(stage, there[stage])

    def keep(self, number: int) -> None:
        """Copy a part to there, where it is not the same; without a connection a line, and later."""
        try:
            names = (STAGE, *(f"part-{number:05d}{suffix}" for suffix in ORDER))
            paths = [(stage, folder / name) for stage, folder in self._stages.items() for name in names]
            # What is gone here goes there last, of both stages: a note says that the part is to be looked at again.
            for stage, path in sorted(paths, key=lambda one: not one[1].exists()):
                self._keep(stage, path)
        except RunError as error:
            if not self._behind:
                say(f"warning: {without_secrets(str(error))} The parts are kept here, and copied when that works again")
            self._behind = True

    def settle(self, parts: int) -> None:
        """Copy what could not be copied before; `RunError` when that fails again."""
        if self._behind:
            self._behind = False
            for number in range(parts):
                self.keep(number)
        if self._behind:
            raise RunError(f"--mirror {self._url} cannot be written. What is finished is kept: {AGAIN} to go on.")

    def _delete(self, stage: str, names: Iterable[str]) -> None:
        for name in sorted(names, key=lambda name: name == STAGE):
            self._do(self._fs.rm_file, f"{self._roots[stage]}/{name}")
        self._there[stage] = {}

    def _other_settings(self, stage: str, now: Mapping[str, Any]) -> str | None:
        """In which settings what lies there differs; None where it is of these, or there is nothing. `RunError` where
        nobody can tell."""
        if not self._there[stage]:
            return None
        if STAGE not in self._there[stage]:
            raise self._refusal(stage, f"lacks its {STAGE}: nobody knows how it was made")
        try:
            compare_fingerprints(Path(stage), stage_in(self._read(stage, STAGE))["fingerprint"], now)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._refusal(stage, f"cannot be used: {STAGE} is damaged ({error})") from error
        except FingerprintMismatch as error:
            pairs = sorted(error.differences.items())
            return "is of other settings ({})".format("; ".join(f"{k}: there {t!r}, here {h!r}" for k, (t, h) in pairs))
        return None

    def _refusal(self, stage: str, why: str) -> RunError:
        # No word of --fresh: that would delete there what may be another run's.
        return RunError(f"--mirror {self._url}: what lies in {stage} {why}. Use another --mirror.")

    def _fetch_group(self, stage: str, folder: Path, group: str) -> int:
        """One part with its digest and its note, or the stage's settings; a part only if its digest is not the same."""
        there, count = self._there[stage], 0
        for name in (f"{group}{suffix}" for suffix in (".json", *ORDER) if f"{group}{suffix}" in there):
            path = folder / name
            # Its digest is the same by now.
            known = name.endswith(".jsonl") and f"{group}{DIGEST}" in there and _size(path) == there[name]
            if not known or is_damaged(path):
                content = self._read(stage, name)
                if not path.is_file() or path.read_bytes() != content:
                    write_atomic(path, content)
                    count += 1
            self._same[path] = _state(path)
        return count

    def _read(self, stage: str, name: str) -> bytes:
        content: bytes = self._do(self._fs.cat_file, f"{self._roots[stage]}/{name}")
        return content

    def _keep(self, stage: str, path: Path) -> None:
        there = f"{self._roots[stage]}/{path.name}"
        if not path.exists():
            if self._there[stage].pop(path.name, None) is not None:
                self._do(self._fs.rm_file, there)
            return
        if self._same.get(path) != (state := _state(path)):
            self._do(self._put, there, path.read_bytes())
            self._same[path], self._there[stage][path.name] = state, state[0]

    def _put(self, path: str, content: bytes) -> None:
        names = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        if "file" in names:
            write_atomic(Path(path), content)
        elif OBJECT_STORES & set(names):
            self._fs.pipe_file(path, content)
        else:
            folder, _, name = path.rpartition("/")
            self._fs.makedirs(folder, exist_ok=True)
            self._fs.pipe_file(f"{folder}/.{name}.tmp", content)
            self._fs.mv(f"{folder}/.{name}.tmp", path)

    def _list(self, stage: str) -> dict[str, int]:
        """The sizes of a stage's files there, by name."""
        try:
            found = self._fs.ls(self._roots[stage], detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise self._broken(error) from error
        sizes = {str(one["name"]).rsplit("/", 1)[-1]: int(one["size"] or 0) for one in found}
        return {name: size for name, size in sizes.items() if OURS.fullmatch(name)}

    def _do(self, action: Any, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except Exception as error:  # each store's client has errors of its own
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> RunError:
        return RunError(f"--mirror {self._url}: {type(error).__name__} ({str(error)[:200]}).")


def require_mirror(url: str) -> None:
    """As opening a `Mirror`: said before models are loaded and pictures are looked at."""
    fs, _ = _store(url)
    fs.clear_instance_cache()  # a connection that waits as long as that takes may be closed by the other side


def _store(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    import fsspec

    if holds_secret(url):
        raise InputError(f"--mirror: {IN_FILES}")
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # which names the package to install
        raise InputError(f"--mirror {url}: {error}") from error
    except Exception as error:  # some clients connect at once
        raise RunError(
            f"--mirror {url}: cannot be opened ({type(error).__name__}: {str(error)[:200]}). Check the address, and "
            "that this machine reaches it, or use another --mirror, such as s3://BUCKET/RUN or a folder."
        ) from error
    return fs, str(root)


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
