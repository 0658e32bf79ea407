"""The page and the Markdown from measured rows, with hostile text in every place that data can reach."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpa_edge.benchmarks import bench
from mpa_edge.benchmarks.bench import BenchConfig, report_of
from mpa_edge.benchmarks.gallery import PER_FILTER, THUMBNAIL, gallery, thumbnail, who
from mpa_edge.benchmarks.host import host
from mpa_edge.benchmarks.jobs import Row
from mpa_edge.benchmarks.measure import Measured
from mpa_edge.benchmarks.plots import box_of, decades, front, overlap, place_labels, scatter, steps
from mpa_edge.benchmarks.report import console_table, markdown, phase_rows, render_html, render_markdown
from mpa_edge.benchmarks.report_parts import where
from mpa_edge.benchmarks.sample import items_of
from mpa_edge.benchmarks.variants import Variant
from mpa_edge.labelled import Question, Questions
from mpa_edge.tasks import task_named

EVIL = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> \" ' | `x` @all"
N = 120
ROAD = (
    Variant("teacher", "", "teacher", "transformers"),
    Variant("student", "", "student", "transformers"),
    Variant("aligned", "", "aligned", "transformers"),
    Variant("gguf-f16", "", "full", "llama.cpp", "f16"),
    Variant("gguf-q4_k_m", "", "quantized", "llama.cpp", "q4_k_m"),
    Variant(EVIL, "", "quantized", "onnxruntime", "int8"),
)
RIGHT = {"teacher": 0.9, "student": 0.4, "aligned": 0.7, "gguf-f16": 0.7, "gguf-q4_k_m": 0.6, EVIL: 0.65}


# A road out of a manifest, whose writer is not to be trusted with names.
STEP = {"name": EVIL, "step": "base", "value": 0.5, "ci95": [0.4, 0.6], "from": None, "delta": None, "delta_ci95": None}
LOSS = {"value": 0.43, "from": EVIL, "delta": -0.07, "delta_ci95": [-0.09, -0.05]}
MADE = {
    "data": {"name": EVIL, "n": 1234, "sha256": ""},
    "task": EVIL,
    "metric": EVIL,
    "steps": [
        STEP,
        STEP
        | {
            "name": "gguf-f16",
            "step": "full",
            "value": 0.43,
            "from": EVIL,
            "delta": -0.07,
            "delta_ci95": [-0.09, -0.05],
        },
    ],
}


CHANGED: dict[str, Any] = {
    "against": {"created": "2026-01-01T00:00:00+00:00", "tool_version": "0"},
    "found": 1,
    "gone": [EVIL],
    "notes": ["another machine: times and memory are not compared"],
    "changes": [
        {"variant": "gguf-f16", "quantity": "size", "before": 1.5, "after": 1.5, "delta": 0.0, "ci95": None},
        {"variant": EVIL, "quantity": "accuracy", "before": 0.8, "after": 0.65, "delta": -0.15, "ci95": [-0.2, -0.1]},
        {"variant": "gone", "quantity": "failed", "before": None, "after": None, "delta": None, "ci95": None},
    ],
}
for change, worse in zip(CHANGED["changes"], (False, True, True), strict=True):
    change |= {"paired": 120, "note": EVIL if change["quantity"] == "failed" else None, "regression": worse}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Questions:
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number in range(N):
        path = folder / f"{number}.png"
        size = (640, 300) if number == 5 else (24, 24)
        Image.new("RGB", size, (number, 2 * number, 90)).save(path)
        evil = EVIL if number % 3 == 0 else f"what? {number}"
        found.append(Question(str(number), str(path), evil, (f"right {EVIL}",), f"kind_{number % 4}", "group <b>"))
    Path(found[2].image).write_text("no picture")
    return Questions(found)


def measured(variant: Variant, items: Sequence[bench.Item]) -> Measured:
    rows = {}
    for place, item in enumerate(items):
        text = item.question.answers[0] if (place * 37 % N) / N < RIGHT[variant.name] else f"wrong {EVIL}"
        rows[item.ask.key] = Row(item.ask.key, text, 3, 50, "stop", None, {})
    speed = 1 + len(variant.name) % 7
    times = {"preprocess": 1.0, "vision": 2.0 * speed, "prefill": 3.0, "decode": 4.0}
    latency = [Row(item.ask.key, "", 3, 50, "stop", None, times, wall_ms=11.0 + 2 * speed) for item in items[:10]]
    return Measured(rows, latency, variant.engine, 100.0, 5_000_000)


def make(
    questions: Questions, monkeypatch: pytest.MonkeyPatch, failing: str | None = None, **settings: Any
) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr(bench, "size_bytes", lambda spec: 1_500_000)
    items = items_of(questions, lambda question: question)
    found = {
        variant.name: Measured({}, [], reason=EVIL) if variant.name == failing else measured(variant, items)
        for variant in ROAD
    }
    config = BenchConfig(data="test.jsonl", baselines=["fake:"], name=EVIL, **settings)
    report, scored = report_of(config, task_named("reference"), questions, items, ROAD, found, host())
    report["roads"] = [MADE]
    if settings:
        report["regressions"] = CHANGED
    times = {name: [row.wall_ms or 0 for row in one.latency] for name, one in found.items()}
    return report, render_html(report, gallery(items, scored, found), times)


TAGS = """html head meta title style body main header section footer script p b em span i h1 h2 h3 ul li dl dt dd div
small code details summary table thead tbody tr th td article img figure svg g line path circle text button select
option wbr"""


class Page(HTMLParser):
    """Collects what a browser would load or run, and whether tags match."""

    VOID = frozenset(("meta", "img", "br", "link", "line", "circle", "path", "wbr"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_data_cannot_become_markup(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    _, html = make(questions, monkeypatch)
    page = Page(html)
    assert not page.open
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in html
    assert {tag for tag, _ in page.tags} <= set(TAGS.split())


def test_nothing_is_loaded_from_elsewhere(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    _, html = make(questions, monkeypatch)
    page = Page(html)
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attrs.get(name) or "data:image/").startswith("data:image/"), (tag, name)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert style is not None
    assert script is not None
    assert not re.search(r"url\(|@import", style[1])
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_page_says_what_was_found(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    report, html = make(questions, monkeypatch)
    assert report["verdict"]["decision"] == "deploy"
    assert report["verdict"]["pick"] == "gguf-f16"
    assert "Deploy gguf-f16" in html
    assert "Alignment raised the student&#39;s accuracy: +30.0 points" in html
    assert "picture cannot be read" in html
    for heading in (
        "Along the road",
        "Accuracy against latency",
        "Where the time goes",
        "By kind",
        "disagree",
        "Method",
    ):
        assert heading in html


def test_the_page_draws_what_export_measured(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    _, html = make(questions, monkeypatch)
    part = html[html.index("As export measured it") :].partition("</section>")[0]
    assert "1,234 questions" in part
    assert "43.0%" in part
    assert re.search(r'class="note loss">−7\.0 <span>from ', part)
    assert part.count('class="whisker"') == 2


def test_a_failed_variant_is_shown_as_failed(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    report, html = make(questions, monkeypatch, failing="gguf-q4_k_m")
    assert "failed: &lt;/script&gt;" in html
    assert not Page(html).open
    assert "failed" in render_markdown(report)


@pytest.mark.parametrize("missing", ["teacher", "student", "aligned"])
def test_a_report_needs_no_whole_road(questions: Questions, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    report, html = make(questions, monkeypatch, failing=missing)
    assert (report["gap_closed"] is None) == (missing != "aligned")
    assert not Page(html).open


def test_markdown_fits_a_comment_and_stays_a_table(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = make(questions, monkeypatch)
    text = render_markdown(report)
    assert len(text) < 60_000  # GitHub takes 65,536
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(ROAD)
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {9}
    assert "<script" not in text
    assert "@all" not in text
    assert markdown("a|b\n`c` <d> _e_") == r"a\|b \`c\` &lt;d> \_e\_"


def test_the_console_table_has_a_row_per_variant(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = make(questions, monkeypatch)
    assert console_table(report).row_count == len(ROAD)


def test_the_gallery_counts_all_and_shows_some(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "size_bytes", lambda spec: None)
    items = items_of(questions, lambda question: question)
    found = {variant.name: measured(variant, items) for variant in ROAD}
    config = BenchConfig(data="test.jsonl", baselines=["fake:"])
    _, scored = report_of(config, task_named("reference"), questions, items, ROAD, found, host())
    shown = gallery(items, scored, found)
    assert shown.counts == {"fixed": 36, "quantization": 12, "missing": 24}
    by_filter = {name: [case for case in shown.cases if name in case.filters] for name in shown.counts}
    assert len(by_filter["fixed"]) >= PER_FILTER
    assert len(by_filter["quantization"]) == 12
    assert len({case.kind for case in by_filter["fixed"]}) == 4
    case = by_filter["quantization"][0]
    assert [said.right for said in case.said] == [True, False]


def test_thumbnails_are_small(questions: Questions) -> None:
    small, large = thumbnail(questions[0].image), thumbnail(questions[5].image)
    assert small is not None
    assert large is not None
    assert small.startswith("data:image/png;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2])))
    assert (picture.format, max(picture.size)) == ("JPEG", THUMBNAIL)


def test_names_are_told_the_short_way() -> None:
    road = ["teacher", "student", "aligned", "f16", "q8", "q4"]
    assert who(road, road) == "all"
    assert who(["teacher", "aligned", "f16", "q8", "q4"], road) == "all but student"
    assert who(["teacher", "student"], road) == "teacher, student"


def test_labels_keep_off_each_other() -> None:
    places = [(300.0, 200.0), (303.0, 202.0), (310.0, 198.0), (300.0, 210.0), (306.0, 206.0), (600.0, 200.0)]
    names = ["gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "onnx-fp32", "onnx-int8", "teacher-with-a-name"]
    boxes = [box_of(label, name) for label, name in zip(place_labels(names, places), names, strict=True)]
    assert not any(overlap(a, b) for number, a in enumerate(boxes) for b in boxes[:number])


def test_a_label_keeps_off_the_lines_to_the_95th_percentile() -> None:
    places, names = [(200.0, 200.0), (400.0, 100.0)], ["teacher", "gguf-q8_0"]
    free, crowded = place_labels(names, places), place_labels(names, places, [300.0, 400.0])
    assert (free[0].anchor, crowded[0].anchor) == ("start", "end")
    assert crowded[1] == free[1]


def test_the_plot_marks_the_pick_and_what_is_measurably_beaten() -> None:
    def entry(name: str, accuracy: float, p50: float) -> dict[str, Any]:
        return {
            "name": name, "tone": "gguf", "facts": name, "size_mb": 1.0, "peak_memory_mb": 1.0,
            "accuracy": {"value": accuracy, "ci95": [accuracy - 0.02, accuracy + 0.02]},
            "latency_ms": {"total": {"p50": p50, "p95": 2 * p50}},
        }  # fmt: skip

    found = scatter(
        [entry("a", 0.775, 20.0), entry("b", 0.773, 21.0), entry("c", 0.77, 30.0), entry("t", 0.9, 50)], "b"
    )
    assert found is not None
    assert [(one.name, one.best, one.picked) for one in found.points] == [
        ("a", True, False), ("b", True, True), ("c", False, False), ("t", True, False),
    ]  # fmt: skip
    assert found.front.startswith(f"M{found.points[0].x} {found.points[0].y}H{found.points[3].x}")


@pytest.mark.parametrize(("low", "high", "expected"), [(1.0, 2.0, [10, 20, 50, 100]), (1.15, 1.6, [15, 20, 25, 30])])
def test_a_time_axis_has_ticks_on_any_length(low: float, high: float, expected: list[float]) -> None:
    assert decades(low, high) == pytest.approx(expected)


def test_phases_add_up_to_the_bar(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = make(questions, monkeypatch)
    for row in phase_rows(report["variants"]):
        assert sum(part["ms"] for part in row["segments"]) == pytest.approx(row["mean"])
        assert 0 < sum(part["share"] for part in row["segments"]) <= row["p95"] + 1e-6 <= 100.001


REQUIRED = "accuracy>=0.65, p95<=20ms, size<=1MB, energy<=1J"


def test_the_page_says_which_lines_are_kept(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    report, html = make(questions, monkeypatch, require=REQUIRED)
    assert report["verdict"]["decision"] == "reject"
    assert not Page(html).open
    part = html[html.index("Against the requirements") :].partition("</section>")[0]
    assert part.count('class="mark fail">✗ broken') >= len(ROAD)  # all are larger than 1 MB
    assert "size&lt;=1MB" in part
    assert "not measured" in part  # energy
    assert "Every variant breaks a line" in html


def test_the_page_says_what_became_worse(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    _, html = make(questions, monkeypatch, require=REQUIRED)
    part = html[html.index("Since 2026-01-01") :].partition("</section>")[0]
    assert "Worse than in the earlier report: 1. Another machine" in part
    assert "−20.0 points to −10.0 points" in part
    assert part.index("−15.0 points") < part.index("+0%")  # the worst first


def test_the_markdown_holds_the_decision(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = make(questions, monkeypatch, require=REQUIRED)
    text = render_markdown(report)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows[: 2 + len(ROAD)]} == {7}
    assert "✗ 1.5 MB" in text
    assert "- **Worse:**" in text
    assert "<script" not in text


def test_the_front_goes_from_the_fastest_to_the_most_accurate() -> None:
    values = [(10.0, 0.5), (20.0, 0.7), (20.0, 0.6), (30.0, 0.65), (40.0, 0.9)]
    assert front(values) == [0, 1, 4]
    assert steps([(0, 9), (5, 4), (8, 1)]) == "M0 9H5V4H8V1"
    assert steps([(0, 9)]) == ""


def test_a_variant_says_where_it_ran() -> None:
    entry = {"engine": "llama.cpp", "device": "cpu", "threads": None, "dtype": "q8_0"}
    assert where(entry, 4) == "cpu, 4 threads · q8_0"
    assert where({**entry, "role": "bundle"}, 4) == "cpu, 4 threads"
    assert where({**entry, "threads": 1}, 4) == "cpu, 1 thread · q8_0"
    assert where({"engine": "transformers", "device": "cuda:0", "dtype": "bfloat16"}, 4) == "cuda:0 · bfloat16"
    assert where({"engine": "chat"}, 4) == "its server"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if not program and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium; playwright install chromium brings one")
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_the_page_works_from_disk_on_a_phone(
    browser: Any, questions: Questions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, html = make(questions, monkeypatch, require=REQUIRED)
    (tmp_path / "report.html").write_text(html)
    page = browser.new_page(viewport={"width": 375, "height": 800}, color_scheme="dark")
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    table = page.locator("table.sorted").first

    def column() -> list[str]:
        return [str(text).split("%")[0] for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]

    table.get_by_role("button", name="Accuracy").click()
    rising = column()
    assert rising == sorted(rising, key=float)
    table.get_by_role("button", name="Accuracy").click()
    assert column() == rising[::-1]
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "descending"
    page.locator(".chip", has_text="Fixed by alignment").click()
    shown = page.locator(".case:visible").count()
    assert 0 < shown < page.locator(".case").count()
    assert complaints == []
