"""A model that is asked everything once: answers are kept in a file and given again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mpa_edge.fake import picture_digest
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding, Vlm


class MemoVlm:
    """A `Vlm` in front of another one. Its answers have no timings and no tokens: nothing is measured through it.

    Only right for models whose answer depends on picture, prompt and decoding alone, as all of ours do. The file is
    JSON lines, written on; a line that a killed process tore is asked again. One process at a time.
    """

    def __init__(self, vlm: Vlm, path: Path) -> None:
        self.name, self.engine, self._vlm, self._path = vlm.name, vlm.engine, vlm, path
        self._described = vlm.describe()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = dict(_read(path))

    @property
    def batch_size(self) -> int:
        """The model's."""
        return int(getattr(self._vlm, "batch_size", 1))

    def answer(self, images: Sequence[Image], prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[Answer]:
        """As `Vlm.answer`; only what is not in the file reaches the model."""
        keys = [self._key(*pair, decoding) for pair in zip(images, prompts, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in self._known}
        found: dict[str, dict[str, Any]] = {}
        if new:
            asked = self._vlm.answer([images[p] for p in new.values()], [prompts[p] for p in new.values()], decoding)
            with self._path.open("a", encoding="utf-8") as file:
                for key, answer in zip(new, asked, strict=True):
                    row = {"key": key, "text": answer.text, "finish": answer.finish_reason, "error": answer.error}
                    found[key] = row
                    if answer.error is None:  # what failed once may answer the next time
                        self._known[key] = row
                        file.write(json.dumps(row) + "\n")
        rows = [self._known.get(key) or found[key] for key in keys]
        return [Answer(row["text"], finish_reason=row["finish"], error=row["error"]) for row in rows]

    def describe(self) -> dict[str, Any]:
        """The model's, as it was when this object was made."""
        return self._described

    def close(self) -> None:
        """The model is not ours to close."""

    def _key(self, image: Image, prompt: str, decoding: Decoding) -> str:
        asked = json.dumps([self._described, picture_digest(image), prompt, asdict(decoding)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:32]


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text and not text.endswith("\n"):
        with path.open("a") as file:
            file.write("\n")  # what is written next must not continue a torn line
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            rows.append((str(row["key"]), {name: row[name] for name in ("text", "finish", "error")}))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return rows
