"""Where a chat server is, and with which key one talks to it. Nothing secret may come from an address: addresses end up
in files; keys come from the environment and stay there."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from mpa_edge.errors import InputError
from mpa_edge.progress import say

SCHEMES = ("http://", "https://")
# The first goes to whatever server is named. The second, which people have set for other tools too, goes to OpenAI
# alone, and not even there where the first is set, be it to nothing.
KEYS = ("MPA_EDGE_API_KEY", "OPENAI_API_KEY")


def is_address(spec: str) -> bool:
    """Whether a model's spec is the address of a server."""
    return spec.lower().startswith(SCHEMES)


def parse_spec(spec: str) -> tuple[str, str]:
    """Address and model of `http(s)://HOST/v1#MODEL`; `InputError` for what would carry a secret into files.

    Several servers of the model stand side by side: `http://A/v1,http://B/v1#MODEL`."""
    url, _, model = spec.partition("#")
    urls = [_checked(one) for one in url.split(",")]
    if len(urls) > 1 and any(is_openai(urlsplit(one).hostname or "") for one in urls):
        raise InputError("several addresses are for servers of one's own: OpenAI's has one")
    return ",".join(dict.fromkeys(urls)), model


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    except ValueError:
        host = None
    if not host or not is_address(url):
        raise InputError("the address of a chat server looks like http://localhost:8000/v1#MODEL, with a host")
    if "@" in parts.netloc or parts.query:
        raise InputError(
            f"{parts.scheme}://{host}{parts.path}: an address with a password or a ? in it would end up in files. "
            f"Put the key into the environment: {KEYS[0]}."
        )
    return url.rstrip("/")


def api_key(url: str) -> str:
    """The key for this server from the environment, or nothing. One that would cross a network unencrypted gets a
    line."""
    parts = urlsplit(url)
    host, encrypted = parts.hostname or "", parts.scheme == "https"
    names = KEYS if encrypted and is_openai(host) else KEYS[:1]
    name = next((name for name in names if name in os.environ), KEYS[0])
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{name} holds characters that cannot be in a key")
    if key and not encrypted and not _is_this_machine(host):
        say(f"{name} goes to {host} unencrypted: whoever is on the way can read it. Use https, or an SSH tunnel.")
    return key


def is_openai(host: str) -> bool:
    """Whether a host is OpenAI's own."""
    return host == "openai.com" or host.endswith(".openai.com")


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
