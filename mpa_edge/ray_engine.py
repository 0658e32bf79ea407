"""The Ray engine: parts of the pictures are asked about by a pool of actors, each of which holds the models.

Rows come back to this process, which writes the parts: nodes need no common folder for them, and files, resume and
Ctrl-C are the local engine's. What every node needs are mpa-edge, the pictures and the models under the same paths
(NFS, a mounted bucket, hub ids), for later rounds the run's folder too, and for a chat server the key in its own
environment.

An actor holds the teacher and whoever is asked in the student's place, so that what was computed of a picture is at
hand when it comes again; in later rounds the student alone. All are gone before training begins.

When an actor dies (killed, out of memory, its node lost), its part goes to another one. A part over which `DEATHS`
actors died is written as failed, with the reason; the next run asks it again, as it does all that failed.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from mpa_edge.askers import Asks, Part, Work
from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError, ModelError, MpaEdgeError
from mpa_edge.opening import open_asks
from mpa_edge.progress import say
from mpa_edge.records import Annotation, Case, Sample
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.todo import Todo

# One death may be a node's fault, and two may be; a part that took three actors with it is to blame itself.
DEATHS = 3
# After so long without room for an actor a line says so.
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.5
CONNECT_SECONDS = 10.0


class Worker:
    """What runs in an actor. Errors that are meant for the user come back as values: Ray would wrap them."""

    def open(self, settings: dict[str, Any], student: str | None) -> tuple[Any, MpaEdgeError | None]:
        """Load the models, with `student` that alone; what each of them is, by side."""
        try:
            self._asks = open_asks(AlignConfig(**settings), student)
        except MpaEdgeError as error:
            return None, _plain(error)
        return {side: (vlm.name, vlm.engine, vlm.describe()) for side, vlm in self._asks.models.items()}, None

    def ask(self, kind: str, *arguments: Any) -> tuple[Any, MpaEdgeError | None]:
        """The rows that `annotations` or `cases` of an `Asker` gives."""
        try:
            return getattr(self._asks, kind)(*arguments), None
        except MpaEdgeError as error:
            return None, _plain(error)


class WorkerDied(Exception):
    """An actor is gone; the text says how."""


@dataclass(frozen=True)
class OnRay:
    """The asker that an actor is."""

    actor: Any

    def annotations(self, samples: Sequence[Sample], known: Sequence[Annotation]) -> list[Annotation]:
        """As `Asker.annotations`; `WorkerDied` when the actor does not live to answer."""
        rows: list[Annotation] = _result(self.actor.ask.remote("annotations", samples, known))
        return rows

    def cases(self, rows: Sequence[Any], pictures: Mapping[str, Path], known: Sequence[Case]) -> list[Case]:
        """As `Asker.cases`; `WorkerDied` likewise."""
        cases: list[Case] = _result(self.actor.ask.remote("cases", rows, pictures, known))
        return cases


@dataclass
class Told:
    """In this process, in the place of a model that the actors hold: what it says of itself."""

    name: str
    engine: str
    described: dict[str, Any]
    pool: RayPool

    def answer(self, images: Sequence[Any], prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[Answer]:
        """Not from here."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the actors' model says."""
        return self.described

    def close(self) -> None:
        """Nobody asks any more: end the actors of all models."""
        self.pool.close()


class RayPool:
    """Actors with the models of `config` on the cluster at its `address`, or on a Ray of this machine alone.

    `student` names the one that is asked again, alone. The first actor is up when this returns; `models` says what it
    holds (`teacher` and `asked`). Raises `InputError` when there is no such cluster or no room for an actor in all of
    it, and what opening the models raises.
    """

    def __init__(self, config: AlignConfig, student: str | None = None) -> None:
        self._settings = _absolute(config.to_json())
        self._student = student and str(Path(student).absolute())
        self._actors: list[Any] = []  # all that were made, and those that wait for work
        self._idle: list[Any] = []
        self._told: dict[str, tuple[str, str, dict[str, Any]]] = {}
        self._ours = _connect(config.address)
        try:
            self._needs, self._size = _room(config)
            first = self._open(Todo([None]))
            assert first is not None
            self._idle.append(first)
        except BaseException:
            self.close()
            raise
        self.models = {side: Told(*told, self) for side, told in self._told.items()}

    def each(self, asks: Asks, parts: Iterable[Part], work: Work) -> Generator[Part, None, None]:
        """As `Engine.each`: as many parts at once as there are actors."""
        todo = Todo(parts)
        with ThreadPoolExecutor(self._size, thread_name_prefix="ray") as threads:
            for _ in range(self._size):
                threads.submit(self._serve, todo, asks, work)
            try:
                yield from todo.finished()
            except BaseException:  # Ctrl-C too
                todo.end()
                self._kill()  # threads that wait for an answer get on
                raise

    def close(self) -> None:
        """End all actors, and Ray where it was started or joined by us. Safe to call twice."""
        if ray.is_initialized():
            self._kill()
            if self._ours:
                ray.shutdown()

    def _kill(self) -> None:
        while self._actors:
            ray.kill(self._actors.pop())
        self._idle.clear()

    def _serve(self, todo: Todo[Part], asks: Asks, work: Work) -> None:
        """One thread: keeps an actor alive and gives it one part at a time."""
        try:
            while (actor := self._open(todo)) and (item := todo.take()):
                part, deaths = item
                try:
                    work(OnRay(actor), part)
                except WorkerDied as death:
                    if todo.ended:
                        return
                    self._drop(actor)
                    if deaths + 1 < DEATHS:
                        say(f"a worker died ({death}); its part {part[0]} goes to another one")
                        todo.back(part)
                        continue
                    reason = f"{DEATHS} workers died over this part"
                    say(f"{reason}, number {part[0]}, the last one: {death}; it is recorded as failed")
                    work(asks.unanswered(reason), part)
                else:
                    self._idle.append(actor)
                todo.done(part)
        except BaseException as error:
            todo.end(error)

    def _open(self, todo: Todo[Any]) -> Any:
        """An actor with its models loaded, as soon as there is room for it; None when there is nothing left to do."""
        for attempt in range(DEATHS):
            if todo.over:
                return None
            with suppress(IndexError):
                return self._idle.pop()
            remote: Any = ray.remote(Worker)
            actor = remote.options(**self._needs).remote()
            self._actors.append(actor)
            try:
                told = _result(actor.open.remote(self._settings, self._student), todo)
            except WorkerDied as death:
                if todo.ended:
                    return None
                self._drop(actor)
                say(f"a worker died while it loaded the models ({death}), attempt {attempt + 1} of {DEATHS}")
                continue
            if told is None:
                return None
            self._told = self._told or told
            if told != self._told:
                raise InputError(f"--engine ray: the nodes hold different models: {self._told}, and {told}")
            return actor
        raise ModelError("workers die while they load the models. Give each more: --gpus-per-actor, or fewer --actors.")

    def _drop(self, actor: Any) -> None:
        self._actors.remove(actor)
        ray.kill(actor)  # one that only cannot be reached may live


def _result(reference: Any, todo: Todo[Any] | None = None) -> Any:
    """What an actor returns. With `todo`, None as soon as that is over, and a line when nothing comes for long."""
    started: float | None = time.monotonic()
    try:
        while todo and not ray.wait([reference], timeout=LOOK_SECONDS)[0]:
            if todo.over:
                return None
            if started and time.monotonic() - started > PATIENCE_SECONDS:
                say("a worker is not ready yet: it still loads its models, or the cluster has no room for it now")
                started = None
        value, error = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a bug, with the actor's traceback
    except ray.exceptions.RayError as error:
        raise WorkerDied(_short(error)) from None
    if error is not None:
        raise error
    return value


def _connect(address: str | None) -> bool:
    """Whether this joined or started Ray; False where the caller's own process had."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address is None:
            _start(quiet | {"include_dashboard": False})
        else:
            host, _, port = address.rpartition(":")
            if host:
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself tries for minutes
            _init(address, quiet)
    except Exception as error:  # Ray raises plain ones too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        who = f"--address {address}: no Ray answers there" if address else "--engine ray: Ray does not start here"
        raise InputError(f"{who} ({reason[:200]})") from error
    return True


def _start(options: dict[str, Any]) -> None:
    """Ray waits half a minute for its processes, which is little on a machine that is busy with other things."""
    for last in (False, False, True):
        try:
            _init("local", options)
            return
        except Exception:
            if last:
                raise
            ray.shutdown()


def _init(address: str, options: dict[str, Any]) -> None:
    """Ray takes SIGTERM for itself where it can; it stays whose it was, so that the run ends in good order."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **options)
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _room(config: AlignConfig) -> tuple[dict[str, Any], int]:
    """What one actor needs, as Ray's options, and how many of them there are."""
    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(has.get("CPU", 1)), int(has.get("GPU", 0))
    each = config.gpus_per_actor if config.gpus_per_actor is not None else float(gpus > 0)
    if each > gpus and config.actors is None:
        raise InputError(
            f"--gpus-per-actor {each:g}: the cluster has {gpus} GPUs. Should it grow, say how many --actors."
        )
    fit = cpus if not each else min(cpus, int(gpus * (1 // each) if each < 1 else gpus // each))
    return {"num_cpus": 1, "num_gpus": each, "max_restarts": 0}, config.actors or max(1, fit)


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with absolute paths where there is such a file or folder: actors run somewhere else."""
    paths = {name: settings[name] for name in ("teacher", "student", "ask", "task") if settings[name]}
    found = {name: Path(path).expanduser() for name, path in paths.items()}
    return settings | {name: str(path.absolute()) for name, path in found.items() if path.exists()}


def _plain(error: MpaEdgeError) -> MpaEdgeError:
    """Of a kind that can travel: some errors are made of more than their text."""
    return (InputError if isinstance(error, InputError) else ModelError)(str(error))


def _short(error: Exception) -> str:
    """How an actor ended, without the ids and the advice around it."""
    detail = re.search(r"exit detail: (.*?)\. ", f"{error} ") or re.match(r"(.*)", str(error))
    return re.sub(r"[0-9a-f]{16,} ", "", detail[1])[:100] if detail else type(error).__name__
