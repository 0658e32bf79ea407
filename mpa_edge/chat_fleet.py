"""Several servers of one model, and how many requests each of them bears at once.

Each gets as many requests as it answers in time: half as many from a sign of overload on (429, 502, 503, 504, a
time-out), one more after as many answers as there are requests at once, never more than was allowed. That is TCP's
rule (additive increase, multiplicative decrease), by which several clients also come to share a server. A Retry-After
keeps new requests away for so long. A server that cannot be reached, or behind whose address nobody answers (502, 503),
is left out for a second, then two, up to half a minute; its requests go to the others at once, since it did nothing of
them. So is one that failed (500 and the like) a few times in a row: one alone may be the picture's fault. Without that,
one that fails at once would look idle and draw them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition
from typing import Any

import openai

OVERLOADED = (429, 502, 503, 504)
ABSENT = (502, 503)
# So many other failures (500 …) without an answer in between are the server's fault.
BROKEN_AFTER = 4
LONGEST_REST = 120.0
LONGEST_ABSENCE = 30.0
# How soon a request that waits for room sees that it is no longer wanted.
LOOK_SECONDS = 0.2


@dataclass
class Server:
    """One server: where it is, and how it does. Times are of the monotonic clock, in seconds."""

    url: str
    most: int
    limit: float = 0.0
    running: int = 0
    cut_at: float = 0.0
    rests_until: float = 0.0
    missed_at: float = 0.0
    misses: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        self.limit = float(self.most)

    def has_room(self, now: float) -> bool:
        """Whether it may get one more request."""
        return now >= self.rests_until and self.bears_more

    @property
    def bears_more(self) -> bool:
        """Whether fewer requests are under way than it bears."""
        return self.running < int(self.limit)

    def answered(self, started: float, status: int, retry_after: float) -> None:
        """What an answer to a request that was sent at `started` says about it."""
        self.failed = self.failed + 1 if status >= 500 and status not in OVERLOADED else 0
        if self.failed >= BROKEN_AFTER:
            self.missed(started)
            return
        if status in OVERLOADED:
            self.slow_down(started)
            if status in ABSENT and not retry_after:
                self.missed(started)
                return
            self.rests_until = max(self.rests_until, time.monotonic() + min(retry_after, LONGEST_REST))
        elif status < 400:
            self.limit = min(self.limit + 1 / self.limit, float(self.most))
            if self.misses:  # it is back
                self.rests_until = 0.0
        self.misses = 0

    def slow_down(self, started: float) -> None:
        """Halve, once for all requests that were under way together."""
        if started >= self.cut_at:
            self.limit = max(1.0, min(self.limit, self.running) / 2)
            self.cut_at = time.monotonic()

    def missed(self, started: float) -> None:
        """Nobody was there: rest for longer, once for all requests that were under way together."""
        if started >= self.missed_at:
            self.misses += 1
            self.missed_at = time.monotonic()
            self.rests_until = self.missed_at + min(2.0 ** (self.misses - 1), LONGEST_ABSENCE)


class Fleet:
    """The servers at `urls`, with at most `most` requests at once on each. `check` is called by requests that wait for
    room; what it raises ends them."""

    def __init__(self, urls: Sequence[str], most: int, check: Callable[[], None] = lambda: None) -> None:
        self.servers = [Server(url, most) for url in urls]
        self._check = check
        self._change = Condition()

    def take(self, tried: Sequence[Server] = ()) -> Server:
        """The server for a request, the least busy one; waits for room. Those in `tried` are the last choice."""
        with self._change:
            while True:
                now = time.monotonic()
                left = [server for server in self.servers if server not in tried] or self.servers
                free = [server for server in left if server.has_room(now)]
                if not free and all(server.misses for server in left):
                    # Nobody is there: whoever asks shall hear that, and how often to try again is for them to say.
                    free = sorted((one for one in left if one.bears_more), key=lambda one: one.rests_until)[:1]
                if free:
                    server = min(free, key=lambda server: server.running / server.limit)
                    server.running += 1
                    return server
                self._change.wait(LOOK_SECONDS)
                self._check()

    def give(self, server: Server, tell: Callable[[], None]) -> None:
        """A request is over; `tell` notes how it went."""
        with self._change:
            tell()
            server.running -= 1
            self._change.notify_all()


class FleetClient(openai.DefaultHttpxClient):
    """The HTTP client of the `openai` client, which sends what is meant for the first server to any of the fleet."""

    def __init__(self, fleet: Fleet, **options: Any) -> None:
        super().__init__(**options)
        self._fleet = fleet

    def send(self, request: Any, **options: Any) -> Any:
        """As `Client.send`; waits until a server has room."""
        servers, tried = self._fleet.servers, list[Server]()
        path = request.url.path.removeprefix(type(request.url)(servers[0].url).path)
        while True:
            server, started = self._fleet.take(tried), time.monotonic()
            if len(servers) > 1:
                request.url = type(request.url)(server.url + path)
                request.headers["Host"] = request.url.netloc.decode("ascii")
            try:
                response = super().send(request, **options)
            except BaseException as error:
                # By name: newer openai clients bring an HTTP library with classes of its own.
                kinds = {kind.__name__ for kind in type(error).__mro__}
                if kinds & {"ConnectError", "ConnectTimeout"}:
                    self._fleet.give(server, lambda: server.missed(started))  # noqa: B023 (called at once)
                    tried.append(server)
                    if len(tried) < len(servers):
                        continue
                elif "TimeoutException" in kinds:
                    self._fleet.give(server, lambda: server.slow_down(started))  # noqa: B023 (called at once)
                else:
                    self._fleet.give(server, lambda: None)
                raise
            status, rest = response.status_code, _retry_after(response.headers)
            self._fleet.give(server, lambda: server.answered(started, status, rest))  # noqa: B023 (called at once)
            tried.append(server)
            if status not in ABSENT or len(tried) >= len(servers):
                return response
            response.close()


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks for; a date, which hardly any gives, is left to the client that tries again."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    return 0.0
