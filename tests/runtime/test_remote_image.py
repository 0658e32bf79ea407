"""Pictures from the web: what may be reached, and that size, time and redirects are bounded."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mpa_edge.errors import InputError
from mpa_edge.runtime.remote_image import Address, fetch, is_public

PUBLIC = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"]
PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "::",
    "::1",
]
PRIVATE += [
    "::127.0.0.1",
    "64:ff9b:1::a00:1",
    "fec0::1",
    "fe80::1",
    "fd00::1",
    "224.0.0.1",
    "255.255.255.255",
    "::ffff:127.0.0.1",
    "64:ff9b::a00:1",
    "2002:a00:1::",
]


@pytest.mark.parametrize("address", PUBLIC + PRIVATE)
def test_only_addresses_on_the_open_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address)) == (address in PUBLIC)


class Web(BaseHTTPRequestHandler):
    """A small part of the web."""

    def do_GET(self) -> None:
        if self.path == "/picture":
            self._send(200, b"picture of " + self.headers["Host"].encode())
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif self.path == "/large":
            self._send(200, b"x" * 10_000)
        else:
            self._send(404, b"")

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def local(address: Address) -> bool:
    return address.is_loopback


def get(url: str, **options: object) -> bytes:
    return asyncio.run(fetch(url, allowed=local, **options))


def test_a_picture_comes_from_the_address_that_was_checked_under_its_own_name(web: str) -> None:
    assert get(f"{web}/picture") == b"picture of " + web.removeprefix("http://").encode()
    assert get(f"{web}/to//picture").startswith(b"picture")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/to/http://10.0.0.1/picture", "not a public one"),
        ("/to/file:///etc/passwd", "address must be"),
        ("/to/http://localhost:99999/picture", "port from 1 to 65535"),
        ("/to//to//to//to//to//picture", "redirects more than"),
        ("/large", "larger than"),
        ("/gone", "status 404"),
        ("/slow", "did not come within"),
    ],
)
def test_what_is_wrong_is_said(web: str, path: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        get(f"{web}{path}", max_bytes=5_000, seconds=0.5 if path == "/slow" else 60)


@pytest.mark.parametrize("url", ["ftp://localhost/x", "http://", "http://user:word@localhost/", "javascript:1", ""])
def test_only_plain_web_addresses_are_taken(url: str) -> None:
    with pytest.raises(InputError, match="address must be"):
        get(url)


@pytest.mark.parametrize("port", ["0", "65536", "99999", "9" * 30])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_a_port_that_does_not_exist_is_said(host: str, port: str) -> None:
    with pytest.raises(InputError, match="port from 1 to 65535"):
        get(f"http://{host}:{port}/x")


@pytest.mark.parametrize("url", ["http://localhost:1/x", "http://no.such.host.invalid/x", "http://[::1"])
def test_what_cannot_be_reached_is_said(url: str) -> None:
    with pytest.raises(InputError, match="cannot be fetched"):
        get(url)


def test_a_name_that_changes_its_mind_between_check_and_connection_gains_nothing(
    web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the first answer is harmless, all later ones are an address inside."""
    asked = []

    def resolve(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    port = web.rsplit(":", 1)[1]
    assert get(f"http://rebinding.example:{port}/picture") == f"picture of rebinding.example:{port}".encode()
    assert asked[0] == "rebinding.example"
    assert "rebinding.example" not in asked[1:]


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(InputError, match="not a public one"):
        asyncio.run(fetch("http://both.example/"))


def test_by_default_this_machine_is_out_of_reach(web: str) -> None:
    with pytest.raises(InputError, match="not a public one"):
        asyncio.run(fetch(f"{web}/picture"))
