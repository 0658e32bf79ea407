"""A real Ray with two actors: the local engine's files, though actors are killed and a node is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError
from mpa_edge.models import open_vlm
from mpa_edge.parts import read_parts
from mpa_edge.records import Annotation, Case
from mpa_edge.tasks import task_named
from mpa_edge.training_set import make_training_set

try:
    import ray  # noqa: F401
except ImportError:
    pytest.skip('needs Ray: pip install "mpa-edge[ray]"', allow_module_level=True)

PICTURES, CHUNK = 20, 2
# With seed 10 that is one of all the teacher's questions: to write about the picture whose red is 18.
DEADLY = "&die=0.02"

# A process of its own: Ray starts dozens of threads and processes, and is gone with it. `start` and `broken`, which is
# what asks, are between these two.
BEFORE = """
import json, os, signal, sys, threading, time
from mpa_edge.config import AlignConfig
from mpa_edge import ray_engine
from mpa_edge.training_set import make_training_set

annotations, first = ray_engine.OnRay.annotations, threading.Lock()
settings = json.loads(sys.argv[1])
size = dict(object_store_memory=80 << 20, include_dashboard=False)
"""
AFTER = """
try:
    start()
except Exception as error:
    sys.exit(f"Ray does not start: {error}" if "timed out" in str(error).lower() else error)
ray_engine.OnRay.annotations = broken
config = AlignConfig(**settings)
pool = ray_engine.RayPool(config)
make_training_set(config, pool.models["teacher"], pool.models["asked"], pool)
pool.close()
"""
ACTORS_DIE = """
ray_engine.DEATHS = 2

def start():
    handler = lambda *_: sys.exit("ended")
    signal.signal(signal.SIGTERM, handler)
    ray_engine._start(dict(size, num_cpus=2, log_to_driver=False))
    assert signal.getsignal(signal.SIGTERM) is handler, "Ray took SIGTERM"

def broken(self, *arguments):
    if first.acquire(blocking=False):  # done by the actor before what it is asked next, which is then in flight
        self.actor.__ray_call__.remote(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    return annotations(self, *arguments)
"""
# Two nodes with room for one actor each. The head's actor waits until the other node is being lost, so that there is
# something to do on both.
NODE_IS_LOST = """
from ray.cluster_utils import Cluster

cluster, lost = Cluster(), threading.Event()

def start():
    for _ in range(2):
        cluster.add_node(**size, num_cpus=1, dashboard_agent_listen_port=0)  # any port; Ray takes any for the others
    settings["address"] = cluster.address

def broken(self, *arguments):
    node = self.actor.__ray_call__.remote(lambda _: ray_engine.ray.get_runtime_context().get_node_id())
    if ray_engine.ray.get(node) == cluster.head_node.node_id:
        assert lost.wait(240), "no actor came up on the other node"
    else:
        self.actor.__ray_call__.remote(lambda _: time.sleep(600))  # what it is asked next is in flight
        threading.Thread(target=cluster.remove_node, args=(*cluster.worker_nodes, False)).start()
        lost.set()
    return annotations(self, *arguments)
"""
# A machine that is busy with other things needs longer to start a worker than Ray waits.
PATIENT = {"RAY_worker_register_timeout_seconds": "240"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`settings(out, teacher)`: of a run in which the teacher knows all pictures and the student half of them."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for red in range(PICTURES):
        image = Image.frombytes("RGB", (12, 12), random.Random(red).randbytes(12 * 12 * 3))
        image.save(folder / f"{red:02d}.png")
        says = {task_named("reference").annotate_prompt: f"What is the red of it? {red}", "What is the red": str(red)}
        rows += [{"image": f"{red:02d}.png", "question": asked, "answers": [said]} for asked, said in says.items()]
    known = folder / "known.jsonl"
    known.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(out: Path, teacher: str = "") -> dict[str, Any]:
        models = {"teacher": f"fake:?known={known}&seed=10&decode=30{teacher}"}
        models["student"] = f"fake:?known={known}&right=0.5"
        run = {"images": str(folder), "task": "reference", "out": str(out), "chunk_size": CHUNK, "questions": 2}
        return {**run, **models, "engine": "ray", "actors": 2}

    return make


def files(out: Path) -> dict[str, bytes]:
    """Everything but the lock and what times are in."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("run.json", "log.jsonl", ".lock") and "scan" not in path.name
    }


def drive(script: str, run: dict[str, Any]) -> str:
    """What the run told on a Ray of its own, of which `script` breaks something."""
    command = [sys.executable, "-c", BEFORE + script + AFTER, json.dumps(run)]
    # Its notes and sockets are nobody else's. Their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        code, told = run_alone(command, {**os.environ, **PATIENT, "RAY_TMPDIR": folder})
    if "Ray does not start" in told:  # Ray's own limit of half a minute
        pytest.skip("this machine is too busy for Ray to start")
    assert code == 0, told
    return told


def run_alone(command: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Exit status and stderr of a process in a session of its own, of which nothing is left: Ray's agents live on for
    minutes when a driver is killed."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True) as process:
        try:
            told = process.communicate(timeout=500)[1]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, told


def test_dying_actors_lose_what_is_in_flight_and_the_files_are_the_local_engines(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The first actor that is asked is killed, and one picture kills two; then the local engine asks what is left."""
    out, undisturbed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    told = drive(ACTORS_DIE, settings(out, DEADLY))
    assert told.count("goes to another one") == 2
    assert told.count("2 workers died over this part") == 1
    lost = [row for row in read_parts(out / "annotations", Annotation) if row.failed]
    assert {row.raw for row in lost} == {"2 workers died over this part"}
    assert len({row.sample_id for row in lost}) == CHUNK
    assert len({case.sample_id for case in read_parts(out / "cases", Case)}) == PICTURES - CHUNK

    for folder in (out, undisturbed):
        make(AlignConfig(**settings(folder)))
    found, wanted = files(out), files(undisturbed)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert len(list((out / "cases").glob("part-*.jsonl"))) == PICTURES // CHUNK
    assert all(case.reason is None for case in read_parts(out / "cases", Case))


def test_a_node_that_is_lost_while_it_asks_changes_no_file(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    out, undisturbed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    told = drive(NODE_IS_LOST, settings(out))
    assert told.count("goes to another one") == 1
    make(AlignConfig(**settings(undisturbed)))
    assert files(out) == files(undisturbed)
    assert len(list((out / "cases").glob("part-*.jsonl"))) == PICTURES // CHUNK


def test_an_address_where_no_ray_is_ends_in_one_line(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    from mpa_edge.ray_engine import RayPool

    with pytest.raises(InputError, match=r"--address 127\.0\.0\.1:1: no Ray answers there \(.*refused\)"):
        RayPool(AlignConfig(**settings(tmp_path), address="127.0.0.1:1"))


@pytest.mark.parametrize("address", [None, "auto"])
def test_sigterm_stays_whose_it_was(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true Ray is seen to leave it alone by the driver above; here is every way to it, and what fails too."""
    from mpa_edge import ray_engine

    def init(*_: Any, **__: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        raise ConnectionError("no cluster")

    def ours(*_: Any) -> None: ...

    monkeypatch.setattr(ray_engine.ray, "init", init)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(InputError, match="no cluster"):
            ray_engine._connect(address)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def make(config: AlignConfig) -> None:
    """By the local engine."""
    make_training_set(config, open_vlm(config.teacher), open_vlm(config.student))


def test_flags_of_ray_go_with_ray(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    given = settings(tmp_path)
    with pytest.raises(InputError, match="--actors goes with --engine ray"):
        AlignConfig(**{**given, "engine": "local"})
    with pytest.raises(InputError, match="--max-requests does not go with --engine ray"):
        AlignConfig(**given, max_requests=5)
