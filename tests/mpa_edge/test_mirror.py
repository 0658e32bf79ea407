"""What was asked has a second home, from which another machine goes on."""

from __future__ import annotations

import inspect
import random
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from mpa_edge.align import align
from mpa_edge.askers import Asks, Here, Part, Work
from mpa_edge.config import AlignConfig
from mpa_edge.errors import FingerprintMismatch, InputError, RunError
from mpa_edge.fake import FakeSettings, FakeVlm
from mpa_edge.mirror import Mirror, require_mirror
from mpa_edge.run_folder import RunFolder
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.training_set import TrainingSetMaker, make_training_set


class Teacher(FakeVlm):
    """Writes the same about every picture."""

    asked = 0
    silent = False
    says = "What is it? red"

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        self.asked += len(images)
        return (
            [Answer("", finish_reason="error", error="late")] + [Answer(self.says)] * (len(images) - 1)
            if (self.silent)
            else [Answer(self.says)] * len(images)
        )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for seed in range(7):
        image = Image.frombytes("RGB", (12, 12), random.Random(seed).randbytes(12 * 12 * 3))
        image.save(tmp_path / "photos" / f"{seed}.png")
    return tmp_path / "photos"


@pytest.fixture(params=["memory", "file", "slow"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An object store, a folder, and a store that tears what it is given unless it is moved into place."""
    if request.param == "slow":
        fsspec.register_implementation("slow", Slow, clobber=True)
    url = f"{request.param}://{tmp_path / 'far' / 'run'}"
    yield url
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Slow(MemoryFileSystem):
    """No object store: only what is moved into place is whole."""

    protocol = "slow"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        assert path.endswith(".tmp"), path
        super().pipe_file(path, value, **kwargs)


def make(photos: Path, out: Path, mirror: str | None, teacher: Teacher | None = None, **settings: Any) -> Teacher:
    usual: dict[str, Any] = {"chunk_size": 2, "questions": 1, "task": "reference", "mirror": mirror, **settings}
    config = AlignConfig(images=str(photos), teacher="t", student="s", out=out, **usual)
    teacher = teacher or Teacher()
    make_training_set(config, teacher, FakeVlm())
    return teacher


def parts(out: Path) -> dict[str, bytes]:
    stages = (path for stage in ("annotations", "cases") for path in (out / stage).iterdir())
    return {str(path.relative_to(out)): path.read_bytes() for path in stages}


def far(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {path.split("/run/", 1)[1]: fs.cat_file(path) for path in fs.find(root)}


def test_another_machine_goes_on_from_the_mirror(photos: Path, place: str, tmp_path: Path) -> None:
    make(photos, tmp_path / "a", place)
    assert far(place) == parts(tmp_path / "a")
    assert make(photos, tmp_path / "b", place).asked == 0
    assert parts(tmp_path / "b") == parts(tmp_path / "a")
    with pytest.raises(RunError, match=r"--mirror .*annotations is of other settings .*: there .*, here "):
        make(photos, tmp_path / "c", place, questions=2)
    # A part that was not finished here, and one that a store tore.
    shutil.rmtree(tmp_path / "b" / "cases")
    fs, root = fsspec.core.url_to_fs(place)
    for stage in ("annotations", "cases"):
        torn = fs.cat_file(f"{root}/{stage}/part-00001.jsonl")[:-5]
        with fs.open(f"{root}/{stage}/part-00001.jsonl.tmp", "wb") as file:
            file.write(torn)
        fs.mv(f"{root}/{stage}/part-00001.jsonl.tmp", f"{root}/{stage}/part-00001.jsonl")
    with pytest.warns(UserWarning, match="damaged"):
        assert make(photos, tmp_path / "b", place).asked == 4
    assert far(place) == parts(tmp_path / "b") == parts(tmp_path / "a")


def test_later_rounds_have_it_too(photos: Path, place: str, tmp_path: Path) -> None:
    def make_rounds(out: Path, seed: int = 0) -> Teacher:
        usual: dict[str, Any] = {"chunk_size": 2, "questions": 1, "task": "reference", "mirror": place, "rounds": 2}
        config = AlignConfig(images=str(photos), teacher="t", student="s", out=out, **usual)
        maker, student = TrainingSetMaker(config, RunFolder(out), {}), Teacher(settings=FakeSettings(seed=seed))
        maker.scan()
        maker.ask(Teacher(), FakeVlm())
        maker.ask_again(2, student)
        return student

    def second(out: Path) -> dict[str, bytes]:
        return {f"cases-round-2/{path.name}": path.read_bytes() for path in (out / "cases").iterdir()}

    def second_there() -> dict[str, bytes]:
        return {name: content for name, content in far(place).items() if name.startswith("cases-round-2/")}

    assert make_rounds(tmp_path / "a").asked == 7
    assert second_there() == second(tmp_path / "a")
    assert make_rounds(tmp_path / "b").asked == 0  # on another machine
    assert second(tmp_path / "b") == second(tmp_path / "a")
    # There the round before was trained to another student.
    assert make_rounds(tmp_path / "c", seed=1).asked == 7
    assert second_there() == second(tmp_path / "c") != second(tmp_path / "a")


@pytest.mark.parametrize("other", [{"seed": 1}, {"temperature": 0.123456}], ids=["of equal size", "of another size"])
def test_another_runs_mirror_is_refused_before_anything_is_copied(
    photos: Path, place: str, tmp_path: Path, other: dict[str, Any]
) -> None:
    make(photos, tmp_path / "a", None)
    make(photos, tmp_path / "b", place, **other)
    here, there = parts(tmp_path / "a"), far(place)
    with pytest.raises(RunError, match=f"--mirror {place}: what lies in annotations is of other settings") as caught:
        make(photos, tmp_path / "a", place)
    assert "--fresh" not in str(caught.value)  # which deletes what lies there
    assert (parts(tmp_path / "a"), far(place)) == (here, there)
    assert make(photos, tmp_path / "a", None).asked == 0


def test_a_folder_of_other_settings_is_refused_before_anything_is_copied(
    photos: Path, place: str, tmp_path: Path
) -> None:
    make(photos, tmp_path / "a", None, temperature=0.123456)
    make(photos, tmp_path / "b", place)
    (tmp_path / "a" / "run.json").unlink()  # which tells sooner
    here = parts(tmp_path / "a")
    with pytest.raises(FingerprintMismatch, match=r"0\.123456"):
        make(photos, tmp_path / "a", place)
    assert parts(tmp_path / "a") == here


def test_what_lies_there_counts_even_where_it_is_as_long(photos: Path, place: str, tmp_path: Path) -> None:
    make(photos, tmp_path / "a", place)
    teacher = Teacher()
    teacher.says = "What is it? tan"
    make(photos, tmp_path / "b", None, teacher)
    assert parts(tmp_path / "b") != parts(tmp_path / "a")
    assert make(photos, tmp_path / "b", place).asked == 0
    assert parts(tmp_path / "b") == far(place) == parts(tmp_path / "a")


def test_settings_there_that_nobody_knows_are_refused(photos: Path, place: str, tmp_path: Path) -> None:
    make(photos, tmp_path / "a", place)
    fs, root = fsspec.core.url_to_fs(place)
    fs.rm_file(f"{root}/cases/stage.json")
    with pytest.raises(RunError, match=r"what lies in cases lacks its stage\.json"):
        make(photos, tmp_path / "a", place)
    with fs.open(f"{root}/cases/stage.json", "wb") as file:
        file.write(b"{")
    with pytest.raises(RunError, match=r"what lies in cases cannot be used: stage\.json is damaged"):
        make(photos, tmp_path / "a", place)


def test_failed_rows_are_asked_again_from_there_and_fresh_starts_over(photos: Path, tmp_path: Path) -> None:
    place = f"file://{tmp_path / 'far' / 'run'}"
    late = Teacher()
    late.silent = True
    make(photos, tmp_path / "a", place, late)
    assert "annotations/part-00000.failed" in far(place)
    make(photos, tmp_path / "b", place)
    assert not [name for name in far(place) if name.endswith(".failed")]
    assert far(place) == parts(tmp_path / "b")
    (tmp_path / "far" / "run" / "cases" / "notes.txt").write_text("mine")
    make(photos, tmp_path / "b", place, fresh=True, limit=4)
    assert far(place) == {**parts(tmp_path / "b"), "cases/notes.txt": b"mine"}


def test_fresh_deletes_no_other_runs_mirror(photos: Path, place: str, tmp_path: Path) -> None:
    """Such as the nights of another run, or of this one on a machine that has not fetched them."""
    make(photos, tmp_path / "a", place)
    make(photos, tmp_path / "b", None, seed=1)
    there, here = far(place), parts(tmp_path / "b")
    for out in (tmp_path / "b", tmp_path / "new"):
        with pytest.raises(RunError, match=rf"--mirror {place}: what lies there is not what {out} holds"):
            make(photos, out, place, fresh=True)
    assert (far(place), parts(tmp_path / "b")) == (there, here)
    make(photos, tmp_path / "a", place, fresh=True, seed=2)
    assert far(place) == parts(tmp_path / "a") != there


@pytest.mark.parametrize("stops_after", [0, 4, 5, 9])
def test_who_is_stopped_while_a_mirror_is_emptied_can_do_it_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_after: int
) -> None:
    place = "memory:///run"
    make(photos, tmp_path / "a", place, chunk_size=4)
    left, remove = [True] * stops_after, MemoryFileSystem.rm_file

    def stopped(self: Any, path: str) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        remove(self, path)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(photos, tmp_path / "a", place, fresh=True, seed=1)
    monkeypatch.undo()
    make(photos, tmp_path / "a", place, fresh=True, seed=1)
    assert far(place) == parts(tmp_path / "a")
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("stops_at", ["annotations/part-00000.sha256", "cases/part-00000.jsonl"])
def test_whoever_is_stopped_while_a_repaired_part_is_copied_leaves_its_note_there(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: str
) -> None:
    place, late = f"file://{tmp_path / 'far' / 'run'}", Teacher()
    late.silent = True
    make(photos, tmp_path / "a", place, late)
    put = Mirror._put

    def stopped(self: Mirror, path: str, content: bytes) -> None:
        if path.endswith(stops_at):
            raise KeyboardInterrupt
        put(self, path, content)

    monkeypatch.setattr(Mirror, "_put", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(photos, tmp_path / "a", place)
    monkeypatch.undo()
    assert "annotations/part-00000.failed" in far(place)
    make(photos, tmp_path / "b", place)  # on another machine
    make(photos, tmp_path / "c", None)
    assert parts(tmp_path / "b") == far(place) == parts(tmp_path / "c")


def test_a_store_that_is_away_stops_nothing_and_is_told(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, away = "memory:///run", [True] * 3
    put = MemoryFileSystem.pipe_file

    def sometimes(self: Any, *arguments: Any, **options: Any) -> Any:
        if away and away.pop():
            raise OSError("no route to host")
        return put(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", sometimes)
    make(photos, tmp_path / "a", place)
    assert capsys.readouterr().err.count("no route to host") == 1
    assert far(place) == parts(tmp_path / "a")
    away += [True] * 99
    with pytest.raises(RunError, match=r"memory:///other/run cannot be written.*type the same command again"):
        make(photos, tmp_path / "a", "memory:///other/run")
    away.clear()
    assert make(photos, tmp_path / "a", "memory:///other/run").asked == 0
    assert far("memory:///other/run") == parts(tmp_path / "a")
    MemoryFileSystem.store.clear()


class Holding(Here):
    """Knows what it gave out: that does not end by going out of use."""

    given: Generator[Part, None, None]

    def each(self, asks: Asks, parts: Iterable[Part], work: Work) -> Generator[Part, None, None]:
        self.given = super().each(asks, parts, work)
        return self.given


def test_ctrl_c_while_a_part_is_copied_ends_the_engine(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Mirror, "keep", stopped)
    settings: dict[str, Any] = {"mirror": "memory:///run", "task": "reference", "chunk_size": 2}
    config = AlignConfig(images=str(photos), teacher="t", student="s", out=tmp_path / "a", **settings)
    engine = Holding()
    with pytest.raises(KeyboardInterrupt):
        make_training_set(config, Teacher(), FakeVlm(), engine)
    assert inspect.getgeneratorstate(engine.given) == inspect.GEN_CLOSED


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/run",
        "s3://key:sec/secret@bucket/run",
        "s3://bucket/run?token=secret",
        "dir::file://key:secret@x",
        "filecache::s3://key:secret@bucket/run",
        "nowhere://x/run",
    ],
)
def test_a_place_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="--mirror") as caught:
        Mirror(url, {})
    assert "secret" not in str(caught.value).replace("the secret", "")


@pytest.mark.parametrize("url", ["ftp://host.invalid/x", "ftp://127.0.0.1:1/x", "zip://x"])
def test_a_store_that_is_not_there_is_told_before_anything_is_loaded(url: str, photos: Path, tmp_path: Path) -> None:
    """Their clients connect when they are made, and each fails in its own way."""
    with pytest.raises(RunError, match=f"--mirror {url}: cannot be opened .*Check the address"):
        Mirror(url, {})
    models = {"teacher": "no/such-model", "student": "no/such-model"}
    config = AlignConfig(images=str(photos), **models, task="reference", out=tmp_path / "run", mirror=url)
    with pytest.raises(RunError, match=f"--mirror {url}: cannot be opened"):
        align(config)
    assert not (tmp_path / "run").exists()


def test_a_connection_does_not_wait_from_then_on(tmp_path: Path) -> None:
    """Servers close those that idle, and models take their time to load."""
    before = fsspec.core.url_to_fs("memory:///run")[0]
    require_mirror("memory:///run")
    assert fsspec.core.url_to_fs("memory:///run")[0] is not before


S3 = """
from moto.server import ThreadedMotoServer as Server
server = Server(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
"""
GS = """
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True)
server.start()
print(server._api._httpd.server_port, flush=True)
"""
# Scheme -> what must be installed, a server that speaks it, and where its client looks for the address.
BUCKETS = {
    "s3": (("s3fs", "moto.server"), S3, "AWS_ENDPOINT_URL"),
    "gs": (("gcsfs", "gcp_storage_emulator.server"), GS, "STORAGE_EMULATOR_HOST"),
}


@pytest.mark.parametrize("scheme", BUCKETS)
def test_a_bucket(scheme: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that speaks S3 or Google's protocol, in a process of its own."""
    packages, code, address = BUCKETS[scheme]
    for package in packages:
        pytest.importorskip(package, reason='pip install s3fs "moto[server]" gcsfs gcp-storage-emulator')
    command = [sys.executable, "-c", f"{code}\nimport time\ntime.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=-3, text=True) as server:
        assert server.stdout is not None
        monkeypatch.setenv(address, f"http://127.0.0.1:{server.stdout.readline().strip()}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        try:
            fsspec.filesystem(scheme).mkdir("photos")
            make(photos, tmp_path / "a", f"{scheme}://photos/run")
            assert far(f"{scheme}://photos/run") == parts(tmp_path / "a")
            assert make(photos, tmp_path / "b", f"{scheme}://photos/run").asked == 0
            assert parts(tmp_path / "b") == parts(tmp_path / "a")
        finally:
            server.kill()
