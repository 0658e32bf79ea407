"""What this machine has (engines, accelerators, memory), and what to export for it, with the reasons."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from mpa_edge.runtime import ENGINES, available_cores

BOARD = Path("/proc/device-tree/model")
SMALL_MB = 3000  # a board with 2 GB; the system takes half of it


@dataclass(frozen=True)
class Machine:
    """The facts that the recommendation rests on. `engines` maps an engine's name to its version, None if missing."""

    system: str
    cpu: str
    cores: int
    memory_mb: int | None
    board: str | None = None
    power_mode: str | None = None
    engines: dict[str, str | None] = field(default_factory=dict)
    providers: tuple[str, ...] = ()
    llama_offloads: bool = False


@dataclass(frozen=True)
class Advice:
    """What to export and how to run it, each with its reason."""

    format: str
    quantization: str
    threads: int
    reasons: tuple[str, ...]


def look_around() -> Machine:
    """Ask the system; what it does not tell is None."""
    return Machine(
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        cpu=platform.machine(),
        cores=available_cores(),
        memory_mb=_memory_mb(),
        board=_board(BOARD),
        power_mode=power_mode(),
        engines={name: _version(library) for name, (_, library, _, _) in ENGINES.items()},
        providers=_providers(),
        llama_offloads=_llama_offloads(),
    )


def advise(machine: Machine) -> Advice:
    """A starting point; `mpa-edge bench` on the machine itself decides."""
    small = machine.memory_mb is not None and machine.memory_mb < SMALL_MB
    threads = f"{machine.cores} threads: the cores that this process may use"
    if machine.engines.get("onnxruntime") and not machine.engines.get("llama.cpp"):
        quantization = "q4" if small else "int8"
        return Advice("onnx", quantization, machine.cores, ("onnx: its engine is installed, llama.cpp is not", threads))
    if machine.llama_offloads:
        why = "gguf: the installed llama.cpp was built to offload to an accelerator"
    else:
        why = "gguf: the same file runs on the CPU and, with another build of llama.cpp, on CUDA, Metal or Vulkan"
    if small:
        weights = (
            f"q4_k_m: {machine.memory_mb} MB of memory are little, and decoding takes as long as reading the weights"
        )
    else:
        weights = "q8_0: half the bytes of f16, close to its answers; try q4_k_m, and let mpa-edge bench decide"
    return Advice("gguf", "q4_k_m" if small else "q8_0", machine.cores, (why, weights, threads))


def report(machine: Machine) -> str:
    """For people."""
    advice = advise(machine)
    power = f", power mode {machine.power_mode}" if machine.power_mode else ""
    lines = [
        f"system      {machine.system}, {machine.cpu}",
        f"board       {machine.board or 'not a known one'}{power}",
        f"cores       {machine.cores}",
        f"memory      {f'{machine.memory_mb} MB' if machine.memory_mb else 'unknown'}",
    ]
    for name, (_, _, _, extra) in ENGINES.items():
        missing = f'missing; pip install "mpa-edge[{extra}]"'
        version = machine.engines.get(name)
        lines.append(f"{name:11} {f'{version}, {_reach(name, machine)}' if version else missing}")
    told = f"export with --format {advice.format} --quant {advice.quantization}, run with --threads {advice.threads}"
    return "\n".join([*lines, "", told, *(f"  {reason}" for reason in advice.reasons)])


def _reach(engine: str, machine: Machine) -> str:
    """What an installed engine runs on."""
    if engine == "llama.cpp":
        return "offloads to an accelerator" if machine.llama_offloads else "built for the CPU only"
    if engine == "openvino":
        return "runs on the CPU"
    return f"providers {', '.join(machine.providers)}"


def _version(library: str) -> str | None:
    """The version of an engine that can be imported, as the module says: of several builds, the one that is loaded."""
    try:
        module = importlib.import_module(library)
    except (ImportError, OSError):
        return None
    return str(getattr(module, "__version__", "unknown version"))


def _providers() -> tuple[str, ...]:
    try:
        return tuple(importlib.import_module("onnxruntime").get_available_providers())
    except (ImportError, OSError, AttributeError):
        return ()


def _llama_offloads() -> bool:
    try:
        return bool(importlib.import_module("llama_cpp.llama_cpp").llama_supports_gpu_offload())
    except (ImportError, OSError, AttributeError):
        return False


def _memory_mb() -> int | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6)
    except (AttributeError, ValueError, OSError):
        return None


def _board(path: Path) -> str | None:
    """The board's name as its device tree has it: a Jetson's, a Raspberry Pi's."""
    try:
        return path.read_text().strip("\0\n ") or None
    except (OSError, UnicodeDecodeError):
        return None


def power_mode() -> str | None:
    """A Jetson's power mode, as `nvpmodel -q` tells it: `NV Power Mode: MAXN`."""
    program = shutil.which("nvpmodel")
    if program is None:
        return None
    try:
        told = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("NV Power Mode:")]
    return lines[0] if lines else None
