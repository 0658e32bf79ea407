"""Engine files that claim what they do not hold: an error in one line, whatever the header says, and no crash."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import fuzzed, places_of
from mpa_edge.bundle import Bundle, PromptSettings, describe_file, write_bundle
from mpa_edge.errors import BundleError
from mpa_edge.runtime.prompts import Prompts, read_tokenizer

Damage = Callable[[bytes], bytes]


def at(place: int, form: str, value: int) -> Damage:
    """The file with a number in its place."""
    return lambda content: content[:place] + struct.pack(form, value) + content[place + struct.calcsize(form) :]


def dimension_of_first_tensor(content: bytes) -> bytes:
    """The file with an absurd size of the tensor whose name comes first in the list (name, count of dimensions, …)."""
    name = next(name for name in (b"token_embd.weight", b"v.patch_embd.weight") if name in content)
    place = content.index(name) + len(name) + 4
    return content[:place] + struct.pack("<Q", 2**62) + content[place + 8 :]


# The head of a GGUF file: magic, version (uint32), count of tensors, count of keys, length of the first key (uint64).
GGUF: dict[str, Damage] = {
    "magic": at(0, "<I", 0),
    "version": at(4, "<I", 99),
    "tensors": at(8, "<Q", 2**62),
    "tensors, negative": at(8, "<q", -1),
    "keys": at(16, "<Q", 2**60),
    "length of a key": at(24, "<Q", 2**62),
    "dimension": dimension_of_first_tensor,
    "cut in the head": lambda content: content[:1000],
    "cut in the weights": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}
LOAD = """
import sys
from pathlib import Path
from mpa_edge.errors import MpaEdgeError
from mpa_edge.runtime import load
for folder in sys.argv[1:]:
    print(Path(folder).name, end="", flush=True)
    try:
        load(folder, threads=1)
    except MpaEdgeError as error:
        print(":", type(error).__name__, str(error), flush=True)
    else:
        print(": loaded", flush=True)
"""


def variants(served: tuple[Path, Bundle], role: str, damages: dict[str, Damage], root: Path) -> Iterator[Path]:
    """A copy of the bundle for each way of damage, with a manifest that fits what lies there."""
    source, bundle = served
    for name, damage in damages.items():
        folder = root / f"{role} {name}"
        shutil.copytree(source, folder)
        path = next(file.path for file in bundle.files if file.role == role)
        (folder / path).write_bytes(damage((folder / path).read_bytes()))
        files = tuple(describe_file(folder, file.path, file.role) for file in bundle.files)
        write_bundle(folder, bundle.model_copy(update={"files": files}))
        yield folder


def test_a_gguf_file_that_claims_too_much_is_refused_and_crashes_nothing(
    served: tuple[Path, Bundle], tmp_path: Path
) -> None:
    folders = [*variants(served, "language_model", GGUF, tmp_path), *variants(served, "mmproj", GGUF, tmp_path)]
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, folders)], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, len(folders)), (lines[-1:], done.stderr[-500:])
    assert [line for line in lines if ": BundleError " not in line] == []


def test_an_onnx_graph_does_not_read_weights_from_elsewhere(tmp_path: Path) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    inside, secret = tmp_path / "bundle", tmp_path / "secret"
    inside.mkdir()
    secret.write_bytes(b"12345678")
    for name, location in (("up", "../secret"), ("absolute", str(secret))):
        tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[2], name="w")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
        node = onnx.helper.make_node("Identity", ["w"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [], [output], [tensor])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        (inside / f"{name}.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(Exception, match=r"(?i)external data|escapes|outside|directory"):
            ort.InferenceSession(inside / f"{name}.onnx", providers=["CPUExecutionProvider"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=6), values, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def small_tokenizer(tiny_idefics3: Path) -> dict[str, object]:
    """A tokenizer.json of which every part has few entries."""
    content: dict[str, object] = json.loads((tiny_idefics3 / "tokenizer.json").read_text())
    return content


@fuzzed(60)
@given(st.data())
@example(None)
def test_a_tokenizer_of_any_content_is_read_or_refused(
    small_tokenizer: dict[str, object], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject | None
) -> None:
    content = json.loads(json.dumps(small_tokenizer))
    if data is not None:
        *above, last = data.draw(st.sampled_from([path for path in places_of(content, most=3) if path]))
        place = content
        for key in above:
            place = place[key]
        place[last] = data.draw(json_values)
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    path.write_text(json.dumps(content))
    said = ""
    try:
        Prompts(read_tokenizer(path), _settings()).tokens("a <image> b", ["<image>"])
    except BundleError as error:
        said = str(error)
    assert "\n" not in said


def _settings() -> PromptSettings:
    template = "<|im_start|>User:<image>{{ messages[0].content[1].text }}<end_of_utterance>\nAssistant:"
    return PromptSettings(
        chat_template=template, image_token="<image>", stop_token_ids=(1,), max_new_tokens=8, context_length=64
    )
