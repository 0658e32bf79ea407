"""The command line: parse, call the library, print. A command's body imports its stage, so `--help` never waits."""

from __future__ import annotations

import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mpa_edge import __version__, edge
from mpa_edge.benchmarks.settings import BenchOptions
from mpa_edge.config import AlignConfig
from mpa_edge.edge import resumable
from mpa_edge.export.quants import DEFAULTS, QUANTS
from mpa_edge.options import given, options_of
from mpa_edge.ranks import is_main

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Align a small vision-language model to a large one without labels, export it, and prove what it gains.\n\n"
    "The road: [bold]align[/bold] -> [bold]export[/bold] -> [bold]ask[/bold] / [bold]bench[/bold]. "
    "Start with [bold]mpa-edge demo[/bold].",
)


Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")]
Device = Annotated[str, typer.Option(help="auto, cpu, or an accelerator: cuda, metal, vulkan, tensorrt, coreml, …")]
LongestEdge = Annotated[
    int | None, typer.Option(min=1, help="See pictures at another size than in training; see mpa-edge inspect.")
]


class Format(str, Enum):
    """The deployment format."""

    gguf = "gguf"
    onnx = "onnx"
    openvino = "openvino"
    hf = "hf"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mpa-edge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Global options."""


@app.command(
    epilog="Examples: mpa-edge align --images photos/ --teacher Qwen/Qwen2-VL-7B-Instruct "
    "--student HuggingFaceTB/SmolVLM-500M-Instruct --task textvqa --out runs/shop\n\n"
    "On a Ray cluster: … --engine ray --address auto --gpus-per-actor 0.5 --mirror s3://photos/runs/shop\n\n"
    "With two servers: … --teacher http://gpu-1:8000/v1,http://gpu-2:8000/v1#MODEL --concurrency 64",
    short_help="Train the student on what the teacher knows and it does not.",
)
@options_of(AlignConfig)
@resumable()
def align(
    plan: Annotated[
        bool, typer.Option("--plan", help="Only tell what it would take: pictures, requests, time, disk.")
    ] = False,
    **options: Any,
) -> None:
    """Train the student on what the teacher knows and it does not, from unlabeled pictures.

    Type the same command again after an interruption: it goes on where it was.
    """
    config = AlignConfig(**given(options))
    if plan:
        from mpa_edge.plan import plan_align

        typer.echo(plan_align(config).summary())
        return
    from mpa_edge.launching import relaunch_if_wanted

    relaunch_if_wanted(config, sys.argv[1:])
    if is_main():
        from mpa_edge.align import align as run_align

        typer.echo(run_align(config).summary())
    else:
        from mpa_edge.align import help_to_train

        help_to_train(config)


@app.command(
    epilog="Examples: mpa-edge export runs/shop --format gguf --quant q8_0,q4_k_m\n\n"
    "mpa-edge export runs/shop --format hf --push me/shop-vqa --dry-run",
    short_help="Merge, check, convert, quantize and verify: run to bundle.",
)
@resumable()
def export(
    source: Annotated[
        Path | None, typer.Argument(metavar="[RUN|MODEL]", help="A run, or a model folder. Default: the newest run.")
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="gguf for llama.cpp, onnx for ONNX Runtime and transformers.js, openvino for Intel laptops, hf for a "
            "merged model folder."
        ),
    ] = Format.gguf,
    quant: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated. "
            + " ".join(f"{kind}: {', '.join(names)}." for kind, names in QUANTS.items() if names),
            show_default=", ".join(f"{kind} {' '.join(names)}" for kind, names in DEFAULTS.items() if names),
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the bundles go. Default: RUN/bundles.")] = None,
    mmproj: Annotated[str, typer.Option(help="gguf: precision of the vision part, f16 or q8_0.")] = "f16",
    quantize_vision: Annotated[
        bool, typer.Option("--quantize-vision", help="onnx: quantize the vision encoder too; the loss is measured.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled questions: the manifest then tells the accuracy of each station of the road."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask a stratified sample of N of them.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="NAME", help="hf: upload to this hub repository; the token is in HF_TOKEN.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new hub repository public.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what --push would upload, and send nothing.")
    ] = False,
) -> None:
    """Merge the adapter, check the merge, convert, quantize, and verify the bundle through the runtime."""
    from mpa_edge.export.build import Options
    from mpa_edge.export.build import export as run_export

    _check_push(format, push, public, dry_run)
    options = Options(mmproj=mmproj, quantize_vision=quantize_vision, data=data, limit=limit, repo=push)
    made = run_export(
        source or _newest_run(),
        format.value,
        quant.split(",") if quant else None,
        out,
        options=options,
        progress=_say,
    )
    for folder in made:
        typer.echo(folder)
        if format is not Format.hf:
            typer.echo(f"  next: mpa-edge ask {folder} PICTURE.jpg 'What does the sign say?'")
    if push:
        from mpa_edge.export.push import push as run_push

        typer.echo("\n".join(run_push(made[0], push, private=not public, dry_run=dry_run).lines()))


def _check_push(format: Format, push: str | None, public: bool, dry_run: bool) -> None:
    from mpa_edge.errors import InputError, require

    if push and format is not Format.hf:
        raise InputError("--push goes with --format hf")
    if (public or dry_run) and not push:
        raise InputError(f"{'--public' if public else '--dry-run'} goes with --push NAME")
    if push:
        require("export", ["huggingface_hub"])
        from mpa_edge.export.push import check_push

        check_push(push, dry_run=dry_run)


def _say(line: str) -> None:
    typer.echo(f"  {line}", err=True)


@app.command(
    epilog="Examples: mpa-edge status runs/shop\n\nwatch -n 30 mpa-edge status runs/shop",
    short_help="How far a run is: stages, parts, counts, rate, last error.",
)
def status(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run. Default: the newest one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tell how far a run is and whether it goes on: stages, parts, counts, rate, the last error. Only reads."""
    from mpa_edge.status import status_of
    from mpa_edge.terminal import shown

    found = status_of(run or _newest_run("log.jsonl"))
    typer.echo(found.to_json() if json else shown(found.summary()))


@app.command(
    epilog="Example: mpa-edge families --json",
    short_help="List the model families, and what each can be exported to.",
)
def families(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the model families that can be exported, with formats and precisions; others can be aligned only."""
    from mpa_edge.export.table import as_json, as_text

    typer.echo(as_json() if json else as_text())


def _newest_run(file: str = "run.json") -> Path:
    from mpa_edge.errors import InputError

    runs = sorted(Path("runs").glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError("there is no run in runs/: name one, or make one with mpa-edge align")
    return runs[-1].parent


@app.command(
    epilog="Example: mpa-edge ask runs/shop/bundles/gguf-q8_0 photo.jpg 'What does the sign say?' --timings",
    short_help="Answer a question about a picture from a bundle.",
)
def ask(
    bundle: Annotated[Path, typer.Argument(help="A bundle that mpa-edge export made.")],
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: the task's.")] = None,
    threads: Threads = None,
    device: Device = "auto",
    longest_edge: LongestEdge = None,
    timings: Annotated[bool, typer.Option("--timings", help="Show the milliseconds of each phase.")] = False,
) -> None:
    """Answer a question about a picture, on this machine, from the bundle alone."""
    from mpa_edge.runtime import load
    from mpa_edge.terminal import shown

    with load(bundle, device=device, threads=threads, longest_edge=longest_edge) as vlm:
        stream = vlm.stream(image, question, max_new_tokens=max_new_tokens)
        for text in stream:
            typer.echo(shown(text), nl=False)
        typer.echo()
        if timings and stream.answer:
            typer.echo(stream.answer.timings.line(), err=True)


@app.command(
    epilog="Example: mpa-edge inspect runs/shop/bundles/gguf-q8_0",
    short_help="Tell what a bundle is, and what each picture size costs.",
)
def inspect(bundle: Annotated[Path, typer.Argument(help="A bundle that mpa-edge export made.")]) -> None:
    """Tell what a bundle is and where it came from, and how many tiles and tokens a picture takes at each size."""
    from mpa_edge.runtime.inspect import report

    typer.echo(report(bundle))


@app.command(
    epilog="Example: mpa-edge selfcheck runs/shop/bundles/gguf-q8_0",
    short_help="Check that a bundle answers here as where it was made.",
)
def selfcheck(
    bundle: Annotated[Path, typer.Argument(help="A bundle that mpa-edge export made.")],
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Check a bundle's files, and replay the samples in its manifest; exit code 1 unless all is equal."""
    from mpa_edge.runtime.selfcheck import selfcheck as run_selfcheck

    outcome = run_selfcheck(bundle, device=device, threads=threads)
    typer.echo("\n".join(outcome.lines()))
    if not outcome.passed:
        raise typer.Exit(1)


@app.command(
    epilog="Example: mpa-edge doctor",
    short_help="Tell what this machine has, and what to export for it.",
)
def doctor() -> None:
    """Tell which engines and accelerators this machine has, and which format and quantization to begin with."""
    from mpa_edge.runtime.doctor import look_around, report

    typer.echo(report(look_around()))


@app.command(
    epilog="Example: mpa-edge serve runs/shop/bundles/gguf-q8_0, then open http://127.0.0.1:8000",
    short_help="Serve a bundle: the OpenAI API, and a page to try it.",
)
def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle that mpa-edge export made.")],
    host: Annotated[str, typer.Option(help="Where to listen. 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the key which clients must send.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The key itself; other users of this machine can see it in the process list.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones are told to retry.")] = 16,
    threads: Threads = None,
    device: Device = "auto",
    longest_edge: LongestEdge = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the task's question template away.")] = False,
    remote: Annotated[
        bool, typer.Option("--remote/--no-remote", help="Fetch pictures that a request names by their address.")
    ] = True,
) -> None:
    """Serve a bundle: OpenAI's chat completions and models under /v1, a page to try it at /, /health and /metrics."""
    from mpa_edge.errors import require

    require("serve", ("fastapi", "uvicorn", "httpx", "prometheus_client"))
    from mpa_edge.runtime.server import in_url, is_loopback, key_from
    from mpa_edge.runtime.server import serve as run_server

    keys = key_from(api_key, api_key_env)
    if not keys and not is_loopback(host):
        typer.echo("warning: everybody who can reach this machine can ask; set --api-key-env", err=True)
    typer.echo(f"http://{in_url(host)}:{port}/  (Ctrl-C stops it)", err=True)
    run_server(
        bundle,
        host=host,
        port=port,
        api_keys=keys,
        max_queue=max_queue,
        threads=threads,
        device=device,
        longest_edge=longest_edge,
        raw=raw,
        remote=remote,
    )


@app.command(
    epilog="Example: mpa-edge bench runs/shop/bundles/gguf-q8_0 --baseline teacher=Qwen/Qwen2-VL-7B-Instruct "
    "--baseline student=HuggingFaceTB/SmolVLM-500M-Instruct --data test.jsonl --report report/",
    short_help="Score bundles beside the models they came from: a report that decides.",
)
@options_of(BenchOptions)
@resumable()
def bench(
    bundles: Annotated[list[Path] | None, typer.Argument(help="Bundles to measure.")] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="teacher=MODEL, student=MODEL or aligned=ADAPTER, as in align; repeatable.")
    ] = None,
    **options: Any,
) -> None:
    """Score bundles beside the models they came from, decide, and write a report: HTML, Markdown and JSON.

    Exit codes: 0 a variant keeps every line of --require; 1 an error; 2 wrong usage; 3 none does; 4 undecided; 5
    --compare found a regression.
    """
    from mpa_edge.benchmarks.bench import BenchConfig
    from mpa_edge.benchmarks.bench import bench as run_bench
    from mpa_edge.benchmarks.outcome import outcome

    config = BenchConfig(bundles=tuple(map(str, bundles or ())), baselines=tuple(baseline or ()), **given(options))
    path = run_bench(config)
    lines, code = outcome(path)
    typer.echo("\n".join([*lines, f"report: {path.with_suffix('.html')}"]))
    raise typer.Exit(code)


@app.command(
    epilog="Example: mpa-edge demo --out runs/demo",
    short_help="The whole road on the reference pair, offline, in ten minutes.",
)
@resumable()
def demo(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on where a run stopped.")] = False,
) -> None:
    """The whole road on the reference pair, offline: align, export, bench, report. Ten minutes on two cores."""
    from mpa_edge.demo import demo as run_demo

    typer.echo(f"report: {run_demo(out, fresh=fresh).with_suffix('.html')}")


def main() -> None:
    """Entry point: library errors become one clean line and exit code 1; a bug keeps its traceback."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    edge.run_and_leave(app)


if __name__ == "__main__":
    main()
