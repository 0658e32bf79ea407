"""A chat server behind the `Vlm` interface: vLLM, SGLang, llama-server, or any host that speaks chat completions.

What can go wrong ends in one of three ways:

    this picture's fault    refused, filtered, too large, a reply that cannot be read    `Answer.error`, the run goes on
    the server's fault      down, overloaded, wrong key, unknown model                   `ModelError` at once
    the budget is spent     `max_requests` are sent                                      `BudgetSpent` at once

What may pass by itself (429, 5xx, a lost connection, a time-out) the `openai` client tries again first: after 0.5, 1,
2, 4 and then every 8 seconds, or when the server's Retry-After says (up to two minutes). Meanwhile fewer requests are
sent at once, and where there are several servers of the model, to those that bear them (`mpa_edge.chat_fleet`).
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import openai
from PIL import Image

from mpa_edge.chat_address import KEYS, api_key, parse_spec
from mpa_edge.chat_fleet import Fleet, FleetClient
from mpa_edge.chat_messages import ENCODING, NO_ANSWER, answer_of, failed, request_of
from mpa_edge.errors import AGAIN, BudgetSpent, InputError, ModelError
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding, Timings

CONNECT_SECONDS = 10.0
# How long a server may take to say that it is there.
ALIVE_SECONDS = 30.0
# How long requests on their way are waited for when a call ends sooner than they.
LEAVE_SECONDS = 2.0
# So many failed requests in a row, without one answer, are the server's fault and not the pictures'.
FAILED_IN_A_ROW = 8
GO_ON = f"What is finished is kept: {AGAIN} to go on."
CHECK = "Look at the server, or what stands between."
# Answers that no other picture would change.
CURES = {
    401: f"Put a key that it accepts into {KEYS[0]} ({KEYS[1]} goes to openai.com only).",
    402: "The account behind the key has to be topped up.",
    403: f"The key (in {KEYS[0]}, for openai.com in {KEYS[1]}) may not use this model.",
    404: "Name a model that it serves after the #, and check the address: most end in /v1.",
    429: "Lower --concurrency, or wait.",
    502: "Is the model behind it running?",
    503: "Is it still loading, or overloaded? Then lower --concurrency, or wait.",
    504: "Is it overloaded? Then lower --concurrency, or wait.",
}
# Answers and models' names are written to files, and a server may repeat a request's headers in them. A shorter key is
# a dummy for a server of one's own, such as "none" or "EMPTY": a word that a picture, or a name, may show.
SHORTEST_KEY = 8
MODERATED = re.compile(r"moderation|flagged|content.?(policy|filter)", re.IGNORECASE)


class ChatVlm:
    """A model on a chat server. `name` is the model's id without its owner, unless the caller has a better one."""

    engine = "chat"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        name: str | None = None,
        longest_edge: int | None = None,
        max_requests: int | None = None,
        concurrency: int = 8,
        max_retries: int = 8,
        timeout: float = 180.0,
    ) -> None:
        """Talk to the server at `url` (with its /v1), from the first question on; `InputError` as `parse_spec`. Several
        servers of the model are separated by commas; each gets up to `concurrency` requests at once.

        Pictures whose longer edge exceeds `longest_edge` pixels are scaled down before they are sent. `max_requests`
        caps what is sent, for questions, by this object: attempts that failed count, as they may be billed too.
        `timeout` is in seconds and for one attempt. The key comes from the environment (`api_key`).
        """
        self.model = model
        self.name = name or model.rsplit("/", 1)[-1]
        self.longest_edge = longest_edge
        self.max_requests = max_requests
        # As many pictures as a caller should have open at once: more than are on their way, so that none waits long.
        self._url, _ = parse_spec(url)
        self._fleet = Fleet(self._url.split(","), concurrency, self._halt_if_over)
        first = self._fleet.servers[0].url
        self.concurrency = concurrency * len(self._fleet.servers)
        self.batch_size = 2 * self.concurrency
        self.sent = 0
        self._host = urlsplit(first).hostname or ""
        keys = [api_key(server.url) for server in self._fleet.servers]
        self._key = keys[0]  # several servers share one
        self._lock = threading.Lock()
        self._call = threading.local()  # `over` is set once a thread's call needs nothing any more
        self._failed = 0
        self._met = False
        self._client = openai.OpenAI(
            base_url=first,
            api_key=self._key or "none",  # the client insists on one, a server of one's own rarely does
            timeout=openai.Timeout(timeout, connect=CONNECT_SECONDS),
            max_retries=max_retries,
            http_client=FleetClient(self._fleet, event_hooks={"request": [self._count]}),
        )

    @classmethod
    def load(cls, spec: str, **settings: Any) -> ChatVlm:
        """The model that `http(s)://HOST/v1#MODEL` names; without `#MODEL`, the only one that the server has.

        Only then is the server asked at once: `ModelError` when none answers there or it refuses the key, `InputError`
        when it has several models. A run that has all its answers needs no server of a model that is named. Raises
        `InputError` for an address that cannot be used. `settings` are the constructor's.
        """
        url, model = parse_spec(spec)
        vlm = cls(url, model, **settings)
        if model:
            return vlm
        try:
            vlm.model = _only(vlm.served(), url)
            vlm.name = settings.get("name") or vlm.model.rsplit("/", 1)[-1]
        except BaseException:
            vlm.close()
            raise
        return vlm

    def served(self) -> list[str] | None:
        """The ids of the server's models, None where it has no list; `ModelError` when it cannot be talked to."""
        try:
            found = self._models()
        except openai.APIConnectionError as error:
            raise self._broken(f"no answer ({_root(error)})", "Start the server, or check the address.") from error
        except openai.APIStatusError as error:
            if error.status_code in (401, 402, 403):
                raise self._broken(self._reason(error), CURES[error.status_code], error) from error
            found = None
        except ValueError:  # not JSON
            found = None
        self._met = True
        entries = found.get("data") if isinstance(found, dict) else None
        if not isinstance(entries, list):
            return None
        return [self._written(str(entry["id"])) for entry in entries if isinstance(entry, dict) and entry.get("id")]

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """As `Vlm.answer`, at most `concurrency` requests at a time. The time of an answer is from the first attempt to
        the end. After an error that ends the call, or Ctrl-C, nothing new is sent; requests on their way are waited for
        for a moment, and left behind if they take longer.

        Before the first question the server must say that it is there, or `ModelError` comes in seconds.
        """
        if len(images) != len(prompts):
            raise InputError(f"{len(images)} pictures and {len(prompts)} prompts")
        if not self._met:
            self.served()
        futures: list[Future[Answer]] = [Future() for _ in images]
        waiting, over = deque(zip(futures, images, prompts, strict=True)), threading.Event()
        try:
            for _ in range(min(self.concurrency, len(waiting))):
                threading.Thread(target=self._work, args=(waiting, decoding, over), name="chat", daemon=True).start()
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for error in filter(None, (future.exception() for future in done)):
                raise error
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C too
            over.set()
            wait([future for future in futures if future.running()], LEAVE_SECONDS)
            raise

    def _work(
        self, waiting: deque[tuple[Future[Answer], Image.Image, str]], decoding: Decoding, over: threading.Event
    ) -> None:
        """What a thread does: ask until nothing waits. A daemon, unlike those of a pool: the process must be able to
        end while a server keeps it waiting."""
        self._call.over = over
        while not over.is_set():
            try:
                future, image, prompt = waiting.popleft()
            except IndexError:
                return
            future.set_running_or_notify_cancel()
            try:
                future.set_result(self._ask(image, prompt, decoding))
            except BaseException as error:
                future.set_exception(error)

    def describe(self) -> dict[str, Any]:
        """As `Vlm.describe`. The address is left out: a rented server comes back under another one, same model.
        Runs keep it among their settings."""
        return {
            "engine": self.engine,
            "model": self.model,
            "image": {"longest_edge": self.longest_edge, **ENCODING},
        }

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        self._client.close()

    def _ask(self, image: Image.Image, prompt: str, decoding: Decoding) -> Answer:
        request = request_of(self.model, self._host, image, prompt, decoding, self.longest_edge)
        started = time.perf_counter()
        try:
            answer = answer_of(self._client.chat.completions.create(**request))
        except openai.APIError as error:
            answer = self._failure(error)
        except ValueError:
            answer = self._spoilt("the server's reply is no JSON")
        except Halt as halt:
            raise (halt.error or halt) from None
        else:
            if (answer.error or "").startswith(NO_ANSWER):
                answer = self._spoilt(str(answer.error))
            else:
                self._failed = 0
        text = self._written(answer.text)
        told = answer.error and self._clean(answer.error)
        return replace(answer, text=text, error=told, timings=Timings(total=(time.perf_counter() - started) * 1000))

    def _count(self, request: Any) -> None:
        """Called before each attempt."""
        self._halt_if_over()
        if request.method != "POST":
            return
        with self._lock:
            if self.max_requests is not None and self.sent >= self.max_requests:
                raise Halt(BudgetSpent(self.max_requests))
            self.sent += 1

    def _halt_if_over(self) -> None:
        over = getattr(self._call, "over", None)
        if over and over.is_set():
            raise Halt

    def _failure(self, error: openai.APIError) -> Answer:
        """What came of a request that failed for good: an answer that says why, or an error that ends the run."""
        reason = self._reason(error)
        status = getattr(error, "status_code", None)
        if status in CURES and not (status == 403 and MODERATED.search(reason)):
            raise self._broken(reason, CURES[status], error) from error
        lost = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
        if lost and not self._alive():
            raise self._broken(reason, "Start it again, or check the address.") from error
        return self._spoilt(reason, error) if status is None or status >= 500 else failed(reason)

    def _spoilt(self, reason: str, error: openai.APIError | None = None) -> Answer:
        """An answer that the server spoilt; too many of them in a row end the run."""
        with self._lock:
            self._failed += 1
        if self._failed >= FAILED_IN_A_ROW:
            raise self._broken(f"{FAILED_IN_A_ROW} requests in a row failed, the last one: {reason}", CHECK) from error
        return failed(reason)

    def _alive(self) -> bool:
        """Whether the server still talks to us, whatever it says: then it was the request that it could not bear."""
        try:
            self._models()
        except openai.APIConnectionError:
            return False
        except (openai.APIError, ValueError):
            return True
        return True

    def _models(self) -> Any:
        client = self._client.with_options(max_retries=0, timeout=ALIVE_SECONDS)
        return client.get("/models", cast_to=object)

    def _reason(self, error: openai.APIError) -> str:
        status = getattr(error, "status_code", None)
        if isinstance(error, openai.APITimeoutError):
            return "no answer in time"
        text = f"HTTP {status}: {_told(error)}" if status else _root(error)
        return self._clean(text)

    def _broken(self, reason: str, cure: str, error: openai.APIError | None = None) -> ModelError:
        """With `error`, of the server that it came from; else of all."""
        sent_to = str(error.request.url) if error else ""
        url = next((one.url for one in self._fleet.servers if sent_to.startswith(f"{one.url}/")), self._url)
        who = f"{url}#{self.model}" if self.model else url
        return ModelError(" ".join(filter(None, (f"{self._clean(f'{who}: {reason}')}.", cure, GO_ON))))

    def _clean(self, text: str) -> str:
        """Short, and without the key, which some servers repeat in what they say about it."""
        return re.sub(r"\s+", " ", self._hidden(text))[:300].strip(" .")

    def _written(self, text: str) -> str:
        """What ends up in files, without the key."""
        return self._hidden(text) if len(self._key) >= SHORTEST_KEY else text

    def _hidden(self, text: str) -> str:
        """Without the key."""
        return text.replace(self._key, "***") if self._key else text


class Halt(BaseException):
    """Nothing more is to be sent, because of the error given, or of another request's of the same call. No `Exception`:
    older clients take those for a lost connection, and try again."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(error)
        self.error = error


def _only(served: list[str] | None, url: str) -> str:
    if served is None:
        raise InputError(f"{url} does not list its models. Name one: {url}#MODEL (and most addresses end in /v1)")
    if len(served) != 1:
        listed = ", ".join(served[:20]) + (" …" if len(served) > 20 else "")
        raise InputError(f"{url} serves {len(served)} models: name one after a #, as in {url}#MODEL. It has: {listed}")
    return served[0]


def _told(error: openai.APIError) -> str:
    """What the server said: the message of its error object, else the beginning of its reply."""
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error")
        found = body.get("message") or body.get("detail") or (inner if isinstance(inner, str) else None)
        return str(found or body)
    return str(body or error.message)


def _root(error: BaseException) -> str:
    """What lies under the layers of a connection error: `[Errno 111] Connection refused`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
