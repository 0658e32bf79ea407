"""The command line: parse, call the library, print. A command's body imports its stage, so `--help` never waits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mpa_edge import __version__
from mpa_edge.errors import MpaEdgeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Align a small vision-language model to a large one without labels, export it, and prove what it gains.\n\n"
    "The road: [bold]align[/bold] -> [bold]export[/bold] -> [bold]ask[/bold] / [bold]bench[/bold]. "
    "Start with [bold]mpa-edge demo[/bold].",
)


class Select(str, Enum):
    """What becomes training data; the last three are controls."""

    parity = "parity"
    all = "all"
    random = "random"
    disagree = "disagree"


class Match(str, Enum):
    """When an answer counts as right."""

    metric = "metric"
    paper = "paper"


class Format(str, Enum):
    """The deployment format."""

    gguf = "gguf"
    onnx = "onnx"


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


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. What is finished is kept: type the same command again to go on ({command}).", err=True)
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point: library errors become one clean line and exit code 1; a bug keeps its traceback."""
    try:
        app()
    except MpaEdgeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
