"""A chat server that misbehaves on command."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from mpa_edge.chat_vlm import ChatVlm
from mpa_edge.runtime.vlm import Decoding

SOON = {"retry-after-ms": "5"}  # which the client obeys instead of its half a second and more
RED = Image.new("RGB", (32, 32), "red")
Script = Callable[[dict[str, Any], int], Any]


def reply(content: Any = "red", finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """A whole reply; `message` adds to the message."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 9}}


@dataclass
class Misbehaving:
    """A server that does what `script(request, number)` says: a reply, (status, body[, headers]), "hang" or "reset"."""

    script: Script
    models: Any = ("only",)
    port: int = 0
    http: ThreadingHTTPServer | None = None
    dead: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [prompt_of(request) for request in self.asked]

    def die(self) -> str:
        """As the process would: nobody listens any more, and what is under way is cut."""
        assert self.http is not None
        self.dead = True
        self.http.shutdown()
        self.http.server_close()
        return "reset"

    def handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if server.dead:
                    return self.cut()
                models = server.models
                if isinstance(models, tuple):
                    models = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
                self.send(*(models if isinstance(models, list) else (200, models)))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.asked.append(request)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    number = len(server.asked)
                found = server.script(request, number)
                if found == "hang":
                    server.released.wait(30)
                    self.close_connection = True
                elif found == "reset":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.wfile.flush()
                    self.cut()
                else:
                    self.send(*(found if isinstance(found, tuple) else (200, found)))

            def cut(self) -> None:
                # Linger of no seconds: the connection is reset instead of closed.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is cut on purpose is no news."""


@contextmanager
def serving(script: Script | None = None, **settings: Any) -> Iterator[Misbehaving]:
    server = Misbehaving(script or (lambda request, number: reply()), **settings)
    with Quiet(("127.0.0.1", server.port), server.handler()) as http:
        server.http, server.port = http, http.server_address[1]
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            http.shutdown()


def prompt_of(request: dict[str, Any]) -> str:
    (text,) = [part["text"] for part in request["messages"][0]["content"] if part["type"] == "text"]
    return str(text)


def ask(server: Misbehaving, *prompts: str, decoding: Decoding | None = None, **settings: Any) -> list[Any]:
    vlm = ChatVlm(server.url, "only", **{"max_retries": 2, **settings})
    try:
        return vlm.answer([RED] * len(prompts), prompts, decoding or Decoding())
    finally:
        vlm.close()
