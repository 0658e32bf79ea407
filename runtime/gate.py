"""The door in front of the model: who may come in, how many at once, and how much they may bring.

Admission comes before the body is read, so that a crowd of clients with large pictures takes no more memory than the
queue has places.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpa_edge.runtime.metrics import Metrics

# A picture of 24 MB in base64, and some room for the conversation.
MAX_BODY = 33_000_000
BODY_SECONDS = 60.0
RETRY_SECONDS = 1


def problem(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(content, status, headers)


BUSY = problem(429, "all places in the queue are taken; try again", "queue_full", {"Retry-After": str(RETRY_SECONDS)})


class KnownNames:
    """ASGI middleware. Answers under the given names only, so that no page from elsewhere reaches a server on this
    machine by a name that it lets point here (DNS rebinding). Names are lower case, IPv6 addresses in brackets."""

    def __init__(self, app: ASGIApp, *, names: Sequence[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan" or self._knows(Headers(scope=scope).get("host", "")):
            return await self._app(scope, receive, send)
        await problem(400, "the Host header is none of this server's names")(scope, receive, send)

    def _knows(self, host: str) -> bool:
        return re.sub(r":[0-9]*\Z", "", host.lower()) in self._names


class Gate:
    """ASGI middleware. Paths under /v1 need the key, where there is one; POSTs there also need a place inside."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], places: int, metrics: Metrics) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._places = places
        self._metrics = metrics
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        refusal = self._refusal(Headers(scope=scope), scope["method"])
        if refusal is not None:
            self._metrics.requests.labels("refused").inc()
            return await refusal(scope, receive, send)
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if self._inside >= self._places:
            self._metrics.requests.labels("busy").inc()
            # Most clients do not listen before they have sent everything.
            await _drain(receive)
            return await BUSY(scope, receive, send)
        self._inside += 1
        self._metrics.inside.set(self._inside)
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
            self._metrics.inside.set(self._inside)

    def _refusal(self, headers: Headers, method: str) -> Response | None:
        if self._keys and not self._knows(headers.get("authorization", "")):
            return problem(401, "the API key is missing or wrong", "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        if method != "POST":
            return None
        # A page from elsewhere can make a browser send plain text here unasked, but not JSON.
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return problem(415, "the body must be application/json")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return problem(413, f"the body is larger than {MAX_BODY:,} bytes", headers={"Connection": "close"})
        return None

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode()
        return scheme.lower() == "bearer" and any(hmac.compare_digest(given, known) for known in self._keys)


class BodyTooLarge(Exception):
    """More came than may."""


async def read_body(receive: Receive) -> bytes | None:
    """The whole body, None when the client left. Raises `BodyTooLarge` above `MAX_BODY` bytes, and
    `asyncio.TimeoutError` when it is not there within `BODY_SECONDS`."""
    return await asyncio.wait_for(_read(receive), BODY_SECONDS)


async def _read(receive: Receive) -> bytes | None:
    body = bytearray()
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise BodyTooLarge
        if not message.get("more_body"):
            return bytes(body)


async def _drain(receive: Receive) -> None:
    """Read a body away, a piece at a time, within the limits of one that would be used."""

    async def read() -> None:
        left = MAX_BODY
        while left > 0:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return
            left -= len(message.get("body", b""))

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        return
