"""The audit page: its counts, its cards, its looks."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
import subprocess
import tracemalloc
from collections import Counter
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpa_edge.audit import audit_run
from mpa_edge.errors import RunError
from mpa_edge.records import Annotation, Case, Sample, write_rows
from mpa_edge.scan_index import Skipped
from mpa_edge.tasks import task_named
from tiny_runs import Page, annotation, case, put_parts, put_run, rejections, sample, trained

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 28 pictures: 20 cases, 8 rejections."""
    (tmp_path / "pictures").mkdir()
    return put_run(
        tmp_path / "my run",
        samples=[sample(tmp_path / "pictures", number) for number in range(28)],
        skipped=[Skipped("x.jpg", "truncated", "why"), *(Skipped(f"{n}.jpg", "in_test") for n in range(3))],
        annotations=[*(annotation(number) for number in range(20)), *rejections(20)],
        rounds=[[case(number) for number in range(20)]],
        collapsed=lambda row: row.id == "s0-0",
        chosen=lambda row: (row.verdict == "parity" and row.id != "s0-0") or row.id in ("s1-0", "s2-0"),
        teacher={"name": "The Big One", "engine": "chat"},
        task=task_named("textvqa").to_json(),
    )


# --- counts ----------------------------------------------------------------------------------------------------------


def test_the_road_of_counts(run: Path) -> None:
    page = Page(audit_run(run))
    for label, count in {
        "files found": "32",
        "pictures used": "28 87.5% 3 in test",
        "pairs that the teacher wrote": "28",
        "usable pairs": "20 71.4% 4 answer too long",
        "confirmed by the teacher": "12 60.0% 4 unconfirmed",
        "missed by the student": "4 33.3% 8 agree",
        "rows in the training set": "5",
    }.items():
        assert f"{label} {count} " in page.words
    for text in ("1 truncated", "4 no question", "4 student: out_of_memory", "3 parity + 2 agree", "1 collapsed"):
        assert text in page.words
    assert "Round" not in page.words
    assert "28 of 28 rows have a card" in page.words


def test_each_round_has_its_counts_and_the_cards_are_those_of_the_last(tmp_path: Path) -> None:
    first = [case(number, "parity") for number in range(4)]
    second = [first[0], *(replace(row, verdict="agree", student_answer="learned") for row in first[1:])]
    level = {"before": {"holdout_exact": 0.25}, "best": {"holdout_exact": 0.5}}
    put_run(tmp_path, annotations=[*map(annotation, range(4))], rounds=[first, second], stages={"level": level})
    page = Page(audit_run(tmp_path))
    assert "Round 1 confirmed by the teacher 4 100.0% missed by the student 4 100.0%" in page.words
    assert "Round 2 confirmed by the teacher 4 100.0% missed by the student 1 25.0% 3 agree" in page.words
    assert "4 parity; held-out rows right to the letter: 25.0% before training, 50.0% after" in page.words
    assert page.count(verdict="agree") == 3
    assert sum("learned" in card["text"] for card in page.cards) == 3
    assert "mpa-edge export" not in page.words  # the last round has not been trained
    (tmp_path / "cases" / "part-00000.jsonl").unlink()  # asked in part, when the run was killed
    words = Page(audit_run(tmp_path, rounds=1)).words
    assert "Round" not in words
    assert "missed by the student 4 100.0%" in words
    put_run(tmp_path, annotations=[*map(annotation, range(4))], rounds=[first], stages={"level": level})
    assert "mpa-edge export . --format gguf" in Page(audit_run(tmp_path)).words


def test_pictures_shared_with_the_test_and_used_are_told(tmp_path: Path) -> None:
    put_run(tmp_path, samples=[Sample("s0", "x.png", "0")], stages={"samples": {"shared": 1}})
    assert "1 of them shared with the test set" in Page(audit_run(tmp_path)).words


def test_what_has_no_rows_yet_has_a_page_and_no_run_is_an_error(tmp_path: Path) -> None:
    assert "none yet" in Page(audit_run(put_run(tmp_path / "run"))).text
    with pytest.raises(RunError, match="no run folder"):
        audit_run(tmp_path)


def test_a_training_set_in_another_order_is_an_error(tmp_path: Path) -> None:
    rows = [case(0), case(5)]
    put_run(tmp_path, rounds=[rows])
    write_rows(tmp_path / "parity.jsonl", map(trained, reversed(rows)))
    with pytest.raises(RunError, match="s0-0 is none of the cases, or not in their order"):
        audit_run(tmp_path)


def test_favourites_on_the_page(tmp_path: Path) -> None:
    rows = [replace(case(n), question="What time is it?", answer="10:10") for n in range(30)]
    put_run(tmp_path, rounds=[rows], collapsed=lambda row: int(row.sample_id[1:]) >= 20)
    words = Page(audit_run(tmp_path)).words
    assert "1 different questions among 30" in words
    assert "dropped 10 of them (33.3%)" in words
    assert "What time is it? 10:10 (30) 30 100.0% 10" in words


# --- cards and filters -----------------------------------------------------------------------------------------------


def test_cards_carry_what_the_filters_read(run: Path) -> None:
    page = Page(audit_run(run))
    assert Counter(card["verdict"] for card in page.cards) == {
        "parity": 4, "agree": 8, "unconfirmed": 4, "error": 4, "rejected": 8,
    }  # fmt: skip
    assert page.count(trained="yes") == 5
    assert page.count(verdict="agree", trained="yes") == 2
    assert page.count(verdict="parity", reason="collapsed", trained="no") == 1
    assert page.count(verdict="rejected", reason="no_question", trained="no") == 4
    assert page.count(verdict="error", reason="student: out_of_memory") == 4
    chips = [tag["value"] for name, tag in page.tags if name == "input" and tag.get("name") == "verdict"]
    assert chips == ["", "parity", "agree", "unconfirmed", "error", "rejected"]
    reasons = {tag["value"] for name, tag in page.tags if name == "option"} - {"", "yes", "no"}
    assert reasons == {"answer_too_long", "collapsed", "no_question", "student: out_of_memory"}
    form = next(tag for name, tag in page.tags if name == "form")
    assert "hidden" in form  # without JavaScript there is a plain list


def test_a_card_tells_all_about_its_row(run: Path) -> None:
    page = Page(audit_run(run))
    (text,) = (card["text"] for card in page.cards if "What is 5?" in card["text"])
    for part in ("pseudo5", "teacher5", "student5", "target of teacher5", "in the training set", "5.png"):
        assert part in text
    assert re.search(r"teacher5\s+right\s+✓\s+Student\s+student5\s+wrong\s+✗", text)
    (text,) = (card["text"] for card in page.cards if "What is 21?" in card["text"])
    assert "raw21" in text
    assert "Student" not in text
    (text,) = (card["text"] for card in page.cards if "What is 4?" in card["text"])
    assert "right" not in text  # nobody knows: a model did not answer


def test_votes_and_the_answer_without_the_picture(tmp_path: Path) -> None:
    votes = ("red", "blue", "red")
    voted = replace(case(1, "blind"), votes=votes, teacher_score=2 / 3, blind_answer="guessed")
    lost = replace(case(2, "unconfirmed"), votes=("a", "b"), teacher_score=0.5)
    put_run(tmp_path, rounds=[[voted, lost]])
    page = Page(audit_run(tmp_path))
    first, second = (" ".join(card["text"].split()) for card in sorted(page.cards, key=lambda card: card["verdict"]))
    assert "red ×2 , blue right 2 of 3" in first
    assert "No picture guessed" in first
    assert "a , b wrong 1 of 2" in second
    assert "No picture" not in second
    assert page.count(verdict="blind") == 1
    assert "1 blind the teacher gives its answer without the picture too" in page.words


def test_settings(run: Path) -> None:
    words = Page(audit_run(run)).words
    for text in (
        "The Big One teaches small · task textvqa · right by the paper’s substring rule",
        "The Big One teacher · engine chat",
        "Write one question that can only be answered by reading",
        "{question} Answer the question using a single word or phrase.",
        "--seed 0",
        "mpa-edge 9.9 ",
        "torch 2.0",
    ):
        assert text in words
    html = (run / "audit.html").read_text(encoding="utf-8")
    assert re.search(r'<div class="changed"><dt>--votes</dt><dd dir="auto">3<', html)
    assert re.search(r"<div><dt>--seed</dt>", html)
    assert "--out" not in words


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    texts = (HOSTILE, f"{HOSTILE}\udcff", HOSTILE, HOSTILE)
    more: dict[str, Any] = {"votes": (HOSTILE, "x"), "blind_answer": HOSTILE}
    verdicts = ("error", "parity", HOSTILE)
    rows = [Case(f"c{n}", "s0", *texts, 0.3, 0.7, name, HOSTILE, **more) for n, name in enumerate(verdicts)]
    put_run(
        tmp_path,
        samples=[Sample("s0", str(tmp_path / f"{HOSTILE[:20]}.png"), "0")],
        skipped=[Skipped(HOSTILE, HOSTILE, HOSTILE)],
        annotations=[Annotation("a", "s0", HOSTILE, HOSTILE, HOSTILE, HOSTILE), Annotation("b", "s0", "", "", "")],
        rounds=[],
        teacher={"name": HOSTILE, "engine": HOSTILE},
        task={"name": HOSTILE, "annotate_prompts": [HOSTILE], "question_template": HOSTILE, "metric": HOSTILE},
    )
    # A surrogate cannot be written as UTF-8; escaped in JSON it can come back from a file.
    put_parts(tmp_path / "cases", [])
    (tmp_path / "cases" / "stage.json").write_text('{"fingerprint": {}, "parts": 1}')
    (tmp_path / "cases" / "part-00000.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    write_rows(tmp_path / "parity.jsonl", [{**trained(rows[1]), "verdict": HOSTILE}])
    page = Page(audit_run(tmp_path))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text.count(HOSTILE) > 20
    assert page.count(verdict=HOSTILE, reason=HOSTILE) == 1
    assert "picture not found" in page.text


# --- one file, small, the same every time ----------------------------------------------------------------------------


def test_pictures_are_inside_and_nothing_is_fetched(run: Path) -> None:
    page = Page(audit_run(run))
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 28
    for source in images:
        data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(data)).height == 40
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "base")]
    addresses = [value for _, tag in page.tags for key in ("src", "href", "action") if (value := tag.get(key))]
    assert all(value.startswith("data:") for value in addresses)
    text = (run / "audit.html").read_text(encoding="utf-8")
    for fetching in ("url(", "@import", "http:", "https:", "fetch(", "XMLHttpRequest"):
        assert fetching not in text
    assert "default-src 'none'" in text


def test_a_page_of_noisy_photos_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    Image.frombytes("RGB", (640, 480), random.Random(0).randbytes(640 * 480 * 3)).save(path, compress_level=1)
    texts = [replace(annotation(n, "unfinished"), sample_id="s", raw="on and on " * 10_000) for n in range(20)]
    put_run(tmp_path, samples=[Sample("s", str(path), "0")], annotations=texts)
    assert audit_run(tmp_path).stat().st_size < 20 * 27_000 + 60_000  # less than 5.5 MB with 200 cards


def test_the_page_is_the_same_whatever_the_order_of_rows(tmp_path: Path) -> None:
    cases = [replace(case(n), question=f"What is {n % 7}?", answer="same") for n in range(300)]
    annotations = [*map(annotation, range(300)), *rejections(300)]
    pages = []
    for number in range(2):
        random.Random(number).shuffle(cases)
        random.Random(number).shuffle(annotations)
        folder = put_run(tmp_path / f"{number}" / "run", annotations=annotations, rounds=[cases])
        pages.append(audit_run(folder, limit=50).read_bytes())
    assert pages[0] == pages[1]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        folder, long = put_run(tmp_path / f"{count}"), 5000
        put_parts(folder / "annotations", [replace(annotation(n, "no_answer"), raw="x" * long) for n in range(count)])
        put_parts(folder / "cases", [replace(case(n), teacher_answer="x" * long) for n in range(count)])
        tracemalloc.start()
        audit_run(folder, limit=12)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    audit_run(put_run(tmp_path / "warm"))  # compiles the templates
    assert peak(600) - peak(150) < 450 * 5000 / 4


# --- looks -----------------------------------------------------------------------------------------------------------


def test_colours_have_enough_contrast(run: Path) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for the borders of controls."""
    text = audit_run(run).read_text(encoding="utf-8")
    themes = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert len(themes) == 2
    assert "screen and (prefers-color-scheme: dark)" in text
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        tones = ("parity", "agree", "unconfirmed", "blind", "error", "rejected", "other")
        for ink in ("ink", "soft", *tones):
            assert contrast(colours[ink], colours["sheet"]) >= 4.5, ink
        for ground in ("page", "well"):
            assert contrast(colours["soft"], colours[ground]) >= 4.5
        assert all(contrast(colours["on"], colours[tone]) >= 4.5 for tone in tones)
        assert all(contrast(colours["edge"], colours[ground]) >= 3 for ground in ("page", "sheet"))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


PROBE = """
const inner = document.querySelector("iframe"), found = [];
inner.onload = () => {
  const page = inner.contentDocument, form = page.getElementById("filters");
  const visible = () => page.querySelectorAll(".card:not([hidden])").length;
  const look = () => found.push(page.getElementById("found").value, visible(), form.querySelector("output").value);
  const set = (name, value) => { form.elements[name].value = value; form.dispatchEvent(new Event("input")); look(); };
  found.push(form.hidden, page.documentElement.scrollWidth);
  look();
  set("verdict", "agree");
  set("trained", "yes");
  set("words", "WHAT  teacher2");
  set("reason", "no_question");
  found.push(page.getElementById("nothing").hidden);
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
};
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_filters_in_a_browser_on_a_phone(run: Path, tmp_path: Path) -> None:
    text = audit_run(run).read_text(encoding="utf-8")
    probe = tmp_path / "probe.html"
    inner = f'<iframe width="360" height="700" style="border: 0" srcdoc="{escape(text)}"></iframe>'
    probe.write_text(f"<!doctype html><body>{inner}<script>{PROBE}</script>", encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'chromium'}",
    ]
    command += ["--virtual-time-budget=20000", "--dump-dom", probe.as_uri()]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r"<pre>(.*?)</pre>", shown, re.DOTALL)[1])  # type: ignore[index]
    assert found[:2] == [False, 360]  # the filters are shown, and nothing is wider than the phone
    assert found[2:] == [
        *("28 of 28 cards", 28, "28"),
        *("8 of 28 cards", 8, "28"),
        *("2 of 28 cards", 2, "5"),
        *("1 of 28 cards", 1, "1"),
        *("0 of 28 cards", 0, "0"),
        False,
    ]
