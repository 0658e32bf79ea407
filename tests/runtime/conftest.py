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

from mpa_edge.bundle import Bundle, Source
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
def served(tiny_one_tile: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """The folder of a tiny bundle, and its manifest."""
    from transformers import AutoProcessor

    from mpa_edge.export.families import family_of, read_config
    from mpa_edge.export.merged import Names
    from mpa_edge.export.to_gguf import to_gguf

    folder = tmp_path_factory.mktemp("served") / "f16"
    processor, config = AutoProcessor.from_pretrained(tiny_one_tile), read_config(tiny_one_tile)
    family = family_of(config)
    files, _ = to_gguf(tiny_one_tile, {"f16": folder}, Names("tiny"))["f16"]
    return folder, Bundle(
        name="tiny-f16",
        family=family.name,
        engine="llama.cpp",
        quantization="f16",
        files=tuple(files),
        image=family.image_settings(config, processor),
        prompt=family.prompt_settings(config, processor, "Q: {question}", 8),
        source=Source(student="tiny", tool_version="0"),
    )


@pytest.fixture(scope="session")
def vlm(served: tuple[Path, Bundle]) -> Iterator[BundleVlm]:
    with open_bundle(*served, threads=1) as opened:
        yield opened
