"""A bundle that is to be asked in the student's place must be one of the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.asked import check_bundle, require_bundle
from mpa_edge.bundle import NEEDED, Bundle, Idefics3Images, PromptSettings, Source, describe_file, write_bundle
from mpa_edge.errors import InputError
from mpa_edge.fake import FakeVlm

OURS, OTHERS, ADAPTER = "a" * 64, "b" * 64, "c" * 64
IMAGE = Idefics3Images(
    tile_size=64,
    longest_edge=64,
    split=False,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    rescale_factor=1 / 255,
    resample="lanczos",
    tokens_per_tile=16,
)


class Student(FakeVlm):
    """Says of which weights it is, as a folder does, or as a hub id does not."""

    weights: str | None = OURS
    edge = 64

    def describe(self) -> dict[str, Any]:
        return {"weights": self.weights, "image": {"size": {"longest_edge": self.edge}}}


def bundle(folder: Path, name: str = "tiny", **source: Any) -> str:
    prompt = PromptSettings(
        chat_template="", image_token="<image>", stop_token_ids=(), max_new_tokens=8, context_length=64
    )
    folder.mkdir(parents=True)
    for role in NEEDED["llama.cpp"]:
        (folder / role).write_bytes(role.encode())
    manifest = Bundle(
        name="tiny-q8_0",
        family="idefics3",
        engine="llama.cpp",
        quantization="q8_0",
        files=tuple(describe_file(folder, role, role) for role in NEEDED["llama.cpp"]),
        image=IMAGE,
        prompt=prompt,
        source=Source(student=name, tool_version="0", **source),
    )
    write_bundle(folder, manifest)
    return str(folder)


@pytest.mark.parametrize("spec", ["fake:", "http://me:word@host/v1#m", "org/model", "/no/such/folder"])
def test_what_is_no_bundle_is_refused_by_its_flag(spec: str) -> None:
    with pytest.raises(InputError, match=r"^--ask .*: is no bundle\. .*mpa-edge export") as caught:
        require_bundle(spec)
    assert "word" not in str(caught.value)


def test_a_bundle_of_other_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = bundle(tmp_path / "ours", base_sha256=OURS)
    require_bundle(ours)
    check_bundle(ours, Student(), "models/tiny")
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match=r"--ask .*others: was made of big, with other weights than --student models/"):
        check_bundle(bundle(tmp_path / "others", "big", base_sha256=OTHERS), Student(), "models/tiny")


def test_a_bundle_of_the_run_that_the_student_was_merged_from_fits(tmp_path: Path) -> None:
    of_run = bundle(tmp_path / "bundles" / "q8_0", base_sha256=OTHERS, adapter_sha256=ADAPTER)
    (tmp_path / "merged").mkdir()
    record = {"inputs": {"adapter": ADAPTER, "base": OTHERS}, "output": OURS}
    (tmp_path / "merged.json").write_text(json.dumps(record))
    check_bundle(of_run, Student(), str(tmp_path / "merged"))
    (tmp_path / "merged.json").write_text(json.dumps({**record, "inputs": {"adapter": OURS, "base": OTHERS}}))
    with pytest.raises(InputError, match="other weights"):
        check_bundle(of_run, Student(), str(tmp_path / "merged"))


@pytest.mark.parametrize(
    ("source", "student", "says"),
    [
        ({"base_sha256": OURS, "adapter_sha256": ADAPTER}, {}, "was trained further"),
        ({"base_sha256": OURS}, {"edge": 32}, "up to 64 pixels, --student models/tiny of up to 32 (--longest-edge)"),
        ({"name": "org/other", "base_sha256": OURS}, {"weights": None}, "cannot be told"),
        ({"name": "org/tiny", "base_sha256": OURS}, {"weights": None}, ""),
    ],
)
def test_what_may_be_meant_so_gets_a_line(
    source: dict[str, Any], student: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Student()
    vars(one).update(student)
    check_bundle(bundle(tmp_path / "one", **source), one, "models/tiny")
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == bool(says)
