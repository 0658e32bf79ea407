"""The ways to ask a model that lies on this machine, and what each costs: one way in a process of its own.

    python -m mpa_edge.benchmarks.runtime_ways '{"way": "ours", "path": "bundles/gguf-q8_0", "threads": 2}'

The process tells when it is ready and then answers commands, one JSON object a line, so that somebody can have several
ways take turns (`benchmarks.runtime_speed`). Each way is written as a user of that library would.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol

from mpa_edge.benchmarks.host import peak_memory_bytes, resident_bytes
from mpa_edge.bundle import Bundle, read_bundle
from mpa_edge.records import Record


@dataclass(frozen=True)
class Job(Record):
    """Which way (a key of `WAYS`), the bundle or model folder that it opens, and on how many threads.

    `extra_buffers` False keeps llama.cpp from weights in layouts of its own, see `without_extra_buffers`. `depth` is
    for a way that gets no picture: the tokens that are in the cache when it decodes.
    """

    way: str
    path: str
    threads: int
    extra_buffers: bool = True
    depth: int = 0


@dataclass(frozen=True)
class Told:
    """What an answer took: new tokens, and where the way tells, the prompt's."""

    tokens: int
    prompt_tokens: int | None = None


class Way(Protocol):
    """A loaded model. Answers are greedy."""

    def ask(self, picture: Path, question: str, tokens: int) -> Told:
        """Answer in at most so many tokens."""
        ...

    def decode(self, picture: Path, question: str, tokens: int) -> tuple[int, float]:
        """Answer in so many tokens; how many came after the first one, and the seconds from that to the last."""
        ...


class Ours:
    """`mpa_edge.runtime`, as it is by default: what was computed of a picture is kept for further questions."""

    def __init__(self, job: Job) -> None:
        from mpa_edge.runtime import load

        self._vlm = load(job.path, device="cpu", threads=job.threads)

    def ask(self, picture: Path, question: str, tokens: int) -> Told:
        """See `Way.ask`."""
        answer = self._vlm.ask(picture, question, max_new_tokens=tokens)
        return Told(len(answer.tokens), answer.prompt_tokens)

    def decode(self, picture: Path, question: str, tokens: int) -> tuple[int, float]:
        """See `Way.decode`; no token ends the answer."""
        bundle = self._vlm.bundle
        endless = bundle.prompt.model_copy(update={"stop_token_ids": ()})
        self._vlm.bundle = bundle.model_copy(update={"prompt": endless})
        try:
            answer = self._vlm.ask(picture, question, max_new_tokens=tokens)
        finally:
            self._vlm.bundle = bundle
        return len(answer.tokens) - 1, (answer.timings.decode or 0) / 1000


class Handler:
    """llama-cpp-python's `MTMDChatHandler` on a bundle's pair of GGUF files."""

    def __init__(self, job: Job) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_chat_format import MTMDChatHandler

        bundle, model, mmproj = _pair(job)
        if not job.extra_buffers:
            without_extra_buffers()
        self._llama: Any = Llama(
            model_path=str(model),
            chat_handler=MTMDChatHandler(clip_model_path=str(mmproj), verbose=False),
            n_ctx=bundle.prompt.context_length,
            n_threads=job.threads,  # by default half the cores
            n_threads_batch=job.threads,
            verbose=False,
        )

    def ask(self, picture: Path, question: str, tokens: int) -> Told:
        """See `Way.ask`."""
        usage = self._llama.create_chat_completion(**_chat(picture, question, tokens))["usage"]
        return Told(usage["completion_tokens"], usage["prompt_tokens"])

    def decode(self, picture: Path, question: str, tokens: int) -> tuple[int, float]:
        """See `Way.decode`; the model may end the answer before."""
        chunks = self._llama.create_chat_completion(**_chat(picture, question, tokens), stream=True)
        times = [time.perf_counter() for chunk in chunks if chunk["choices"][0]["delta"].get("content") is not None]
        return (len(times) - 1, times[-1] - times[0]) if times else (0, 0.0)


class Transformers:
    """`generate` of transformers, float32 on the CPU."""

    def __init__(self, job: Job) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        torch.set_num_threads(job.threads)
        self._processor: Any = AutoProcessor.from_pretrained(job.path)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(job.path, dtype=torch.float32).eval()

    def ask(self, picture: Path, question: str, tokens: int) -> Told:
        """See `Way.ask`."""
        inputs = self._inputs(picture, question)
        whole = self._model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        read = int(inputs["input_ids"].shape[1])
        return Told(int(whole.shape[1]) - read, read)

    def decode(self, picture: Path, question: str, tokens: int) -> tuple[int, float]:
        """See `Way.decode`; no token ends the answer."""
        clock = TokenClock()
        self._model.generate(
            **self._inputs(picture, question),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )
        return len(clock.times) - 1, clock.times[-1] - clock.times[0]

    def _inputs(self, picture: Path, question: str) -> Any:
        from PIL import Image

        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(picture) as image:
            return self._processor(images=[image.convert("RGB")], text=prompt, return_tensors="pt")


class TokenClock:
    """A streamer for transformers that keeps when each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        """The prompt first, then every token."""
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        """Nothing to do."""


class Loop:
    """llama.cpp's own rate, as its `llama-bench` takes it: `llama_decode` on one token after the other with llama.cpp's
    defaults, on top of a cache of `depth` tokens; nothing is sampled."""

    def __init__(self, job: Job) -> None:
        from mpa_edge.runtime.llamacpp import silence

        llama = _bindings()
        silence()
        llama.llama_backend_init()
        bundle, model, _ = _pair(job)
        if not job.extra_buffers:
            without_extra_buffers()
        self._llama, self._depth = llama, job.depth
        self._model = llama.llama_model_load_from_file(str(model).encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_ctx = bundle.prompt.context_length
        params.n_threads = params.n_threads_batch = job.threads
        self._context = llama.llama_init_from_model(self._model, params)

    def ask(self, picture: Path, question: str, tokens: int) -> Told:
        """It sees no pictures; to warm up, it decodes."""
        self.decode(picture, question, tokens)
        return Told(tokens)

    def decode(self, picture: Path, question: str, tokens: int) -> tuple[int, float]:
        """See `Way.decode`."""
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._decode([1] * self._depth)
        start = time.perf_counter()
        for token in range(2, tokens + 1):
            self._decode([token])
        return tokens - 1, time.perf_counter() - start

    def _decode(self, ids: list[int]) -> None:
        tokens = (self._llama.llama_token * len(ids))(*ids)  # the batch only points at them
        if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")


WAYS: dict[str, Any] = {"ours": Ours, "handler": Handler, "transformers": Transformers, "loop": Loop}


def without_extra_buffers() -> None:
    """Load models as `mpa_edge.runtime.llamacpp` does where llama.cpp was compiled for Intel's AMX by GCC 12 or older:
    its defaults crash there, and neither `Llama` nor its handlers offer the switch."""
    llama = _bindings()
    defaults = llama.llama_model_default_params

    def params() -> Any:
        found = defaults()
        found.use_extra_bufts = False
        return found

    llama.llama_model_default_params = params


def _bindings() -> Any:
    """llama-cpp-python's low-level bindings; what is changed there changes its `Llama` too."""
    return import_module("llama_cpp.llama_cpp")


def _pair(job: Job) -> tuple[Bundle, Path, Path]:
    folder = Path(job.path)
    bundle = read_bundle(folder)
    return bundle, bundle.path_of(folder, "language_model"), bundle.path_of(folder, "mmproj")


def _chat(picture: Path, question: str, tokens: int) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0.0, "max_tokens": tokens}


def main(job: Job, source: IO[str], out: IO[str]) -> None:
    """Load, tell what that took, and do what the lines of `source` say: `{"do": "ask" | "decode", "picture": …,
    "question": …, "tokens": …}`. Every reply tells the memory as well."""

    def tell(**what: Any) -> None:
        out.write(json.dumps({**what, "rss": resident_bytes(), "peak_rss": peak_memory_bytes()}) + "\n")
        out.flush()

    start = time.perf_counter()
    way: Way = WAYS[job.way](job)
    tell(load_s=time.perf_counter() - start)
    for line in source:
        command = json.loads(line)
        rest = (Path(command["picture"]), command["question"], command["tokens"])
        start = time.perf_counter()
        if command["do"] == "ask":
            told = way.ask(*rest)
            tell(seconds=time.perf_counter() - start, tokens=told.tokens, prompt_tokens=told.prompt_tokens)
        else:
            tokens, seconds = way.decode(*rest)
            tell(seconds=seconds, tokens=tokens)


if __name__ == "__main__":
    main(Job.from_json(json.loads(sys.argv[1])), sys.stdin, sys.stdout)
