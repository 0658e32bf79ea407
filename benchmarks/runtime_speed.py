"""How fast a bundle answers, beside the other ways to run the same model on this machine.

    python -m mpa_edge.benchmarks.runtime_speed              the reference student and SmolVLM-256M's true dimensions
    python -m mpa_edge.benchmarks.runtime_speed --model SmolVLM-500M

On the same GGUF files, in the same run: ours, llama-cpp-python's `MTMDChatHandler`, llama.cpp's own rate of decoding
and its own program (`--llama-mtmd-cli`, where there is one); besides, transformers in float32, and ONNX beside GGUF at
equal bits. Each way has a process of its own, they take turns on the same pictures of one tile, and medians are
compared. Times are whole: from picture file and question to the end of an answer of at most three tokens.

| ratio | |
|---|---|
| `first_vs_handler` | seconds of the handler for a first question about a picture, by ours |
| `followup_vs_handler` | the same for a second question about that picture |
| `decode_vs_llamacpp` | our tokens per second, by those of a bare loop of `llama_decode` as deep in the context |
| `onnx_vs_gguf` | seconds of ONNX by those of GGUF at equal bits, the worst of first, further question and token |
| `decode_vs_bandwidth` | bytes that our tokens read per second, by those of a stream copy; over 1: out of a cache |

Run it on a machine that does nothing else: `busy` tells what share of it others had, `load` what the queue was.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from mpa_edge.benchmarks import llamacpp_program
from mpa_edge.benchmarks.bandwidth import bytes_per_token, stream_copy
from mpa_edge.benchmarks.host import host, watch_others
from mpa_edge.benchmarks.reference import STUDENT, write_pool
from mpa_edge.benchmarks.runtime_bundles import write_bundles
from mpa_edge.benchmarks.runtime_turns import ANSWER_TOKENS, QUESTIONS, Times, middle, take_turns
from mpa_edge.benchmarks.runtime_ways import Job
from mpa_edge.bundle import MANIFEST, read_bundle
from mpa_edge.records import write_atomic
from mpa_edge.runtime import available_cores

OUT = Path(__file__).parent / "results" / "runtime_speed.json"
QUANTS = {"gguf": ("q8_0", "q4_0"), "onnx": ("int8", "q4")}
EQUAL_BITS = {"onnx-int8": "gguf-q8_0", "onnx-q4": "gguf-q4_0"}
BASE = "gguf-q8_0"
MODELS = ("reference-student", "SmolVLM-256M", "SmolVLM-500M")
USUAL = MODELS[:2]
PROGRAM_RUNS = 4


def model_folder(name: str, folder: Path) -> Path:
    """The transformers folder of one of `MODELS`; random weights are written to `folder`."""
    if name == MODELS[0]:
        return STUDENT
    from mpa_edge.benchmarks.smolvlm import write_random_smolvlm

    model = folder / f"{name}-random"
    return model if (model / "config.json").is_file() else write_random_smolvlm(model, name.removeprefix("SmolVLM-"))


def bundles_of(model: Path, folder: Path) -> dict[str, Path]:
    """The bundles of a model, made where they are not there yet."""
    names = [f"{kind}-{quant}" for kind, quants in QUANTS.items() for quant in quants]
    if all((folder / name / MANIFEST).is_file() for name in names):
        return {name: folder / name for name in names}
    return write_bundles(model, folder, QUANTS)


def jobs_of(model: Path, bundles: Mapping[str, Path], threads: int) -> dict[str, Job]:
    """The ways by name. Ours come first: the loop decodes at the depth of their prompts."""
    ours = {f"ours-{name}": Job("ours", str(path), threads) for name, path in bundles.items()}
    others = {way: Job(way, str(bundles[BASE]), threads) for way in ("handler", "loop")}
    return {**ours, **others, "transformers": Job("transformers", str(model), threads)}


def ratios(ways: Mapping[str, Times], bytes_a_token: int, copy: float) -> dict[str, float | None]:
    """See the module; None where a way could not be measured."""

    def of(name: str, what: str) -> float | None:
        return middle(getattr(ways[name], what)) if name in ways else None

    ours, decode = f"ours-{BASE}", of(f"ours-{BASE}", "decode_per_s")
    onnx = [ratio for pair in onnx_to_gguf(ways).values() for ratio in pair.values() if ratio is not None]
    return {
        "first_vs_handler": quotient(of("handler", "first_s"), of(ours, "first_s")),
        "followup_vs_handler": quotient(of("handler", "followup_s"), of(ours, "followup_s")),
        "decode_vs_llamacpp": quotient(decode, of("loop", "decode_per_s")),
        "onnx_vs_gguf": max(onnx, default=None),
        "decode_vs_bandwidth": quotient(decode and decode * bytes_a_token, copy),
    }


def onnx_to_gguf(ways: Mapping[str, Times]) -> dict[str, dict[str, float | None]]:
    """Seconds of ONNX by those of GGUF at equal bits: first question, further question, a token."""
    found = {}
    for onnx, gguf in EQUAL_BITS.items():
        if f"ours-{onnx}" in ways and f"ours-{gguf}" in ways:
            one, other = (ways[f"ours-{name}"] for name in (onnx, gguf))
            found[f"{onnx}/{gguf}"] = {
                "first": quotient(middle(one.first_s), middle(other.first_s)),
                "followup": quotient(middle(one.followup_s), middle(other.followup_s)),
                "token": quotient(middle(other.decode_per_s), middle(one.decode_per_s)),
            }
    return found


def quotient(over: float | None, under: float | None) -> float | None:
    """None where one of them is unknown."""
    return round(over / under, 3) if over and under else None


@dataclass(frozen=True)
class Work:
    """Pictures, each a repeat; tokens of the long answers; threads of every way; llama.cpp's own program, if any."""

    pictures: int
    tokens: int
    threads: int
    program: Path | None = None


def measure(name: str, folder: Path, work: Work) -> dict[str, Any]:
    """All ways on one model, with bundles in `folder`."""
    model = model_folder(name, folder)
    bundles = bundles_of(model, folder)
    paths = write_pool(folder / "pictures", work.pictures + 1)
    _say(f"{name}: bundles are there")
    load, others = os.getloadavg(), watch_others()
    copy, read = stream_copy(work.threads), bytes_per_token(bundles[BASE], read_bundle(bundles[BASE]))
    ways, failed = take_turns(jobs_of(model, bundles, work.threads), paths, tokens=work.tokens, say=_say)
    own = _program(work, bundles[BASE], paths)
    return {
        "ratios": ratios(ways, read, copy),
        "onnx_vs_gguf": onnx_to_gguf(ways),
        "ways": {way: times.to_json() for way, times in ways.items()},
        "failed": failed,
        "llama-mtmd-cli": own,
        "bytes_per_token": read,
        "stream_copy_bytes_per_s": round(copy),
        "bundle_bytes": {bundle: read_bundle(path).size_bytes() for bundle, path in bundles.items()},
        "load": [round(value, 2) for value in load],
        "busy": others(),
    }


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _program(work: Work, folder: Path, pictures: list[Path]) -> dict[str, Any]:
    """llama.cpp's program on some pictures, the first of which warms up."""
    if work.program is None:
        return {"reason": f"no {llamacpp_program.NAME} here; name one with --llama-mtmd-cli"}
    runs = [
        llamacpp_program.measure(work.program, folder, picture, QUESTIONS[0], tokens=work.tokens, threads=work.threads)
        for picture in pictures[:PROGRAM_RUNS]
    ]
    rates = [run["decode_per_s"] for run in runs[1:] if "decode_per_s" in run]
    return {"runs": runs[1:], "decode_per_s": middle(rates)}


def main(
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = OUT,
    model: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(MODELS)}; repeat for several.", show_default=str(USUAL))
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep models and bundles here, for another run. Default: deleted at the end.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="Pictures; each is a repeat.")] = 7,
    tokens: Annotated[int, typer.Option(help="Tokens of the answers that the rate of decoding is taken from.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads of every way. Default: all cores.")] = None,
    llama_mtmd_cli: Annotated[
        Path | None, typer.Option(help="llama.cpp's own program. Default: the one on the path, if any.")
    ] = None,
) -> None:
    """Measure and write the result."""
    models = {}
    todo = Work(pictures, tokens, threads or available_cores(), llamacpp_program.find(llama_mtmd_cli))
    for name in model or USUAL:
        if name not in MODELS:
            raise typer.BadParameter(f"{name}: known are {', '.join(MODELS)}", param_hint="--model")
        with ExitStack() as stack:
            folder = work / name if work else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            models[name] = measure(name, folder, todo)
        typer.echo(f"{name}: {json.dumps(models[name]['ratios'])}")
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m mpa_edge.benchmarks.runtime_speed",
        "host": host(),
        "threads": todo.threads,
        "pictures": todo.pictures,
        "decoded_tokens": todo.tokens,
        "warm_up": "two questions about another picture",
        "answer_tokens_at_most": ANSWER_TOKENS,
        "ratios": {name: found["ratios"] for name, found in models.items()},
        "models": models,
    }
    write_atomic(out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
