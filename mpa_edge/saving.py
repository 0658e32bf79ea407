"""The training set for other trainers, beside ours.

    llava      [{"id", "image", "conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value"}]}]
               LLaVA, the paper's code, Qwen-VL-Series-Finetune
    sharegpt   [{"messages": [{"role", "content": "<image>Q"}, …], "images": [path]}]
               LLaMA-Factory (`dataset_dir` is the run folder, `dataset` the file's stem), ms-swift

Each marker `<image>` stands for one picture; trainers count them. Pictures are named by absolute paths: every one of
these trainers takes those as they are, while relative ones depend on its own folder setting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpa_edge.config import SaveAs
from mpa_edge.records import write_atomic, write_pieces

INFO = "dataset_info.json"
# What trainers take for a picture, a film or a sound, wherever it stands.
_MARKERS = re.compile(r"<(image|video|audio)>", re.IGNORECASE)
# How LLaMA-Factory reads the file: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
_SHAREGPT = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


def save_for_trainers(parity: Path, formats: Iterable[SaveAs]) -> list[Path]:
    """Write a training set in these formats beside it (`parity.jsonl` -> `parity.llava.json`), each file whole or not
    at all, and return their paths. Files of the other formats that an earlier call wrote of this set are deleted: they
    would be of another selection."""
    written, formats = [], list(dict.fromkeys(formats))
    _delete_others(parity, formats)
    for name in formats:
        path = _path(parity, name)
        write_pieces(path, _json_list(_FORMATS[name](example) for example in _examples(parity)))
        written.append(path)
        if name == "sharegpt":
            write_atomic(parity.with_name(INFO), _info(path))
    return written


def _json_list(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """A JSON list with a row per line."""
    yield b"[\n"
    between = ""
    for row in rows:
        yield (between + json.dumps(row, ensure_ascii=False)).encode()
        between = ",\n"
    yield b"\n]\n"


def _path(parity: Path, name: str) -> Path:
    return parity.with_suffix(f".{name}.json")


def _info(path: Path) -> str:
    return json.dumps({path.stem: {"file_name": path.name, **_SHAREGPT}}, indent=2) + "\n"


def _delete_others(parity: Path, formats: Iterable[str]) -> None:
    for name in _FORMATS.keys() - set(formats):
        path, info = _path(parity, name), parity.with_name(INFO)
        path.unlink(missing_ok=True)
        if name == "sharegpt" and info.is_file() and info.read_bytes() == _info(path).encode():
            info.unlink()


@dataclass(frozen=True)
class _Example:
    id: str
    image: str
    prompt: str
    answer: str


def _examples(parity: Path) -> Iterator[_Example]:
    with parity.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt, answer = (turn["content"][-1]["text"] for turn in row["messages"])
            picture = (parity.parent / row["images"][0]).resolve().as_posix()
            yield _Example(row["id"], picture, _plain(prompt), _plain(answer))


def _llava(example: _Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "image": example.image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{example.prompt}"},
            {"from": "gpt", "value": example.answer},
        ],
    }


def _sharegpt(example: _Example) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"<image>{example.prompt}"},
            {"role": "assistant", "content": example.answer},
        ],
        "images": [example.image],
    }


_FORMATS = {"llava": _llava, "sharegpt": _sharegpt}


def _plain(text: str) -> str:
    """Text in which nothing looks like the marker of a picture."""
    return _MARKERS.sub(r"\1", text)
