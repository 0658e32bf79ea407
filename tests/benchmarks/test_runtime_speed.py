"""The benchmark of the runtime's speed measures every way on the same pictures and compares what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpa_edge.benchmarks import llamacpp_program, runtime_speed
from mpa_edge.benchmarks.bandwidth import bytes_per_token, stream_copy
from mpa_edge.benchmarks.reference import write_pool
from mpa_edge.benchmarks.runtime_speed import OUT, onnx_to_gguf, ratios
from mpa_edge.benchmarks.runtime_turns import Times, take_turns
from mpa_edge.benchmarks.runtime_ways import Job
from mpa_edge.bundle import read_bundle

RATIOS = {"first_vs_handler", "followup_vs_handler", "decode_vs_llamacpp", "onnx_vs_gguf", "decode_vs_bandwidth"}


def times(first: float, followup: float, decode: float) -> Times:
    return Times(1, 1, 1, None, first_s=[first] * 3, followup_s=[followup, followup, 9], decode_per_s=[decode])


@pytest.fixture(scope="module")
def measured(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Times], dict[str, str]]:
    """Ours, the handler and llama.cpp's own rate on one small bundle; and a bundle that is not there."""
    jobs = {way: Job(way, str(tiny_gguf), 1) for way in ("ours", "handler", "loop")}
    pictures = write_pool(tmp_path_factory.mktemp("pictures"), 3)
    return take_turns(jobs | {"missing": Job("ours", "nowhere", 1)}, pictures, tokens=8)


def test_all_ways_take_their_turns(measured: tuple[dict[str, Times], dict[str, str]]) -> None:
    ways, _ = measured
    assert list(ways) == ["ours", "handler", "loop"]
    for name in ("ours", "handler"):
        assert len(ways[name].first_s) == len(ways[name].followup_s) == 2
        assert len(ways[name].answer_tokens) == 4
    assert not ways["loop"].first_s
    for found in ways.values():
        assert len(found.decode_per_s) == 2
        assert found.peak_bytes is None or found.peak_bytes > 10_000_000
    # The handler cuts a picture of one tile into one tile and an overview.
    assert (ways["handler"].prompt_tokens or 0) > (ways["ours"].prompt_tokens or 0) > 16


def test_what_cannot_be_measured_says_why(measured: tuple[dict[str, Times], dict[str, str]]) -> None:
    assert "nowhere is no bundle" in measured[1]["missing"]
    assert measured[1].keys() == {"missing"}


def test_ratios_say_how_many_times_faster_ours_is() -> None:
    ways = {
        "ours-gguf-q8_0": times(2, 0.5, 50),
        "ours-gguf-q4_0": times(2, 0.5, 60),
        "ours-onnx-int8": times(1, 0.6, 25),
        "ours-onnx-q4": times(1, 0.6, 60),
        "handler": times(4, 3, 40),
        "loop": times(0, 0, 40),
    }
    found = ratios(ways, bytes_a_token=1000, copy=100_000)
    assert found == {
        "first_vs_handler": 2,
        "followup_vs_handler": 6,
        "decode_vs_llamacpp": 1.25,
        "onnx_vs_gguf": 2,
        "decode_vs_bandwidth": 0.5,
    }
    assert onnx_to_gguf(ways)["onnx-q4/gguf-q4_0"] == {"first": 0.5, "followup": 1.2, "token": 1}
    del ways["handler"], ways["loop"]
    assert ratios(ways, 1000, 100_000)["first_vs_handler"] is None


def test_a_token_reads_the_output_layer_and_not_the_embedding(tiny_gguf: Path) -> None:
    from gguf import GGUFReader

    bundle = read_bundle(tiny_gguf)
    tensors = {tensor.name: tensor for tensor in GGUFReader(bundle.path_of(tiny_gguf, "language_model")).tensors}
    assert "output.weight" in tensors
    unread = int(tensors["token_embd.weight"].n_bytes)
    assert bytes_per_token(tiny_gguf, bundle) == sum(int(tensor.n_bytes) for tensor in tensors.values()) - unread


def test_the_copy_is_timed() -> None:
    assert 1e7 < stream_copy(2, megabytes=8, repeats=2) < 1e13


def test_llamacpps_program_tells_its_rate(tiny_gguf: Path, tmp_path: Path) -> None:
    """A program that fails until it is kept from layouts of its own, as llama.cpp may."""
    program = tmp_path / "llama-mtmd-cli"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--no-repack*) ;; *) exit 4 ;; esac\n'
        'echo "prompt eval time = 99.0 ms / 94 tokens" >&2\n'
        'echo "llama_perf:        eval time =     500.00 ms /    25 runs   ( 20 ms per token)" >&2\n'
    )
    assert llamacpp_program.find(program) is None
    program.chmod(0o755)
    assert llamacpp_program.find(program) == program
    found = llamacpp_program.measure(program, tiny_gguf, tmp_path / "a.png", "What?", tokens=26, threads=1)
    assert found["decode_per_s"] == 50
    assert "exit code 4" in found["note"]


@pytest.mark.skipif(not OUT.is_file(), reason="not measured yet")
def test_the_committed_result_is_whole() -> None:
    written = json.loads(OUT.read_text())
    assert written["ratios"].keys() >= set(runtime_speed.USUAL)
    for name, found in written["ratios"].items():
        assert found.keys() == RATIOS
        assert not written["models"][name]["failed"]
        assert {"load", "busy"} <= written["models"][name].keys()
