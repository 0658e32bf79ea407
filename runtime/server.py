"""A bundle behind the OpenAI API: POST /v1/chat/completions, GET /v1/models, /health, /metrics, and a page at /.

The model belongs to one thread (`worker.py`); in front of it are a bounded number of places (`gate.py`). What a client
gets beyond OpenAI's fields is under the key `mpa_edge`: milliseconds by phase and the answer's log-probability.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from mpa_edge.errors import InputError, MpaEdgeError
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.chat_request import ChatRequest, parse
from mpa_edge.runtime.gate import BodyTooLarge, Gate, KnownNames, problem, read_body
from mpa_edge.runtime.metrics import Metrics
from mpa_edge.runtime.page import page
from mpa_edge.runtime.patience import Impatient
from mpa_edge.runtime.remote_image import fetch
from mpa_edge.runtime.vlm import Answer
from mpa_edge.runtime.worker import Job, Worker

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # as in a URL
CONNECTIONS = 512  # more of them are turned away with 503 before they cost anything
GRACE_SECONDS = 30

log = logging.getLogger("mpa_edge.server")
Result = TypeVar("Result")


class Service:
    """What the routes share."""

    def __init__(self, vlm: BundleVlm, *, raw: bool, remote: bool) -> None:
        self.vlm = vlm
        self.raw = raw
        self.remote = remote
        self.metrics = Metrics()
        self.worker: Worker | None = None
        self.since = int(time.time())

    async def job(self, request: ChatRequest) -> Job:
        """The question as a job for the worker; fetches the picture where it lies elsewhere."""
        url, turns = request.conversation()
        decoding = request.decoding(self.vlm.bundle.prompt.max_new_tokens)
        source: str | bytes = url
        if url[:5].lower() != "data:":
            if not self.remote:
                raise InputError("this server fetches no pictures; send the picture as a data: URL")
            source = await fetch(url)
        return Job(lambda: self.vlm.chat(source, turns, decoding, raw=self.raw))


def create_app(
    vlm: BundleVlm,
    *,
    api_keys: Sequence[str] = (),
    max_queue: int = 16,
    raw: bool = False,
    remote: bool = True,
    hosts: Sequence[str] = (),
) -> FastAPI:
    """The server of an open model, as an ASGI application.

    `max_queue` requests may wait while one is answered; further ones get 429. `raw` leaves the task's question template
    away. `remote` allows pictures by http(s) address. `hosts` are the names that the server may be called by, as
    `names_of` writes them; empty means any.
    """
    service = Service(vlm, raw=raw, remote=remote)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker = Worker()
        yield
        await asyncio.to_thread(service.worker.stop)

    # No documentation page: FastAPI's would load its scripts from elsewhere.
    app = FastAPI(title="mpa-edge", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, api_keys=api_keys, places=max_queue + 1, metrics=service.metrics)
    if hosts:
        app.add_middleware(KnownNames, names=hosts)
    app.add_exception_handler(HTTPException, _http_error)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _chat(service, request)

    @app.get("/")
    async def index() -> Response:
        return page(service.vlm.bundle)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.vlm.name, "object": "model", "created": service.since, "owned_by": "mpa-edge"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> Response:
        alive = service.worker is not None and service.worker.alive
        return JSONResponse({"status": "ok" if alive else "the model's thread is gone"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail))


async def _chat(service: Service, http: Request) -> Response:
    """One request: body, job, events; every way out is counted."""
    job: Job | None = None
    try:
        body = await read_body(http.receive)
        if body is None:
            raise _Gone
        request = await asyncio.to_thread(parse, body)
        del body
        if request.model not in (None, service.vlm.name):
            return _refused(service, 404, f"there is no model {request.model!r} here, only {service.vlm.name!r}")
        job = await _unless_gone(http, service.job(request))
        assert service.worker is not None
        service.worker.submit(job)
        events = job.events()
        first = await _unless_gone(http, anext(events) if request.stream else _last(events))
        if isinstance(first, Exception):
            raise first
        if request.stream:
            chunks = _stream(service, request, job, first, events)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
        assert isinstance(first, Answer)
        _count(service, first)
        return JSONResponse(_completion(service, first))
    except (asyncio.TimeoutError, BodyTooLarge) as error:
        status = 413 if isinstance(error, BodyTooLarge) else 408
        return _refused(service, status, "the body is too large" if status == 413 else "the body took too long")
    except InputError as error:
        return _refused(service, 400, str(error))
    except _Gone:
        service.metrics.requests.labels("cancelled").inc()
        if job is not None:
            job.cancel()
        return Response(status_code=499)  # nobody reads it
    except Exception as error:
        return problem(500, _failure(service, error))


class _Gone(Exception):
    """The client left."""


async def _unless_gone(http: Request, work: Awaitable[Result]) -> Result:
    """The result of the work, which is cancelled, with `_Gone`, when the client leaves before."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _last(events: AsyncIterator[str | Answer | Exception]) -> Answer | Exception:
    async for event in events:
        if not isinstance(event, str):
            return event
    raise AssertionError("events end with an answer or an exception")


def _refused(service: Service, status: int, why: str) -> Response:
    service.metrics.requests.labels("refused").inc()
    return problem(status, why, "model_not_found" if status == 404 else None)


def _failure(service: Service, error: Exception) -> str:
    """Count and log a failure; what the client is told of it."""
    service.metrics.requests.labels("failed").inc()
    log.error("a question failed", exc_info=error)
    return str(error) if isinstance(error, MpaEdgeError) else "the model failed; the server's log says how"


def _count(service: Service, answer: Answer) -> None:
    service.metrics.requests.labels("answered").inc()
    service.metrics.answered(answer)


async def _stream(
    service: Service,
    request: ChatRequest,
    job: Job,
    event: str | Answer | Exception,
    events: AsyncIterator[str | Answer | Exception],
) -> AsyncIterator[str]:
    """Server-sent events: a chunk with the role, one per piece, one with the finish reason, usage if wanted."""
    head = _head(service, "chat.completion.chunk")
    try:
        yield _sse({**head, "choices": [_delta({"role": "assistant", "content": ""})]})
        while isinstance(event, str):
            yield _sse({**head, "choices": [_delta({"content": event})]})
            event = await anext(events)
        if isinstance(event, Exception):
            message = _failure(service, event)
            yield _sse({"error": {"message": message, "type": "server_error", "param": None, "code": None}})
            return
        _count(service, event)
        yield _sse({**head, "choices": [_delta({}, event.finish_reason)], "mpa_edge": _told(event)})
        if request.stream_options and request.stream_options.include_usage:
            yield _sse({**head, "choices": [], "usage": _usage(event)})
        yield "data: [DONE]\n\n"
    finally:
        if isinstance(event, str):
            service.metrics.requests.labels("cancelled").inc()
            job.cancel()


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _delta(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.vlm.name,
    }


def _completion(service: Service, answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    told = {"usage": _usage(answer), "mpa_edge": _told(answer)}
    return {**_head(service, "chat.completion"), "choices": [choice], **told}


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, new = answer.prompt_tokens or 0, len(answer.tokens)
    cached = {"cached_tokens": answer.cached_tokens}
    tokens = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return {**tokens, "prompt_tokens_details": cached}


def _told(answer: Answer) -> dict[str, Any]:
    timings = {name: value and round(value, 3) for name, value in asdict(answer.timings).items()}
    return {"timings_ms": timings, "logprob": answer.logprob, "cached_tokens": answer.cached_tokens}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_url(host: str) -> str:
    """A host as it stands in a URL and in a Host header: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def names_of(host: str) -> tuple[str, ...]:
    """The names that a server which listens at `host` answers to; empty, for any, where other machines reach it."""
    return (*LOOPBACK, in_url(host).lower()) if is_loopback(host) else ()


def key_from(key: str | None, variable: str | None) -> tuple[str, ...]:
    """The keys that clients may send: the given one, and the one in an environment variable."""
    found = os.environ.get(variable, "") if variable else ""
    if variable and not found:
        raise InputError(f"--api-key-env {variable}: there is no such environment variable, or it is empty")
    return tuple(text for text in (key, found) if text)


def serve(
    bundle: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    max_queue: int = 16,
    threads: int | None = None,
    device: str = "auto",
    longest_edge: int | None = None,
    raw: bool = False,
    remote: bool = True,
) -> None:
    """Serve a bundle until SIGINT or SIGTERM; answers under way are finished first, within `GRACE_SECONDS`."""
    from mpa_edge.runtime import load

    with load(bundle, device=device, threads=threads, longest_edge=longest_edge) as vlm:
        app = create_app(vlm, api_keys=api_keys, max_queue=max_queue, raw=raw, remote=remote, hosts=names_of(host))
        uvicorn.run(
            app,
            host=host,
            port=port,
            http=Impatient,
            access_log=False,
            server_header=False,
            log_level="warning",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
