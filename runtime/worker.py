"""The one thread that owns the model, and the jobs that it does in the order in which they came."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from queue import SimpleQueue

from mpa_edge.errors import ModelError
from mpa_edge.runtime.answering import AnswerStream
from mpa_edge.runtime.vlm import Answer

Event = str | Answer | Exception


class Job:
    """One question on its way: `events` gives pieces of text, then the answer, or the exception that ended it."""

    def __init__(self, start: Callable[[], AnswerStream]) -> None:
        """`start` makes the stream; it is called in the worker's thread. Must be made in an event loop."""
        self._start: Callable[[], AnswerStream] | None = start
        self._stream: AnswerStream | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def events(self) -> AsyncIterator[Event]:
        """What the worker tells, up to the answer or the exception."""
        while True:
            event = await self._events.get()
            yield event
            if not isinstance(event, str):
                return

    def cancel(self) -> None:
        """Nobody waits for it any more: it is not started, or ends before its next token."""
        # The picture is let go of at once: a queue of cancelled jobs must weigh nothing.
        self._start = None
        if self._stream is not None:
            self._stream.cancel()

    def run(self) -> None:
        """Do it, in the worker's thread."""
        start = self._start
        if start is None:
            return
        try:
            self._stream = start()
            if self._start is None:
                return
            for piece in self._stream:
                self._tell(piece)
            self._tell(self._stream.answer or ModelError("cancelled"))
        except Exception as error:  # one failed question must not end the thread that answers all others
            self._tell(error)
        finally:
            self._start = None

    def _tell(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server is gone, and so is who asked
            self.cancel()


class Worker:
    """A thread that runs jobs one after the other."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mpa-edge-model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job behind those that wait."""
        self._jobs.put(job)

    @property
    def alive(self) -> bool:
        """Whether jobs still get done."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Do what waits, then end; returns when the thread has."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
