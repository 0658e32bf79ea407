"""What only a CUDA GPU shows, on the reference pair: the CPU's answers, 4 bit, training that is killed and goes on, Ray
actors that share it, and what the report tells of memory and energy. Engines that are not built for a GPU are skipped
one by one.

    CUDA_VISIBLE_DEVICES=0 pytest tests/gpu          on a machine with one; the other tests do not see it
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mpa_edge.benchmarks.reference import STUDENT, TEACHER, write_pool, write_test
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Answer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or CUDA_VISIBLE_DEVICES names none")
needs_four_bit = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")

QUESTIONS = ("What is written on the sign?", "How many red circles are there?")
AT_MOST = 300.0


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pool(tmp_path_factory.mktemp("gpu") / "pool", 24)


@pytest.fixture(scope="module")
def gguf_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from mpa_edge.benchmarks.runtime_bundles import write_bundles

    return write_bundles(STUDENT, tmp_path_factory.mktemp("gpu-gguf"), {"gguf": ("f16", "q8_0")})


@pytest.fixture(scope="module")
def onnx_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from mpa_edge.benchmarks.runtime_bundles import write_bundles

    return write_bundles(STUDENT, tmp_path_factory.mktemp("gpu-onnx"), {"onnx": ("fp32", "fp16", "q4f16")})


def asked(vlm: Any, pool: list[Path]) -> list[Answer]:
    """Both questions about every picture."""
    pairs = [(open_image(path), question) for path in pool for question in QUESTIONS]
    if hasattr(vlm, "ask_many"):
        return list(vlm.ask_many(pairs))
    images, questions = zip(*pairs, strict=True)
    return list(vlm.answer(images, questions))


def alike(some: list[Answer], others: list[Answer]) -> float:
    """The share of equal texts; an answer that failed equals none."""
    assert not [answer.error for answer in [*some, *others] if answer.error]
    return sum(one.text == other.text for one, other in zip(some, others, strict=True)) / len(some)


@pytest.fixture(scope="module")
def expected(pool: list[Path]) -> list[Answer]:
    """The student's answers in float32 on the CPU."""
    return asked(opened(device="cpu"), pool)


def opened(model: Path = STUDENT, **settings: Any) -> Any:
    from mpa_edge.transformers_vlm import TransformersVlm

    return TransformersVlm.load(str(model), **settings)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.95), ("auto", 0.85)])
def test_a_model_on_the_gpu_answers_as_on_the_cpu(
    pool: list[Path], expected: list[Answer], dtype: str, share: float
) -> None:
    vlm = opened(dtype=dtype)
    assert vlm.model.device.type == "cuda"
    assert vlm.model.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert alike(asked(vlm, pool), expected) >= share


def test_phases_wait_for_the_gpu(pool: list[Path]) -> None:
    vlm = opened()
    vlm.answer([open_image(pool[0])], [QUESTIONS[0]])
    told = vlm.answer([open_image(pool[1])], [QUESTIONS[0]])[0].timings
    assert all(phase > 0 for phase in (told.preprocess, told.vision, told.prefill, told.decode))
    assert told.total == pytest.approx(told.preprocess + told.vision + told.prefill + told.decode, rel=0.2)


@needs_four_bit
def test_the_teacher_in_four_bit_answers(pool: list[Path]) -> None:
    vlm = opened(TEACHER, four_bit=True)
    assert vlm.describe()["quantization"] == "nf4"
    assert alike(asked(vlm, pool), asked(opened(TEACHER, device="cpu"), pool)) >= 0.5


def align_command(pool: list[Path], out: Path, *more: str) -> list[str]:
    named = {"images": pool[0].parent, "teacher": TEACHER, "student": STUDENT, "task": "reference", "out": out}
    flags = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    settings = ["--questions", "2", "--epochs", "4", "--patience", "4", "--train-batch-size", "4", "--select", "all"]
    return [sys.executable, "-m", "mpa_edge.cli", "align", *flags, *settings, *more]


def metrics_of(run: Path) -> Any:
    return json.loads((run / "student" / "metrics.json").read_text())


@pytest.mark.parametrize("method", ["lora", "full", pytest.param("qlora", marks=needs_four_bit)])
def test_align_trains_on_the_gpu(pool: list[Path], tmp_path: Path, method: str) -> None:
    subprocess.run(align_command(pool, tmp_path / "run", "--method", method), check=True, timeout=AT_MOST)
    assert metrics_of(tmp_path / "run")["examples"]["train"] > 0
    assert "bfloat16" in (tmp_path / "run" / "run.json").read_text()


def test_killed_in_training_it_goes_on(pool: list[Path], tmp_path: Path) -> None:
    command = align_command(pool, tmp_path / "run", "--epochs", "40", "--patience", "40")
    with subprocess.Popen(command) as process:
        end = time.monotonic() + AT_MOST
        while not (tmp_path / "run" / "student" / "checkpoint.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "run" / "student" / "metrics.json").exists()
    subprocess.run(command, check=True, timeout=AT_MOST)
    assert [entry["epoch"] for entry in metrics_of(tmp_path / "run")["history"]] == list(range(41))


def asked_files(run: Path) -> dict[str, bytes]:
    """Everything that asking writes."""
    paths = [*run.glob("annotations/*"), *run.glob("cases/*"), run / "parity.jsonl"]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def processes_on_the_gpu() -> set[str]:
    """Their ids, as the driver knows them."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    return set(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())


def test_two_actors_share_the_gpu_and_write_what_one_process_writes(pool: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    # Parts of few pictures, so that both have work; the same ones, so that batches are the same, and bits with them.
    settings = ("--chunk-size", "4", "--epochs", "1")
    subprocess.run(align_command(pool, tmp_path / "one", *settings), check=True, timeout=AT_MOST)
    ray = ("--engine", "ray", "--gpus-per-actor", "0.5", "--actors", "2")
    before, most = processes_on_the_gpu(), 0
    with subprocess.Popen(align_command(pool, tmp_path / "two", *settings, *ray)) as process:
        end = time.monotonic() + AT_MOST
        while process.poll() is None:
            assert time.monotonic() < end
            most = max(most, len(processes_on_the_gpu() - before))
            time.sleep(0.2)
    assert process.returncode == 0
    assert "bfloat16" in (tmp_path / "two" / "run.json").read_text()
    assert most >= 2
    found, wanted = asked_files(tmp_path / "two"), asked_files(tmp_path / "one")
    assert sum(name.endswith(".jsonl") for name in wanted) == 2 * len(pool) / 4 + 1
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_the_report_tells_the_gpus_memory_and_energy(tmp_path: Path) -> None:
    from mpa_edge.benchmarks.bench import BenchConfig, bench

    report = bench(
        BenchConfig(
            data=(write_test(tmp_path / "test", 220),),
            baselines=(f"student={STUDENT}",),
            task="reference",
            report=tmp_path / "report",
            latency_n=200,
            device="cuda",
        )
    )
    [variant] = json.loads(report.read_text())["variants"]
    assert variant["device_memory_mb"] > 100
    assert "NVML" in (variant["energy"]["source"] or ""), variant["energy"]["why"]
    assert variant["energy"]["joules_per_answer"] > 0


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_llamacpp_on_the_gpu_answers_as_the_model(
    gguf_bundles: dict[str, Path], pool: list[Path], expected: list[Answer], quant: str
) -> None:
    llama = pytest.importorskip("llama_cpp.llama_cpp")
    if not llama.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp was built for the CPU only")
    from mpa_edge.runtime import load

    with load(gguf_bundles[f"gguf-{quant}"], device="cuda") as vlm:
        assert vlm.reader.engine.device == "gpu"
        assert alike(asked(vlm, pool), expected) >= 0.9


def needs_cuda_provider() -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")


@pytest.mark.parametrize("quant", ["fp32", "fp16", "q4f16"])
def test_onnx_runtime_on_the_gpu_answers_as_the_model(
    onnx_bundles: dict[str, Path], pool: list[Path], expected: list[Answer], quant: str
) -> None:
    needs_cuda_provider()
    from mpa_edge.runtime import load

    with load(onnx_bundles[f"onnx-{quant}"], device="cuda") as vlm:
        assert alike(asked(vlm, pool), expected) >= (0.6 if quant == "q4f16" else 0.9)
        # The cache stays where it is computed.
        assert {value.device_name() for value in vlm.reader.engine._past.values()} == {"cuda"}


@pytest.mark.parametrize("quant", ["fp32", "fp16"])
def test_onnx_runtime_replays_on_the_gpu_what_the_cpu_answered(
    onnx_bundles: dict[str, Path], pool: list[Path], tmp_path: Path, quant: str
) -> None:
    needs_cuda_provider()
    from mpa_edge.bundle import read_bundle, write_bundle
    from mpa_edge.runtime import load, selfcheck

    folder = tmp_path / quant
    shutil.copytree(onnx_bundles[f"onnx-{quant}"], folder)
    with load(folder, device="cpu") as vlm:
        samples = selfcheck.record(vlm)
    bundle = read_bundle(folder)
    write_bundle(folder, bundle.model_copy(update={"checks": {**bundle.checks, selfcheck.NAME: samples}}))
    cli = [sys.executable, "-m", "mpa_edge.cli"]
    for device in ("cpu", "cuda"):
        subprocess.run([*cli, "selfcheck", folder, "--device", device], check=True, timeout=AT_MOST)
    told = [
        subprocess.run(
            [*cli, "ask", folder, pool[0], QUESTIONS[0], "--device", device],
            check=True,
            timeout=AT_MOST,
            stdout=subprocess.PIPE,
        ).stdout
        for device in ("cpu", "cuda")
    ]
    assert told[0].strip()
    assert told[0] == told[1]
