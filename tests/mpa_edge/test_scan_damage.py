"""What a scan keeps for the next one, damaged: the same pictures all the same."""

from __future__ import annotations

import random
import resource
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.config import AlignConfig
from mpa_edge.errors import RunError
from mpa_edge.run_folder import RunFolder
from mpa_edge.scan import find_pictures
from mpa_edge.scan_index import Check, ScanIndex, Skipped


def found(config: AlignConfig, run: RunFolder) -> list[str]:
    with find_pictures(config, run) as pictures:
        return [sample.sha256 for sample in pictures.samples()]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "images").mkdir()
    for number in range(30):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def config(run: RunFolder) -> AlignConfig:
    images = str(run.path.parent / "images")
    return AlignConfig(images=images, teacher="fake:", student="fake:", task="reference", out=run.path)


def test_a_cut_cache_gives_the_same_pictures(config: AlignConfig, run: RunFolder) -> None:
    wanted, cache = found(config, run), run.path / ".scan.sqlite"
    whole = cache.read_bytes()
    for size in range(0, len(whole), len(whole) // 24):  # also in the middle of the last page
        cache.write_bytes(whole[:size])
        assert found(config, run) == wanted
    # All that comes after the schema and the rules.
    assert len(whole) > 2 * 4096
    cache.write_bytes(whole[: 2 * 4096] + bytes(len(whole) - 2 * 4096))
    assert found(config, run) == wanted


def test_a_bit_that_flips_changes_no_picture(config: AlignConfig, run: RunFolder) -> None:
    """SQLite sees none in a row: a digest, a path or a reason was another then, and so was the run."""
    wanted, cache = found(config, run), run.path / ".scan.sqlite"
    whole, rng = cache.read_bytes(), random.Random(0)
    sha256 = whole.index(bytes.fromhex(wanted[7]))
    anywhere = [place for place in range(len(whole)) if whole[place]]
    flips = [(place, 1 << rng.randrange(8)) for place in (sha256, 18, *rng.sample(anywhere, 20))]
    flips += [(whole.index(b"CREATE TABLE checks") + 3, 128)]  # SQLite's message about it is no text
    for place, bit in flips:
        cache.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        assert found(config, run) == wanted, (place, bit)


def test_damage_that_shows_later_says_what_to_delete(config: AlignConfig, run: RunFolder) -> None:
    cache = run.path / ".scan.sqlite"
    with (  # noqa: PT012 (what raises is the whole block, with its end)
        pytest.raises(RunError, match="Delete it, and type the same command again") as caught,
        find_pictures(config, run) as pictures,
    ):
        cache.write_bytes(bytes(cache.stat().st_size))
        list(pictures.samples())
    assert str(caught.value).startswith(f"{cache} is damaged (")


def test_a_table_that_lost_a_row_is_read_again(tmp_path: Path) -> None:
    with ScanIndex(tmp_path / "cache", {}) as index:
        index.put([Check(b"1", "t:1"), Check(b"2", "t:2")])
        assert not index.finished
        index.finish()
    with ScanIndex(tmp_path / "cache", {}) as index:
        assert index.finished
        index._database.execute("DELETE FROM checks WHERE key = ?", (b"2",))
        assert not index.finished


def test_a_full_disk_costs_no_cache(tmp_path: Path) -> None:
    cache, limits = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    with ScanIndex(cache, {"min_edge": 8}) as index:
        index.put([Check(b"a.png", "a.png")])
    before = cache.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(sqlite3.OperationalError, match="disk"):
            ScanIndex(cache, {"min_edge": 9})  # what other rules found is dropped, which takes room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with ScanIndex(cache, {"min_edge": 8}):
        pass
    assert cache.read_bytes() == before


def test_a_cache_that_cannot_be_opened_is_sqlites_error(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="unable to open database file"):
        ScanIndex(tmp_path, {})


def test_an_old_sqlite_is_enough() -> None:
    """`iif` came with 3.32; these are in all that there are."""
    called = set[str]()

    def note(action: int, _: object, name: str | None, *__: object) -> int:
        if action == 31:  # SQLITE_FUNCTION
            called.add(str(name))
        return sqlite3.SQLITE_OK

    with ScanIndex(None, {}) as index:
        index._database.set_authorizer(note)
        index.want([b"a", b"b", b"c", b"d"])
        index.put([Check(b"a", "a", sha256=b"1"), Check(b"b", "b", sha256=b"1"), Check(b"c", "c", sha256=b"2")])
        index.put([Check(b"d", "d", reason="unreadable", detail="why")])
        index.finish()
        index.share({sample.id: "in t.jsonl" for sample in index.samples(None) if sample.path == "c"}, 5)
        assert [sample.path for sample in index.samples(None)] == ["a"]
        assert list(index.skipped()) == [
            Skipped("b", "duplicate", "same content as a"),
            Skipped("c", "in_test", "in t.jsonl"),
            Skipped("d", "unreadable", "why"),
        ]
    assert called <= {"coalesce", "count", "min"}
