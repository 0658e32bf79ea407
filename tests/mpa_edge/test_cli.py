"""The command line is a thin skin: its help is true, its errors are one line, and the README knows every command."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mpa_edge import cli
from mpa_edge.cli import app
from mpa_edge.config import AlignConfig
from mpa_edge.edge import resumable
from mpa_edge.errors import BudgetSpent
from mpa_edge.options import given, options_of
from mpa_edge.tasks import TASKS

ROOT = Path(__file__).parent.parent.parent
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_an_example_and_a_place_in_the_readme(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert f"mpa-edge {name}" in (command.epilog or "")
    assert f"mpa-edge {name}" in (ROOT / "README.md").read_text()
    assert all(option.help for option in command.params if option.name not in ("help", "context"))
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_every_setting_of_align_is_a_flag_with_its_default() -> None:
    options = {option.name: option for option in COMMANDS["align"].params}
    assert options.keys() - {"plan"} == AlignConfig.model_fields.keys()
    assert options["mix"].show_default == str(AlignConfig.model_fields["mix"].default)
    assert options["train"].show_default == "language"


def test_only_what_was_typed_reaches_the_settings() -> None:
    seen: dict[str, object] = {}
    probe = typer.Typer()

    @probe.command()
    @options_of(AlignConfig)
    def align(**options: Any) -> None:
        seen.update(given(options))

    typed = ["--images", "p", "--teacher", "t", "--student", "s", "--task", "x", "--select", "all"]
    CliRunner().invoke(probe, [*typed, "--train", "vision", "--train", "connector"])
    assert seen == {
        "images": "p",
        "teacher": "t",
        "student": "s",
        "task": "x",
        "select": "all",
        "train": ["vision", "connector"],
    }


def test_every_task_in_an_example_exists() -> None:
    texts = [(ROOT / "README.md").read_text(), *(command.epilog or "" for command in COMMANDS.values())]
    named = {name for text in texts for name in re.findall(r"--task (\w+)(?![\w.])", text)}
    assert named
    assert named <= TASKS.keys()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpa_edge.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_an_error_is_one_line_with_the_cure_and_exit_code_1(tmp_path: Path) -> None:
    result = run("export", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: there is no run in runs/: name one, or make one with mpa-edge align\n"


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    result = run("ask", str(tmp_path), "picture.png", "What?", cwd=tmp_path)
    assert result.returncode == 1
    assert "bundle.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_setting_names_the_flag(tmp_path: Path) -> None:
    pictures = ("--images", ".", "--teacher", "t", "--student", "s", "--task", "reference")
    result = run("align", *pictures, "--mix", "7", cwd=tmp_path)
    assert result.returncode == 1
    assert "--mix" in result.stderr


class Slow(ModuleType):
    """A module during whose import somebody presses Ctrl-C."""

    def __getattr__(self, name: str) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (
            ["align", "--plan", *["--images", "i", "--teacher", "t", "--student", "s", "--task", "reference"]],
            "mpa_edge.plan",
        ),
        (["export", "m"], "mpa_edge.export.build"),
        (["bench", "b", "--data", "d"], "mpa_edge.benchmarks.bench"),
        (["demo"], "mpa_edge.demo"),
    ],
)
def test_ctrl_c_says_how_to_go_on_from_the_first_moment(
    command: list[str], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, Slow(module))
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, "type the same command again to go on" in done.output) == (130, True), done.output


@pytest.mark.parametrize("fresh", [False, True])
def test_what_was_typed_with_fresh_is_not_to_be_typed_again_with_it(
    fresh: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or what was just asked, and paid for, would be deleted."""

    def spend() -> None:
        raise BudgetSpent(5)

    monkeypatch.setattr(sys, "argv", ["mpa-edge", "align", *(["--fresh"] if fresh else [])])
    monkeypatch.setattr(cli, "app", spend)
    heard = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        cli.main()
    signal.signal(signal.SIGINT, heard)
    with pytest.raises(SystemExit), resumable():
        raise KeyboardInterrupt
    told = capsys.readouterr().err
    assert told.count("type the same command again, without --fresh, to go on" if fresh else "again to go on") == 2
