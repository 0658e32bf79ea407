from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.audit import audit_run, pick, verdict_of, write_audit
from mpa_edge.datasets import Skipped
from mpa_edge.errors import RunError
from mpa_edge.parts import open_parts
from mpa_edge.records import Annotation, Case, Sample, write_rows

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
VERDICTS = ("parity", "agree", "agree", "unconfirmed", "error")


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of each card."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: list[tuple[str, str]] = []
        self.text = ""
        self._raw = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "article":
            self.cards.append((str(dict(attrs)["data-verdict"]), ""))

    def handle_data(self, data: str) -> None:
        if self._raw:
            return
        self.text += data
        if self.cards:
            verdict, text = self.cards[-1]
            self.cards[-1] = (verdict, text + data)

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""


def sample(folder: Path, number: int) -> Sample:
    path = folder / f"{number}.png"
    Image.new("RGB", (60 + number, 40), (number, 0, 0)).save(path)
    return Sample(f"s{number}", str(path), f"{number:064x}")


def annotation(number: int, reason: str | None = None) -> Annotation:
    return Annotation(f"s{number}-0", f"s{number}", f"What is {number}?", f"pseudo{number}", f"raw{number}", reason)


def case(number: int) -> Case:
    verdict = VERDICTS[number % len(VERDICTS)]
    teacher, student = float(verdict in ("parity", "agree")), float(verdict == "agree")
    why = "out_of_memory" if verdict == "error" else None
    texts = (f"What is {number}?", f"pseudo{number}", f"teacher{number}", f"student{number}")
    return Case(f"s{number}-0", f"s{number}", *texts, teacher, student, verdict, why)


def rejections(start: int) -> Iterator[Annotation]:
    for number in range(start, start + 8):
        yield annotation(number, "no_question" if number % 2 else "answer_too_long")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 28 pictures: 20 cases, 8 rejections."""
    folder = tmp_path / "my run"
    (folder / "pictures").mkdir(parents=True)
    samples = [sample(folder / "pictures", number) for number in range(28)]
    cases = [case(number) for number in range(20)]
    annotations = [*(annotation(number) for number in range(20)), *rejections(20)]
    write_rows(folder / "samples.jsonl", samples)
    write_rows(folder / "skipped.jsonl", [Skipped("x.jpg", "truncated", "why"), Skipped("y.jpg", "duplicate")])
    write_rows(folder / "parity.jsonl", [{"id": row.id} for row in cases if row.verdict == "parity"])
    for name, rows in (("annotations", annotations), ("cases", cases)):
        parts = open_parts(folder / name, type(rows[0]), {"stage": name}, count=3)
        for number in range(3):
            parts.fill(number, lambda known, rows=rows, number=number: rows[10 * number : 10 * number + 10])
    config = {"teacher": "big", "student": "small", "task": "reference", "select": "parity", "match": "paper"}
    (folder / "run.json").write_text(json.dumps({"config": config, "teacher": {"name": "The Big One"}}))
    return folder


def test_the_page_of_a_run(run: Path) -> None:
    page = Page(audit_run(run))
    assert Counter(verdict for verdict, _ in page.cards) == {
        "parity": 4, "agree": 8, "unconfirmed": 4, "error": 4, "rejected": 8,
    }  # fmt: skip
    words = " ".join(page.text.split())
    for text in ("my run", "The Big One teaches small", "the paper’s substring rule", "28 of 28 rows have a card"):
        assert text in words
    for label, count in (("usable pairs", 20), ("missed by the student", 4), ("no question", 4), ("truncated", 1)):
        assert re.search(rf"{label}\D{{0,60}}{count}\b", words)
    text = next(text for verdict, text in page.cards if "What is 5?" in text)
    assert all(part in text for part in ("pseudo5", "teacher5", "student5", "in the training set", "5.png"))
    assert sum("in the training set" in text for _, text in page.cards) == 4


def test_pictures_are_inside_and_nothing_is_fetched(run: Path) -> None:
    page = Page(audit_run(run))
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 28
    for source in images:
        data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(data)).height == 40
    links = [value for _, attributes in page.tags for key in ("src", "href") if (value := attributes.get(key))]
    assert all(value.startswith("data:") for value in links)
    style = (run / "audit.html").read_text(encoding="utf-8")
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in style
    assert "prefers-color-scheme: dark" in style


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    texts = (HOSTILE, f"{HOSTILE}\ud800", HOSTILE, HOSTILE)
    write_audit(
        tmp_path / "audit.html",
        samples=[Sample("s0", str(tmp_path / f"{HOSTILE[:20]}.png"), "0")],
        annotations=[Annotation("a", "s0", HOSTILE, HOSTILE, HOSTILE, HOSTILE), Annotation("b", "s0", HOSTILE, "", "")],
        cases=[Case("c", "s0", *texts, 0.3, 0.7, verdict, HOSTILE) for verdict in ("error", "parity", HOSTILE)],
        skipped=[Skipped(HOSTILE, HOSTILE, HOSTILE)],
    )
    page = Page(tmp_path / "audit.html")
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text.count(HOSTILE) > 10
    assert "picture not found" in page.text


def test_cards_are_spread_over_verdicts_and_reasons() -> None:
    cases = [case(number) for number in range(1000)]
    rejected = [annotation(number, "rare" if number < 1003 else "common") for number in range(1000, 1500)]
    rows = [*cases, *rejected]
    shown = pick(rows, 100)
    assert Counter(map(verdict_of, shown)) == dict.fromkeys(("parity", "agree", "unconfirmed", "error", "rejected"), 20)
    assert Counter(row.reason for row in shown if isinstance(row, Annotation)) == {"rare": 3, "common": 17}
    assert pick(list(reversed(rows)), 100) == shown
    assert len(pick(rows, 5000)) == 1500
    assert pick([], 100) == []


def test_scores_between_right_and_wrong_get_histograms(tmp_path: Path, run: Path) -> None:
    assert "Scores against" not in Page(audit_run(run)).text
    rows = [Case(f"{n}", "s", "q?", "a", "b", "c", n / 10, 1.0, "agree") for n in range(11)]
    write_audit(tmp_path / "audit.html", samples=[], annotations=[], cases=rows)
    text = Page(tmp_path / "audit.html").text
    assert "teacher, mean 0.50" in text
    assert "student, mean 1.00" in text


def test_favourite_questions(tmp_path: Path) -> None:
    texts = ["What time is it?"] * 6 + ["what time is it in this picture"] * 3 + ["Who?"]
    rows = [Annotation(f"{n}", f"s{n}", text, "10:10" if n < 5 else f"{n}", "") for n, text in enumerate(texts)]
    write_audit(tmp_path / "audit.html", samples=[], annotations=rows, cases=[])
    words = " ".join(Page(tmp_path / "audit.html").text.split())
    assert "What time is it?9 (90.0%)10:10 (5)" in words
    assert "Who?" not in words


def test_an_empty_run_has_a_page_and_no_run_is_an_error(tmp_path: Path) -> None:
    write_audit(tmp_path / "audit.html", samples=[], annotations=[], cases=[])
    assert "none yet" in Page(tmp_path / "audit.html").text
    with pytest.raises(RunError, match="no run folder"):
        audit_run(tmp_path)
