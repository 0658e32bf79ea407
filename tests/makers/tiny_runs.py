"""The files of a run without models, written in a moment, and its audit page, read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from mpa_edge.config import AlignConfig
from mpa_edge.records import Annotation, Case, Record, Sample, write_rows
from mpa_edge.scan_index import Skipped

VERDICTS = ("parity", "agree", "agree", "unconfirmed", "error")
CONFIG = AlignConfig(images="photos", teacher="big", student="small", task="textvqa", match="paper", votes=3)


class Page(HTMLParser):
    """The elements of a page with their attributes, the text in and outside of cards."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: list[dict[str, str]] = []
        self.text = ""
        self._raw = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "article":
            data = {key.removeprefix("data-"): str(value) for key, value in attrs if key.startswith("data-")}
            self.cards.append({**data, "text": ""})

    def handle_data(self, data: str) -> None:
        if self._raw:
            return
        self.text += f"{data} "
        if self.cards:
            self.cards[-1]["text"] += f"{data} "

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def count(self, **wanted: str) -> int:
        """The number of cards with these data attributes."""
        return sum(all(card[key] == value for key, value in wanted.items()) for card in self.cards)


def sample(folder: Path, number: int) -> Sample:
    path = folder / f"{number}.png"
    Image.new("RGB", (60 + number, 40), (number, 0, 0)).save(path)
    return Sample(f"s{number}", str(path), f"{number:064x}")


def annotation(number: int, reason: str | None = None) -> Annotation:
    return Annotation(f"s{number}-0", f"s{number}", f"What is {number}?", f"pseudo{number}", f"raw{number}", reason)


def rejections(start: int) -> list[Annotation]:
    return [annotation(n, "no_question" if n % 2 else "answer_too_long") for n in range(start, start + 8)]


def case(number: int, verdict: str = "") -> Case:
    verdict = verdict or VERDICTS[number % len(VERDICTS)]
    scores = float(verdict in ("parity", "agree", "blind")), float(verdict == "agree")
    why = "student: out_of_memory" if verdict == "error" else None
    texts = (f"What is {number}?", f"pseudo{number}", f"teacher{number}", f"student{number}")
    return Case(f"s{number}-0", f"s{number}", *texts, *scores, verdict, why)


def trained(case: Case) -> dict[str, Any]:
    turn = {"role": "assistant", "content": [{"type": "text", "text": f"target of {case.teacher_answer}"}]}
    return {"id": case.id, "verdict": case.verdict, "messages": [{"role": "user", "content": []}, turn]}


def put_parts(folder: Path, rows: Sequence[Record], size: int = 10) -> None:
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    for number, part in enumerate(parts):
        write_rows(folder / f"part-{number:05d}.jsonl", part)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").write_text(json.dumps({"fingerprint": {}, "parts": len(parts)}))


def put_run(
    folder: Path,
    *,
    samples: Sequence[Sample] = (),
    skipped: Sequence[Skipped] = (),
    annotations: Sequence[Annotation] = (),
    rounds: Sequence[Sequence[Case]] = (),
    collapsed: Callable[[Case], bool] = lambda case: False,
    chosen: Callable[[Case], bool] = lambda case: case.verdict == "parity",
    **run: Any,
) -> Path:
    """Write the files of a run as the pipeline does."""
    write_rows(folder / "samples.jsonl", samples)
    write_rows(folder / "skipped.jsonl", skipped)
    put_parts(folder / "annotations", annotations)
    for number, cases in enumerate(rounds, 1):
        suffix = "" if number == len(rounds) else f"-round-{number}"
        put_parts(folder / f"cases{suffix}", cases)
        write_rows(folder / f"collapsed{suffix}.jsonl", ({"id": row.id} for row in cases if collapsed(row)))
        write_rows(folder / f"parity{suffix}.jsonl", (trained(row) for row in cases if chosen(row)))
    config = {**CONFIG.to_json(), "rounds": max(1, len(rounds))}
    content = {"tool": "mpa-edge 9.9", "versions": {"torch": "2.0"}, "config": config, "stages": {}, **run}
    (folder / "run.json").write_text(json.dumps(content))
    return folder
