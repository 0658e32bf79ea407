"""Where a chat server is, and with which key one talks to it. Nothing secret may come from an address: addresses end up
in files; keys come from the environment and stay there."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from mpa_edge.errors import InputError

SCHEMES = ("http://", "https://")
# Our own name comes first, so that the key of a server of one's own need not displace the one for OpenAI. Set to
# nothing, it keeps OPENAI_API_KEY at home.
KEYS = ("MPA_EDGE_API_KEY", "OPENAI_API_KEY")


def is_address(spec: str) -> bool:
    """Whether a model's spec is the address of a server."""
    return spec.lower().startswith(SCHEMES)


def parse_spec(spec: str) -> tuple[str, str]:
    """Address and model of `http(s)://HOST/v1#MODEL`; `InputError` for what would carry a secret into files."""
    url, _, model = spec.partition("#")
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
            f"Put the key into the environment: {KEYS[0]} or {KEYS[1]}."
        )
    return url.rstrip("/"), model


def api_key() -> str:
    """The key from the environment, or nothing."""
    name = next((name for name in KEYS if name in os.environ), KEYS[0])
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{name} holds characters that cannot be in a key")
    return key
