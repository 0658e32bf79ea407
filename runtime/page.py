"""The page at /: one HTML file, whose own script and style are the only ones that the browser may run."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from starlette.responses import HTMLResponse

from mpa_edge.bundle import Bundle

ABOUT = "<!--about-->"


def page(bundle: Bundle) -> HTMLResponse:
    """The page of a bundle, with a policy that lets it talk to its own server and to nobody else."""
    about = f"{bundle.name} · {bundle.engine} · {bundle.quantization}"
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace(ABOUT, html.escape(about))
    policy = {
        "default-src": "'none'",
        "script-src": _digest(text, "script"),
        "style-src": _digest(text, "style"),
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def _digest(text: str, tag: str) -> str:
    """The one element's content as the policy names it."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
