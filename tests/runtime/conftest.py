"""A tiny bundle, open, and servers that run while a test does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mpa_edge.bundle import Bundle
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.server import create_app


@pytest.fixture(scope="session")
def running() -> Callable[..., AbstractContextManager[tuple[str, uvicorn.Server]]]:
    """`with running(vlm, **options_of_create_app) as (address, server)`: stopped at the end as a signal would."""
    return _running


@contextmanager
def _running(vlm: BundleVlm, **options: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """See `running`."""
    app = create_app(vlm, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(tiny_one_tile: Path, tmp_path_factory: pytest.TempPathFactory, gguf_bundle: Any) -> tuple[Path, Bundle]:
    """The folder of a tiny bundle, and its manifest."""
    folder = tmp_path_factory.mktemp("served") / "f16"
    return folder, gguf_bundle(tiny_one_tile, folder, template="Q: {question}", tokens=8)


@pytest.fixture(scope="session")
def vlm(served: tuple[Path, Bundle]) -> Iterator[BundleVlm]:
    with open_bundle(*served, threads=1) as opened:
        yield opened
