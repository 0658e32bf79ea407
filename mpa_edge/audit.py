"""The page on which a person judges a run: what was kept, what was dropped and why, with the pictures.

One HTML file that needs nothing else: no network, no other files, readable without JavaScript. All rows are counted; a
sample of them is shown, drawn evenly from the verdicts and, within them, from the reasons, so that what is rare is seen
too. Rows are read from disk one by one: a run of a million pictures takes no more memory than a small one.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from mpa_edge.audit_counts import Before, Round, histograms, road, tone_of, verdict_rows, words_of
from mpa_edge.audit_questions import Favourites
from mpa_edge.audit_sample import Sampler, Shown
from mpa_edge.audit_settings import facts_of, held_out
from mpa_edge.errors import ImageError, RunError
from mpa_edge.identify import RIGHT, verdict_of
from mpa_edge.parts import Parts, part_path, read_parts
from mpa_edge.records import Annotation, Case, Record, Sample, read_rows, write_atomic
from mpa_edge.run_folder import RoundFolder, RunFolder, read_run
from mpa_edge.runtime.images import open_image
from mpa_edge.scan_index import Skipped

CARDS = 200
# Cards are about this wide. With so many bytes each, the pictures of 200 cards make a page of less than 5 MB.
THUMBNAIL, THUMBNAIL_BYTES = 320, 16_000
QUALITIES = (85, 70, 50, 30, 10)
# A server may let a teacher write on and on.
RAW_CHARACTERS = 4_000


@dataclass(frozen=True)
class Trained(Record):
    """A row of the training set, as far as the page reads it."""

    id: str
    verdict: str = "unknown"
    messages: list[Any] = field(default_factory=list)

    @property
    def target(self) -> str:
        """The text that is learned."""
        parts = (part for message in self.messages if message["role"] == "assistant" for part in message["content"])
        return "".join(str(part.get("text", "")) for part in parts)


@dataclass(frozen=True)
class Named(Record):
    """A row that names a case."""

    id: str


@dataclass(frozen=True)
class Card:
    """One row on the page. `picture` is a data: URL, or None where the file cannot be read any more."""

    shown: Shown
    name: str
    picture: str | None
    tiny: bool

    @property
    def case(self) -> Case | None:
        """The row, where both models were asked."""
        return self.shown.row if isinstance(self.shown.row, Case) else None

    @property
    def kind(self) -> tuple[str, str]:
        """The verdict and the name of its colour."""
        return self.shown.verdict, tone_of(self.shown.verdict)

    @property
    def trained(self) -> bool:
        """Whether it is in the training set."""
        return self.shown.target is not None

    @property
    def teacher_right(self) -> bool | None:
        """Whether the teacher confirms its answer; None where a model did not answer."""
        case = self.case
        if case is None or case.failed:
            return None
        return verdict_of(case.teacher_score, 0.0, votes=max(1, len(case.votes))) != "unconfirmed"

    @property
    def student_right(self) -> bool | None:
        """Whether the student gives the pseudo-answer; None where a model did not answer."""
        return None if self.case is None or self.case.failed else self.case.student_score >= RIGHT

    @property
    def raw(self) -> str:
        """The teacher's text of a rejected annotation."""
        text = self.shown.row.raw if isinstance(self.shown.row, Annotation) else ""
        return text if len(text) <= RAW_CHARACTERS else text[:RAW_CHARACTERS] + " …"

    @property
    def votes(self) -> list[tuple[str, int]]:
        """The teacher's answers where it was asked more than once, the commonest first."""
        return Counter(self.case.votes).most_common() if self.case else []


def audit_run(path: Path, *, rounds: int | None = None, limit: int = CARDS) -> Path:
    """Write the page of a run from the files in its folder; returns the page's path. At most `limit` rows get a card.

    `rounds` says that no more rounds than these are done yet. The cards are those of the last one. `RunError` where
    there is no run, or a stage of it is not finished.
    """
    run, content = RunFolder(path), read_run(path)
    sampler = Sampler(limit)
    before = _count_before(run, sampler)
    folders = _rounds(run, content)[:rounds]
    counts = [_count_round(folder) for folder in folders[:-1]]
    with closing(Favourites()) as favourites:
        if folders:
            counts.append(_count_round(folders[-1], sampler, favourites))
        often = favourites.table(_lines(folders[-1].cases) if folders else ())
    for number, each in enumerate(counts, 1):
        each.held_out = held_out(content, number)
    script = _template("audit.js.j2").render()
    text = _template("audit.html.j2").render(
        name=path.resolve().name,
        facts=facts_of(content),
        trained=bool(counts) and counts[-1].held_out is not None,
        road=road(before, counts, content.get("stages", {}).get("samples", {}).get("shared")),
        before=before,
        rounds=counts,
        verdicts=verdict_rows(counts, before.rejected.total()),
        histograms=histograms(counts[-1]) if counts else [],
        favourites=often,
        cards=_cards(run, sampler.picked()),
        rows=before.rejected.total() + (counts[-1].verdicts.total() if counts else 0),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    # A teacher's text may hold half a surrogate pair, which no file can.
    write_atomic(run.audit, text.encode("utf-8", "replace"))
    return run.audit


# --- counting --------------------------------------------------------------------------------------------------------


def _count_before(run: RunFolder, sampler: Sampler) -> Before:
    before = Before()
    if run.skipped.is_file():
        before.skipped.update(item.reason for item in read_rows(run.skipped, Skipped))
    with run.samples.open("rb") as lines:  # which the cards read
        before.pictures = sum(1 for _ in lines)
    for row in read_parts(run.annotations, Annotation):
        before.written += 1
        if row.reason is not None:
            before.rejected[row.reason] += 1
            sampler.add(Shown(row))
    return before


def _rounds(run: RunFolder, content: dict[str, Any]) -> list[RoundFolder]:
    """The folders of the rounds, the last one last; none before anything was asked."""
    total = int(content.get("config", {}).get("rounds", 1))
    folders: list[RoundFolder] = [run.round(number) for number in range(1, total)]
    return [folder for folder in [*folders, run] if folder.cases.is_dir()]


def _count_round(folder: RoundFolder, sampler: Sampler | None = None, favourites: Favourites | None = None) -> Round:
    """The numbers of a round; sampler and favourites are given its rows too."""
    found = Round()
    for case, collapsed, trained in _marked(folder):
        found.add(case, collapsed)
        if trained:
            found.training[case.verdict] += 1
        if sampler:
            sampler.add(Shown(case, collapsed, trained.target if trained else None))
        if favourites:
            favourites.add(case, collapsed)
    return found


def _marked(folder: RoundFolder) -> Iterator[tuple[Case, bool, Trained | None]]:
    """The cases of a round, whether the cap dropped them, and what of them is in the training set. Those files are in
    the order of the cases, so that three of them are read side by side and none is held."""
    collapsed = _Follower(folder.collapsed, Named)
    trained = _Follower(folder.parity, Trained)
    for case in read_parts(folder.cases, Case):
        yield case, collapsed.row_of(case) is not None, trained.row_of(case)
    for follower in (collapsed, trained):
        follower.end()


def _lines(cases: Path) -> Iterator[bytes]:
    """The rows of a stage that was just read, as they are written."""
    for number in range(Parts(cases, Case).count):
        with part_path(cases, number).open("rb") as lines:
            yield from lines


class _Follower:
    """The rows of a file that name some of the cases, in their order; none where there is no file."""

    def __init__(self, path: Path, row: type[Any]) -> None:
        self._path = path
        self._rows: Iterator[Any] = read_rows(path, row) if path.is_file() else iter(())
        self._next = next(self._rows, None)

    def row_of(self, case: Case) -> Any:
        """The row about this case, or None."""
        found = self._next
        if found is None or found.id != case.id:
            return None
        self._next = next(self._rows, None)
        return found

    def end(self) -> None:
        """`RunError` when rows are left."""
        if self._next is not None:
            raise RunError(f"{self._path}: {self._next.id} is none of the cases, or not in their order")


# --- the cards -------------------------------------------------------------------------------------------------------


def _cards(run: RunFolder, picked: Iterable[Shown]) -> list[Card]:
    picked = list(picked)
    wanted = {shown.row.sample_id for shown in picked}
    paths = {row.id: Path(row.path) for row in read_rows(run.samples, Sample) if row.id in wanted}
    return [_card(shown, paths.get(shown.row.sample_id)) for shown in picked]


def _card(shown: Shown, path: Path | None) -> Card:
    picture, tiny = _thumbnail(path)
    return Card(shown, path.name if path else shown.row.sample_id, picture, tiny)


def _thumbnail(path: Path | None) -> tuple[str | None, bool]:
    """A small copy of the picture as a data: URL, and whether it is so small that it is shown enlarged."""
    try:
        if path is None:
            return None, False
        image = open_image(path)
    except ImageError:
        return None, False
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    for quality in QUALITIES:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        if data.tell() <= THUMBNAIL_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}", max(image.size) <= THUMBNAIL // 2


@lru_cache
def _template(name: str) -> Template:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["short"] = lambda value: f"{value:,}" if value < 10_000 else f"{value / 1000:,.0f}k"
    environment.filters["percent"] = lambda value: f"{value:.1f}%"
    environment.filters["words"] = words_of
    return environment.get_template(name)
