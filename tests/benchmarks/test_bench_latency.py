"""The clock's part: recorded machines, warm-up by cost, sweeps, series of one length, and what is timed again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from mpa_edge.benchmarks import timed
from mpa_edge.benchmarks.bench import BenchConfig, bench
from mpa_edge.benchmarks.conditions import conditions, during
from mpa_edge.benchmarks.jobs import FIXED, LATENCY, Job, Row, takes_length, whole_rows
from mpa_edge.benchmarks.measure import read_measured
from mpa_edge.benchmarks.outcome import BROKEN, outcome
from mpa_edge.benchmarks.sample import cost_of, items_of, latency_set
from mpa_edge.benchmarks.score import latency, tokens_per_s
from mpa_edge.benchmarks.timed import are_timed, device_of
from mpa_edge.benchmarks.variants import Variant, swept
from mpa_edge.benchmarks.worker import work
from mpa_edge.bundle import Bundle, Idefics3Images
from mpa_edge.errors import InputError
from mpa_edge.fake import FakeVlm
from mpa_edge.labelled import Question, read_questions
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding


def board(root: Path, **files: Any) -> Path:
    """A recorded machine: two cores, two thermal zones, and what `files` changes."""
    cpu, thermal = "sys/devices/system/cpu/cpu{}/cpufreq/", "sys/class/thermal/thermal_zone{}/temp"
    content = {
        cpu.format(0) + "scaling_governor": "performance\n",
        cpu.format(1) + "scaling_governor": "performance\n",
        cpu.format(0) + "scaling_cur_freq": "1500000\n",
        cpu.format(1) + "scaling_cur_freq": "1400000\n",
        cpu.format(0) + "cpuinfo_max_freq": "1800000\n",
        thermal.format(0): "48312\n",
        thermal.format(1): "-274000\n",
        "proc/loadavg": "0.42 0.30 0.10 1/200 999\n",
        **{name.replace("__", "/"): text for name, text in files.items()},
    }
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_recorded_machine_is_read(tmp_path: Path) -> None:
    found = conditions(board(tmp_path))
    assert (found["governor"], found["mhz"], found["max_mhz"]) == ("performance", 1450, 1800)
    assert (found["temperature_c"], found["load"], found["capped"]) == (48.3, 0.42, None)


def test_a_machine_that_tells_nothing_is_all_unknown(tmp_path: Path) -> None:
    found = conditions(tmp_path)
    assert {key for key, value in found.items() if value is not None} <= {"power_mode"}
    assert during(found, found)["throttled"] is None


@pytest.mark.parametrize(("bits", "throttled"), [("0", False), ("50000", False), ("50005", True), ("e0008", True)])
def test_a_raspberry_pi_that_was_capped_says_so(tmp_path: Path, bits: str, throttled: bool) -> None:
    path = tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled"
    path.parent.mkdir(parents=True)
    path.write_text(bits)
    found = conditions(tmp_path)
    assert bool(during(found, found)["throttled"]) is throttled


def test_an_intel_processor_counts_its_throttling(tmp_path: Path) -> None:
    counter = tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    counter.parent.mkdir(parents=True)
    counter.write_text("7\n")
    before = conditions(tmp_path)
    counter.write_text("12\n")
    assert "5 times" in str(during(before, conditions(tmp_path))["throttled"])


def test_every_count_of_tiles_is_warmed_up(tmp_path: Path) -> None:
    image = Idefics3Images(
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rescale_factor=1 / 255, resample="lanczos", tile_size=32,
        longest_edge=96, split=True, tokens_per_tile=4,
    )  # fmt: skip
    bundle = Bundle.model_construct(family="idefics3", image=image)
    sizes = [(40, 40), (90, 40), (40, 90), (91, 41), (200, 30)]
    questions = []
    for number in range(40):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", sizes[number % 5], (number, 0, 0)).save(path)
        questions.append(Question(str(number), str(path), "what?", ("x",)))
    cost = cost_of([bundle])
    warm, chosen = latency_set(items_of(questions, str), 20, 0, cost)
    costs = [{cost(Image.open(ask.image).size) for ask in part} for part in (warm, chosen)]
    assert costs[0] == costs[1]
    assert 1 < len(costs[0]) == len(warm) < len(set(sizes))  # sizes that cost the same need one warm-up


def row(n: int, decode: float | None, reason: str = "stop", wall: float = 100) -> Row:
    return Row(f"{n}", "", n, 5, reason, None, {"decode": decode}, wall)


def test_tokens_per_second_counts_the_steps_of_decoding() -> None:
    found = tokens_per_s([row(4, 100), row(9, 200, "length"), row(1, None)])
    assert found is not None
    assert found["value"] == pytest.approx((4 + 8) / 0.3, abs=0.01)
    assert found["ci95"][0] <= found["value"] <= found["ci95"][1]
    assert tokens_per_s([row(4, None)]) is None


def test_questions_per_minute_are_the_totals() -> None:
    assert latency([row(1, 1, wall=100), row(1, 1, wall=300)])["questions_per_minute"] == 300


def test_threads_are_swept_over_bundles() -> None:
    variants = [Variant("student", "", "student", "t"), Variant("q8", "", "quantized", "g")]
    found = swept(variants, BenchConfig(data="x", threads="1,4,2").thread_counts)
    assert [(one.name, one.threads, one.sweep_of) for one in found] == [
        ("student", None, None), ("q8", None, None), ("q8@2", 2, "q8"), ("q8@1", 1, "q8"),
    ]  # fmt: skip
    assert swept(variants, (4,)) == variants
    for text in ("0", "1,,2", "two"):
        with pytest.raises(InputError, match=f"--threads {text}"):
            BenchConfig(data="x", threads=text)


def test_a_sweep_asks_once_and_times_each(labelled: Path, tmp_path: Path) -> None:
    path = bench(
        BenchConfig(
            data=labelled, task="reference", report=tmp_path, latency_n=3, threads="1,2", limit=6, keep_timings=True,
            bundles=[f"fake:?known={labelled}"],
        ),
        lambda *_: None,
    )  # fmt: skip
    first, second = json.loads(path.read_text())["variants"]
    assert (first["name"], second["name"], second["threads"], second["sweep_of"]) == ("fake", "fake@1", 1, "fake")
    assert first["accuracy"] == second["accuracy"]
    assert second["latency_ms"]["n"] == 3
    assert first["first_answer_ms"] > 0
    assert (
        not list(tmp_path.glob("raw/fake-1-*/answers.jsonl"))
        or not next(tmp_path.glob("raw/fake-1-*/answers.jsonl")).read_text()
    )
    assert "fake@1" in path.with_suffix(".html").read_text()


def test_answers_of_one_length_for_engines(
    tiny_one_tile: Path, labelled: Path, tmp_path: Path, gguf_bundle: Callable[..., Any]
) -> None:
    folder = tmp_path / "f16"
    manifest = gguf_bundle(tiny_one_tile, folder, tokens=8)
    (folder / "bundle.json").write_text(manifest.model_dump_json())
    asks = [item.ask.to_json() for item in items_of(read_questions(labelled), str)[:4]]
    job = Job("f16", str(folder), 1, 4, 1, asks[:1], asks, asks[:1], device="cpu", fixed_length=7)
    with open_bundle(folder, manifest, threads=1, device="cpu") as vlm:
        before = vlm.describe()
        work(vlm, job, tmp_path, lambda *_: None)
        assert device_of(vlm) == "cpu"
        assert vlm.describe() == before
    measured = read_measured(tmp_path, None, job)
    assert [one.n_tokens for one in measured.fixed] == [7] * 4
    assert {one.finish_reason for one in measured.fixed} == {"length"}
    assert max(one.n_tokens for one in measured.latency) <= 4
    assert (measured.device, len(measured.latency)) == ("cpu", 4)
    # Of other pictures it says nothing; a wanted length alone leaves natural times as they are.
    fewer = replace(job, latency=asks[:2])
    assert not are_timed(tmp_path, fewer)
    assert read_measured(tmp_path, None, fewer).fixed == ()
    natural = (tmp_path / LATENCY).read_bytes()
    with open_bundle(folder, manifest, threads=1, device="cpu") as vlm:
        work(vlm, replace(job, fixed_length=5, keep_timings=True), tmp_path, lambda *_: None)
    assert (tmp_path / LATENCY).read_bytes() == natural
    assert [row.n_tokens for row in whole_rows(tmp_path / FIXED)] == [5] * 4


def test_answers_of_one_length_of_a_transformers_model(tiny_one_tile: Path, labelled: Path, tmp_path: Path) -> None:
    from mpa_edge.models import open_vlm

    asks = [item.ask.to_json() for item in items_of(read_questions(labelled), str)[:2]]
    job = Job("m", str(tiny_one_tile), 1, 4, 1, asks[:1], asks, asks[:1], device="cpu", fixed_length=6)
    vlm: Any = open_vlm(str(tiny_one_tile), device="cpu")
    stops = vlm.model.generation_config.eos_token_id
    work(vlm, job, tmp_path, lambda *_: None)
    assert vlm.model.generation_config.eos_token_id == stops
    # Its natural answers end at once, so that only the lifted stop can make six tokens.
    vlm._stops = list(range(vlm.model.get_input_embeddings().num_embeddings))
    vlm.model.generation_config.eos_token_id = vlm._stops
    natural = vlm.answer([open_image(asks[0]["image"])], ["?"], Decoding(max_new_tokens=6))
    with timed.endless(vlm):
        lifted = vlm.answer([open_image(asks[0]["image"])], ["?"], Decoding(max_new_tokens=6))
    assert (len(natural[0].tokens), len(lifted[0].tokens)) == (0, 6)
    assert [one.n_tokens for one in read_measured(tmp_path, None, job).fixed] == [6, 6]


def test_no_length_is_set_where_none_can_be(labelled: Path, tmp_path: Path) -> None:
    assert takes_length("org/model")
    assert not takes_length("http://127.0.0.1:9/v1")
    config = BenchConfig(data=labelled, task="reference", report=tmp_path, fixed_length=4, baselines=["fake:"])
    with pytest.raises(InputError, match="--fixed-length: a chat server ends"):
        bench(config)


def test_costs_alone_ask_nothing_and_decide_nothing(labelled: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": labelled, "task": "reference", "report": tmp_path, "latency_n": 8, "threads": 1, "keep_timings": True,
        "costs_only": True, "baselines": [f"teacher=fake:?known={labelled}&vision=20"],
        "bundles": [f"fake:?known={labelled}"],
    }  # fmt: skip
    path = bench(BenchConfig(**settings, require="p50<=10s, memory<=1GB"), lambda *_: None)
    report = json.loads(path.read_text())
    schema = json.loads(files("mpa_edge.benchmarks").joinpath("report.schema.json").read_text())
    jsonschema.validate(report, schema)
    assert (report["data"]["n"], report["verdict"]["decision"], report["verdict"]["pick"]) == (0, "none", None)
    assert report["verdict"]["summary"].startswith("fake is the fastest, at ")
    assert [(one["accuracy"]["value"], one["failed"]) for one in report["variants"]] == [(None, None)] * 2
    assert [one["pareto"] for one in report["variants"]][1] is True
    assert {row["part"] for row in map(json.loads, path.with_name("raw.jsonl").read_text().splitlines())} == {"latency"}
    assert outcome(path)[1] == 0
    page = path.with_suffix(".html").read_text()
    assert "Where the time goes" in page
    for absent in ("Along the road", "Containment", "By kind of question", "· 0 questions"):
        assert absent not in page
    assert "0 questions" not in path.with_suffix(".md").read_text()
    again = bench(BenchConfig(**settings, require="memory<=1MB", compare=path), lambda *_: None)
    assert outcome(again)[1] == BROKEN


def test_a_disturbed_series_is_taken_again_and_the_better_kept(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.5, 0.7, 0.1])
    monkeypatch.setattr(timed, "watch_others", lambda: lambda: next(shares))
    asks = [item.ask.to_json() for item in items_of(read_questions(labelled), str)[:3]]
    job = Job("x", "fake:", 1, 8, 2, asks[:1], asks, asks)

    def busy_after(job: Job) -> tuple[float | None, str]:
        work(FakeVlm(), job, tmp_path, lambda *_: None)
        return read_measured(tmp_path, None).busy, (tmp_path / LATENCY).read_text()

    first = busy_after(job)
    assert first[0] == 0.5
    assert busy_after(replace(job, keep_timings=True)) == first
    assert busy_after(job) == first  # 0.7 is worse
    better = busy_after(job)
    assert better[0] == 0.1
    assert better[1] != first[1]
    assert busy_after(job) == better  # no fourth series is taken
    assert not whole_rows(tmp_path / FIXED)
