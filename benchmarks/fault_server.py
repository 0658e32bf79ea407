"""A teacher behind a chat server that misbehaves on command, and answers the same to the same picture otherwise."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from mpa_edge.fake import WORDS, picture_digest
from mpa_edge.tasks import task_named

MODEL = "teacher"
MANNERS = ("429", "500", "503", "slow", "never", "rubbish", "wrong", "half", "reset")
# Longer than the time-out that the clients of `fault_programs` have.
NEVER = 8.0


@dataclass
class Trouble:
    """What is wrong from request `first`, from 1, on, for `count` requests."""

    manner: str
    first: int
    count: int


class Teacher(ThreadingHTTPServer):
    """Serves as long as the context is open. `trouble` may be set and taken away at any time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.trouble: Trouble | None = None
        self.asked = self.spoilt = 0
        self.lock = threading.Lock()

    def __enter__(self) -> Teacher:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def address(self) -> str:
        """What `--teacher` takes."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1#{MODEL}"

    def expect(self, trouble: Trouble | None) -> None:
        """Count requests from 1 again; `trouble` is what becomes of some of them."""
        with self.lock:
            self.asked, self.spoilt, self.trouble = 0, 0, trouble

    def next_manner(self) -> str:
        """What becomes of the request that has just come; empty for an answer."""
        with self.lock:
            self.asked += 1
            trouble = self.trouble
            if trouble is None or not trouble.first <= self.asked < trouble.first + trouble.count:
                return ""
            self.spoilt += 1
            return trouble.manner

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Teacher

    def do_GET(self) -> None:  # the name that http.server calls
        self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        manner = self.server.next_manner()
        if manner.isdigit():
            self._send(int(manner), {"error": {"message": "try later"}}, {"retry-after-ms": "20"})
        elif manner == "never":
            time.sleep(NEVER)
            self.close_connection = True
        elif manner == "rubbish":
            self._send(200, "<html><body>Welcome to nginx!</body></html>")
        elif manner == "wrong":
            self._send(200, {"object": "chat.completion", "choices": []})
        elif manner == "half":
            self._send(200, _reply(request), cut=True)
        elif manner == "reset":
            self._cut()
        else:
            time.sleep(0.4 if manner == "slow" else 0)
            self._send(200, _reply(request))

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self._cut()

    def _cut(self) -> None:
        # Linger of no seconds: the connection is reset instead of closed.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing: the harness tells what it did."""


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    picture, text = request["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    content = answer(Image.open(io.BytesIO(data)), text["text"])
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 9}}


def answer(image: Image.Image, prompt: str) -> str:
    """A question with its answer where a question is asked for, else an answer, mostly the same one: by picture."""
    digest = picture_digest(image)
    word = WORDS[int(digest[:8], 16) % len(WORDS)]
    if prompt in task_named("reference").annotate_prompts:
        turn = hashlib.sha256(prompt.encode()).hexdigest()[:4]
        return f"What stands at {digest[:6]} {turn}? {word}"
    return word if random.Random(digest + prompt).random() < 0.8 else "elsewhere"
