"""What a user installs: the wheel is whole, the light install is light, and one engine's extra runs a bundle."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FOLDERS = {"mpa_edge": "mpa_edge", "export": "mpa_edge/export", "runtime": "mpa_edge/runtime"}
FOLDERS["benchmarks"] = "mpa_edge/benchmarks"
HEAVY = ("torch", "transformers", "peft", "onnxruntime", "llama_cpp", "matplotlib")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy so that nothing is written here."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".git", ".venv", ".typecheck", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "tree")], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def exported(tiny_one_tile: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`exported(format, quant)`: a whole export's bundle, made once."""
    from mpa_edge.export.build import export

    root, made = tmp_path_factory.mktemp("bundles"), dict[str, Path]()

    def make(format: Any, quant: str) -> Path:
        if format not in made:
            (made[format],) = export(tiny_one_tile, format, [quant], root / format, samples=4)
        return made[format]

    return make


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as `pip install --target` lays it out."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_what_the_folders_hold(wheel: Path) -> None:
    """All but the recorded figures in benchmarks/results, which are the project's and not the package's."""
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {".py", ".j2", ".html", ".json", ".yaml", ".typed", ".safetensors", ".jinja", ".md", ".log"}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kept and not {"__pycache__", "results"} & set(path.parts):
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names


def run_bare(site: Path, code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that sees the standard library and one folder, nothing else."""
    start = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[1:] = {list(argv)!r}\n"
    command = [sys.executable, "-I", "-S", "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=site)


def closure(requirements: list[str]) -> set[str]:
    """The distributions, by name, that pip would install for these requirements of ours."""
    found: set[str] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found and not requirement.extras:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            todo += [(Requirement(text), wanted) for wanted in requirement.extras or {""}]
    return found


def bare_site(folder: Path, installed: Path, extra: str) -> Path:
    """A folder like the site-packages of `pip install mpa-edge[extra]`, made of links into this environment."""
    own = metadata.PathDistribution(next(installed.glob("mpa_edge-*.dist-info")))
    wanted = [text for text in own.requires or [] if "extra ==" not in text]
    wanted += [text.split(";")[0] for text in own.requires or [] if re.search(rf"extra == .{extra}.$", text)]
    for name in closure(wanted):
        for top in {Path(file).parts[0] for file in metadata.files(name) or [] if Path(file).parts[0] != ".."}:
            source = Path(str(metadata.distribution(name).locate_file(top)))
            if source.exists() and not (folder / top).exists() and top != "__pycache__":
                (folder / top).symlink_to(source)
    (folder / "mpa_edge").symlink_to(installed / "mpa_edge")
    return folder


def test_the_runtime_and_the_command_line_import_nothing_heavy(installed: Path) -> None:
    code = "import mpa_edge.cli, mpa_edge.runtime, sys; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code.format(heavy=HEAVY)], capture_output=True, text=True, check=True, cwd=installed
    )
    assert result.stdout.strip() == "[]"


def test_help_imports_no_library_that_it_does_not_need() -> None:
    code = (
        "import sys; sys.argv = ['mpa-edge', '--help']\n"
        "from mpa_edge.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('loaded:', [m for m in (*{heavy!r}, 'numpy', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code.format(heavy=HEAVY)], capture_output=True, text=True, check=True
    )
    assert result.stdout.rstrip().endswith("loaded: []")


@pytest.mark.parametrize(("extra", "quant", "engine"), [("onnx", "fp32", "onnxruntime"), ("gguf", "f16", "llama_cpp")])
def test_one_extra_alone_is_enough_to_run_a_bundle(
    extra: str, quant: str, engine: str, exported: Callable[[str, str], Path], installed: Path, tmp_path: Path
) -> None:
    """In an environment that holds what `pip install mpa-edge[extra]` brings, and nothing else."""
    from PIL import Image

    from mpa_edge.runtime import load
    from mpa_edge.terminal import shown

    bundle = exported(extra, quant)
    picture = tmp_path / "picture.png"
    Image.effect_noise((80, 60), 90).convert("RGB").save(picture)
    (tmp_path / "site").mkdir()
    site = bare_site(tmp_path / "site", installed, extra)
    here = {path.name for path in site.iterdir()}
    assert engine in here
    assert not here & ({*HEAVY} - {engine})

    ask = "from mpa_edge.cli import main; main()"
    result = run_bare(site, ask, "ask", str(bundle), str(picture), "What is this?", "--max-new-tokens", "6")
    assert result.returncode == 0, result.stderr
    with load(bundle, threads=1) as vlm:
        assert result.stdout == shown(vlm.ask(picture, "What is this?", max_new_tokens=6).text) + "\n"


def test_a_missing_engine_ends_in_the_pip_line(
    exported: Callable[[str, str], Path], installed: Path, tmp_path: Path
) -> None:
    bundle = exported("onnx", "fp32")
    (tmp_path / "site").mkdir()
    site = bare_site(tmp_path / "site", installed, "gguf")
    result = run_bare(site, "from mpa_edge.cli import main; main()", "ask", str(bundle), "picture.png", "What?")
    assert result.returncode == 1
    assert result.stderr.strip() == 'error: onnxruntime is not installed. Run: pip install "mpa-edge[onnx]"'
