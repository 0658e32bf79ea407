"""What a pair costs for one answer and row, on the reference pair and the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mpa_edge.benchmarks.gpu_cost import OUT, Work, measure, rates_of
from mpa_edge.benchmarks.reference import STUDENT, TEACHER
from mpa_edge.benchmarks.scale_cost import CostModel
from mpa_edge.transformers_vlm import TransformersVlm


def test_every_stage_is_measured_above_its_floor(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    teacher, student = (TransformersVlm.load(str(model), device="cpu") for model in (TEACHER, STUDENT))
    work = Work(pictures=2, questions=2, long=6, short=2, train_batch=2, repeats=1)
    known = []
    for part in measure(teacher, student, work, tmp_path):
        found = part["stages"]
        known.append(len(found))  # what an end at this point leaves
    assert known == [1, 2, 3, 4]
    assert {name: stage["count"] for name, stage in found.items()} == {"write": 4, "check": 4, "student": 4, "train": 4}
    for stage in found.values():
        assert 0 < stage["floor_s"] < stage["seconds"]
    # The teacher's encoder is paid for where pictures are new, and more tokens take longer.
    assert found["check"]["floor_s"] < found["write"]["floor_s"]


def test_rates_of_this_machine_are_positive() -> None:
    rates = rates_of(torch.device("cpu"))
    assert rates.flops > 1e8
    assert rates.copied > 1e7


def test_the_model_of_cost_takes_what_was_measured() -> None:
    stages = json.loads(OUT.read_text())["stages"]
    model = CostModel(us_per_row=0, bytes_per_row=0)
    for given, name in ((model.write_s, "write"), (model.check_s, "check"), (model.student_s, "student")):
        assert given == round(stages[name]["seconds"], 3)
