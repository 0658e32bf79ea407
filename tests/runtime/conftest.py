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
from mpa_edge.runtime.patience import Impatient
from mpa_edge.runtime.server import create_app, in_url


@pytest.fixture(scope="session")
def running() -> Callable[..., AbstractContextManager[tuple[str, uvicorn.Server]]]:
    """`with running(vlm, host, **options_of_create_app) as (address, server)`: stopped at the end as a signal would."""
    return _running


@contextmanager
def _running(vlm: BundleVlm, host: str = "127.0.0.1", **options: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """See `running`."""
    app = create_app(vlm, **options)
    config = uvicorn.Config(app, host, port=0, http=Impatient, log_level="error", timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://{in_url(host)}:{server.servers[0].sockets[0].getsockname()[1]}", server
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


@pytest.fixture
def check_kept_pictures(picture: Callable[..., Any]) -> Callable[[BundleVlm, str], None]:
    """Answers are the same to the bit, log-probability too, whether the picture was kept, read again from its features,
    or encoded."""

    def told(answers: list[Any]) -> list[Any]:
        return [(answer.tokens, answer.logprob) for answer in answers]

    def check(vlm: BundleVlm, question: str) -> None:
        image, other = picture(200, 180, seed=1), picture(200, 40, seed=2)
        asked = [(image, question), (image, "How many? " * 40), (other, "Yes or no?"), (image, "Yes or no?")]
        alone = []
        for pair in asked:
            alone += vlm.ask_many([pair])
            vlm.logits([other], "?")  # forgets where the picture was
        kept = vlm.ask_many(asked)
        with vlm.look(image) as view, vlm.look(other) as second:
            vlm._engine.encode = None  # type: ignore[assignment,method-assign]  # from here on, nothing is encoded
            looked = [(second if seen is other else view).ask(text) for seen, text in asked]
        assert told(alone) == told(kept) == told(looked)
        assert [answer.cached_tokens > 0 for answer in alone] == [False] * 4
        assert [answer.cached_tokens > 0 for answer in kept] == [False, True, False, False]

    return check
