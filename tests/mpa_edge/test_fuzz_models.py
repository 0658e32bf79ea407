"""What models, bundles, servers and labelled files bring, with other content: read, or refused in one line.

More of `test_fuzz.py`; `tests/makers/fuzzing.py` says how to let it run for longer.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fuzzing import fuzzed, mutated, other, refused_in_one_line, texts, written
from mpa_edge.errors import BundleError, ExportError, InputError, MpaEdgeError
from mpa_edge.labelled import pictures_in, read_questions
from mpa_edge.tables import open_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- servers, and what lies on the web -------------------------------------------------------------------------------

MESSAGE = {"role": "assistant", "content": "a", "refusal": None}
REPLY = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
MODELS = {"data": [{"id": "m"}]}


class Says(BaseHTTPRequestHandler):
    """Answers with what the class holds."""

    status, kind, rest, models, body = 200, "application/json", "", b"", b""

    def do_GET(self) -> None:
        self._say(200, self.models)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(self.status, self.body)

    def _say(self, status: int, content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Retry-After": self.rest, "Content-Type": self.kind}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Says) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1#m"
        http.shutdown()


@fuzzed(25)
@given(
    written(REPLY),
    st.sampled_from([200, 200, 200, 302, 400, 403, 429, 500, 503]),
    st.sampled_from(["application/json", "text/html", "text/event-stream", ""]),
    st.sampled_from(["", "nan", "inf", "-1", "1e999", "0"]),
    written(MODELS),
)
def test_whatever_a_chat_server_sends(
    server: str, body: bytes, status: int, kind: str, rest: str, models: bytes
) -> None:
    from mpa_edge.chat_vlm import ChatVlm

    Says.body, Says.status, Says.kind, Says.rest, Says.models = body, status, kind, rest, models

    def ask() -> None:
        vlm = ChatVlm.load(server, max_retries=0, timeout=30)
        try:
            (answer,) = vlm.answer([Image.new("RGB", (4, 4))], ["q"])
            (answer.text + (answer.error or "")).encode()  # can be written
        finally:
            vlm.close()

    refused_in_one_line(ask, MpaEdgeError)


PIECES = ["http://", "https://", "1.1.1.1", "[::1]", ":99999", ":0", "/", "%", "#", "?", "..", "xn--", "ü", "\x00", " "]
PIECES += ["\\", "@", "0x7f.1", "[fe80::1%eth0]", "file:///", "localhost"]


@fuzzed(60)
@given(st.lists(st.sampled_from(PIECES) | texts, max_size=5).map("".join))
def test_a_pictures_address(text: str) -> None:
    from mpa_edge.runtime.remote_image import fetch

    refused_in_one_line(lambda: asyncio.run(fetch(text, allowed=lambda _: False)), InputError)


# --- models and bundles ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that may be changed."""
    return shutil.copytree(tiny_idefics3, tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("processor_config.json", b"\x80"),
        ("processor_config.json", b"{"),
        ("tokenizer.json", b'{"model": 1}'),
        ("config.json", b"[]"),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"model_type": "idefics3", "text_config": 1}'),
        ("generation_config.json", b'{"eos_token_id": "x"}'),
        ("generation_config.json", b"[1]"),
    ],
)
def test_a_damaged_model_is_not_exported(copied: Path, name: str, content: bytes) -> None:
    from mpa_edge.export.families import read_settings

    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(content)
    try:
        with pytest.raises(ExportError):
            read_settings(copied, "{question}", 8)
    finally:
        (copied / name).write_bytes(whole)


def weights() -> bytes:
    """A small safetensors file."""
    import torch
    from safetensors.torch import save

    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    return bytes(save(tensors, metadata={"format": "pt"}))


@fuzzed(60)
@given(st.data())
@example(None)
def test_a_checkpoints_weights(folder: Path, data: st.DataObject | None) -> None:
    from mpa_edge.export.merge_weights import stored_dtype, tensor_names, weight_files

    (folder / "weights").mkdir(exist_ok=True)
    content = weights()[:4] if data is None else data.draw(mutated(weights()))
    (folder / "weights" / "model.safetensors").write_bytes(content)
    refused_in_one_line(lambda: stored_dtype(folder / "weights"), ExportError)
    refused_in_one_line(lambda: [tensor_names(file) for file in weight_files(folder / "weights")], ExportError)


INDEX = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


@fuzzed(60)
@given(written(INDEX))
@example(b'{"weight_map": {"a": null}}')
@example(b'{"weight_map": {}}')
def test_the_index_of_a_checkpoint(folder: Path, content: bytes) -> None:
    from mpa_edge.export.merge_weights import weight_files

    (folder / "index").mkdir(exist_ok=True)
    for name in ("one", "two"):
        (folder / "index" / f"{name}.safetensors").touch()
    (folder / "index" / "model.safetensors.index.json").write_bytes(content)
    refused_in_one_line(lambda: weight_files(folder / "index"), ExportError)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "..", "", "a/b"])
def test_an_index_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    from mpa_edge.export.merge_weights import weight_files

    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ExportError, match="files beside it"):
        weight_files(tmp_path / "model")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_idefics3: Path) -> Path:
    """A folder with a sound manifest and a tokenizer; its graphs are none."""
    from mpa_edge.bundle import NEEDED, describe_file, write_bundle
    from tiny_bundles import manifest_of

    root = tmp_path_factory.mktemp("bundle")
    for role in NEEDED["onnxruntime"]:
        (root / role).write_bytes((tiny_idefics3 / "tokenizer.json").read_bytes() if role == "tokenizer" else b"x")
    files = [describe_file(root, role, role) for role in NEEDED["onnxruntime"]]
    write_bundle(root, manifest_of(tiny_idefics3, "onnxruntime", "fp32", files))
    return root


CHECKS = {
    "verify": {"samples": 4, "token_agreement": 1.0},
    "road": {"metric": "m", "data": {"name": "d", "n": 1}, "steps": [{"name": "a", "step": "base", "value": 0.5}]},
}
# The costliest pictures that a manifest may promise.
PLANS: list[dict[str, Any]] = [
    {"plan": "idefics3", "tile_size": 32, "longest_edge": 16384, "split": True, "tokens_per_tile": 1},
    {"plan": "qwen_vl", "patch_size": 4, "merge_size": 1, "temporal_patch_size": 2, "min_pixels": 1}
    | {"max_pixels": 4096**2},
    {"plan": "llava", "tile_size": 16, "shortest_edge": 1, "tokens_per_tile": 65536},
    {"plan": "internvl", "tile_size": 16, "min_patches": 1, "max_patches": 64, "tokens_per_tile": 1},
]
TEMPLATES = [
    "{% for i in range(999999999) %}{{ i }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 'a' * 99999999999 }}",
    "{{ x.y.z }}",
    "<image>",
]
FAMILIES = ["idefics3", "qwen2_vl", "qwen2_5_vl", "llava", "internvl", "none"]


@fuzzed(50)
@given(st.data())
def test_a_manifest_is_told_of_or_refused_at_once(bundle: Path, data: st.DataObject) -> None:
    from mpa_edge.runtime.inspect import report

    whole = (bundle / "bundle.json").read_text()
    content = json.loads(whole)
    general = {name: content["image"][name] for name in ("mean", "std", "rescale_factor", "resample")}
    content["checks"], content["image"] = CHECKS, general | data.draw(st.sampled_from(PLANS))
    content["family"] = data.draw(st.sampled_from(FAMILIES))
    content["prompt"]["chat_template"] = data.draw(st.sampled_from([content["prompt"]["chat_template"], *TEMPLATES]))
    part = data.draw(st.sampled_from(["image", "prompt", "checks"]))
    content |= data.draw(st.just({}) | other({part: content[part]}))
    start = time.process_time()
    try:
        (bundle / "bundle.json").write_text(json.dumps(content))
        refused_in_one_line(lambda: report(bundle), BundleError)
    finally:
        (bundle / "bundle.json").write_text(whole)
    assert time.process_time() - start < 20


# --- labels and tables -----------------------------------------------------------------------------------------------

LABELS: list[Any] = [
    {"data": [{"question_id": 1, "image_id": "a", "question": "q", "answers": ["a"]}]},
    [{"imgname": "a.png", "query": "q", "label": "a"}],
    [{"image_id": 1, "qas": [{"question": "q", "answers": ["a"], "question_id": 2}]}],
    {"id": "1", "image": "a.png", "question": "q", "answers": ["a"], "kind": "k", "group": "g"},
]
ASKED = {"data_subtype": "val2014", "questions": [{"image_id": 1, "question": "q", "question_id": 1}]}
NOTED = {
    "annotations": [{"question_id": 1, "image_id": 1, "question_type": "one", "answers": [{"answer": "a"}]}],
    "question_types": {"one": "x"},
}


def read(path: Path) -> None:
    """As a benchmark reads it, and as alignment does."""
    refused_in_one_line(lambda: read_questions(path), InputError)
    refused_in_one_line(lambda: list(pictures_in(path)), InputError)


@fuzzed(50)
@given(st.sampled_from(LABELS).flatmap(written), st.sampled_from(["labels.json", "labels.jsonl"]))
def test_labels(folder: Path, content: bytes, name: str) -> None:
    (folder / name).write_bytes(content)
    read(folder / name)


@fuzzed(50)
@given(written(ASKED), written(NOTED))
def test_questions_with_annotations_beside_them(folder: Path, asked: bytes, noted: bytes) -> None:
    (folder / "OpenEnded_x_questions.json").write_bytes(asked)
    (folder / "x_annotations.json").write_bytes(noted)
    (folder / "COCO_val2014_000000000001.jpg").touch()
    read(folder / "OpenEnded_x_questions.json")


@fuzzed(25)
@given(st.data())
def test_a_dataset_on_disk(folder: Path, data: st.DataObject) -> None:
    import datasets

    saved, copy = folder / "saved", folder / "copy"
    if not saved.exists():
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"image": [b"1", b"2"], "question": ["a", "b"]}).save_to_disk(str(saved))
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy)
    file = copy / data.draw(st.sampled_from(sorted(path.name for path in saved.iterdir())))
    file.write_bytes(data.draw(mutated(file.read_bytes())))

    def rows() -> None:
        table = open_table(copy, flag="--images", extra="align")
        if table is not None:
            assert len(list(table.rows([table.picture_column()]))) < 100

    refused_in_one_line(rows, InputError)
