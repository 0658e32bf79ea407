"""What a benchmark's worker is given and what it writes: questions, rows, and the files that hold them.

FOLDER/answers.jsonl   one row per question: key, text, tokens, timings, …
FOLDER/latency.jsonl   one row per timed picture
FOLDER/fixed.jsonl     the same with answers of one length, where that was asked for
FOLDER/measured.json   written last: what the model says of itself, load time, memory, energy, the machine's state
FOLDER/error.json      instead, when the model failed

Each row, and measured.json, holds a checksum: what a kill tore off or a disk changed is measured again, nothing else.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpa_edge.bundle import MANIFEST
from mpa_edge.chat_address import is_address
from mpa_edge.errors import ImageError
from mpa_edge.fake import PREFIX as FAKE
from mpa_edge.records import Record, write_atomic
from mpa_edge.runtime.vlm import Answer

ANSWERS, LATENCY, FIXED, MEASURED = "answers.jsonl", "latency.jsonl", "fixed.jsonl", "measured.json"
ERROR = "error.json"
CHECK = "check"
Say = Callable[[str, int, int], None]  # phase, done, of


@dataclass(frozen=True)
class Ask(Record):
    """A question as a model gets it. `key` names the picture's content and the prompt."""

    key: str
    image: str
    prompt: str


@dataclass(frozen=True)
class Row(Record):
    """One answer. `wall_ms` is the caller's clock around a call of one picture; None for a batch."""

    key: str
    text: str
    n_tokens: int
    prompt_tokens: int | None
    finish_reason: str
    error: str | None
    timings: dict[str, float | None]
    wall_ms: float | None = None


@dataclass(frozen=True)
class Job(Record):
    """What a worker does. `fixed_length` also times answers of exactly so many tokens; `keep_timings` keeps those that
    other work disturbed, which are taken again otherwise."""

    name: str
    spec: str
    threads: int
    max_new_tokens: int
    batch_size: int
    warm_up: list[dict[str, Any]]
    latency: list[dict[str, Any]]
    accuracy: list[dict[str, Any]]
    device: str = "auto"
    fixed_length: int | None = None
    keep_timings: bool = False
    trust_remote_code: bool = False


def asks(rows: Sequence[dict[str, Any]]) -> list[Ask]:
    """The job's questions."""
    return [Ask.from_json(row) for row in rows]


def is_bundle(spec: str) -> bool:
    """Whether an exported bundle lies there."""
    return (Path(spec) / MANIFEST).is_file()


def takes_length(spec: str) -> bool:
    """Whether the length of its answers can be set: of what runs in our process, and not of a chat server's."""
    return not (spec.startswith(FAKE) or is_address(spec))


def unanswered(error: ImageError) -> Answer:
    """The answer to a picture that cannot be read."""
    return Answer("", finish_reason="error", error=f"picture {error.reason}")


def row_of(ask: Ask, answer: Answer, wall_ms: float | None = None) -> Row:
    """The row of an answer."""
    return Row(
        ask.key,
        answer.text,
        len(answer.tokens),
        answer.prompt_tokens,
        answer.finish_reason,
        answer.error,
        asdict(answer.timings),
        wall_ms,
    )


def whole_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file. Lines that a kill tore off or a disk changed are left out, and
    cut out of the file; those without a checksum, of an older version, are taken as they are."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    found = [(line, unsealed(line)) for line in lines]
    if any(content is None for _, content in found):
        write_atomic(path, b"".join(line for line, content in found if content is not None))
    return [Row.from_json(content) for _, content in found if content is not None]


def lines_of(rows: Iterable[Row]) -> str:
    """Rows as JSONL, each line with a checksum."""
    return "".join(sealed(row.to_json()) + "\n" for row in rows)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file, or a damaged one."""
    return unsealed(path.read_bytes().strip() + b"\n") or {} if path.is_file() else {}


def sealed(content: dict[str, Any], indent: int | None = None) -> str:
    """JSON with a checksum of all else in it."""
    return json.dumps({**content, CHECK: _check(content)}, indent=indent, ensure_ascii=False)


def unsealed(line: bytes) -> dict[str, Any] | None:
    """The content of a whole line; None for one that is torn off or damaged."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(content, dict) or content.pop(CHECK, _check(content)) != _check(content):
        return None
    return content


def _check(content: dict[str, Any]) -> str:
    plain = {key: value for key, value in content.items() if key != CHECK}
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"
