"""Every parser of what comes from elsewhere, on content that nobody meant: it is read, or refused in one line.

`tests/makers/fuzzing.py` says how to let it run for longer. What it found lies below as examples.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fuzzing import fuzzed, json_of, mutated, refused_in_one_line, texts
from mpa_edge import answers
from mpa_edge.benchmarks.require import parse_lines
from mpa_edge.bundle import read_bundle
from mpa_edge.chat_messages import answer_of
from mpa_edge.config import AlignConfig
from mpa_edge.errors import BundleError, ImageError, InputError, MpaEdgeError, RunError
from mpa_edge.label_formats import Row, entries_of, read_json
from mpa_edge.models import base_of
from mpa_edge.records import Annotation, Case, Sample, lines_of, read_rows
from mpa_edge.run_folder import read_run
from mpa_edge.runtime.chat_request import parse as parse_request
from mpa_edge.runtime.images import open_image
from mpa_edge.tables import open_table
from mpa_edge.tasks import TASKS, task_named
from mpa_edge.teacher_text import judge, parse
from mpa_edge.training_data import read_examples
from tiny_pictures import noise

NESTED = "[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


labels = [
    "Question:",
    "Answer:",
    "Q:",
    "A:",
    "**",
    '{"question": "',
    '", "answer": "',
    '"}',
    "1.",
    "<think>",
    "?",
    "\n",
]


@fuzzed(100)
@given(st.lists(st.sampled_from(labels) | texts, max_size=15).map(" ".join))
def test_a_teachers_text(text: str) -> None:
    for question, answer in parse(text):
        (question + answer).encode()  # no half of a surrogate pair
        assert "\n" not in question + answer
        judge(question, answer, TASKS["textvqa"])


said = json_of(["message", "content", "text", "type", "refusal"])


@fuzzed(60)
@given(said, said, st.none() | texts)
@example("\ud800", None, "stop")
def test_a_chat_servers_reply(content: Any, refusal: Any, finish: Any) -> None:
    class Object:
        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

    message = Object(content=content, refusal=refusal)
    answer = answer_of(Object(choices=[Object(message=message, finish_reason=finish)]))
    lines_of([{"text": answer.text, "error": answer.error}])  # can be written


LABELLED = ["data", "questions", "annotations", "question_types", "question_id", "image_id", "imgname", "image"]
LABELLED += ["file_path", "qas", "query", "label", "question", "answers", "answer", "id", "kind", "split"]


@fuzzed(60)
@given(json_of(LABELLED), st.sampled_from([".json", ".jsonl"]))
def test_labelled_files(folder: Path, content: Any, suffix: str) -> None:
    path = folder / f"labelled{suffix}"
    path.write_text(json.dumps(content))
    refused_in_one_line(lambda: _all_rows(path), InputError)


@fuzzed(60)
@given(st.binary(max_size=200) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(NESTED.encode())
def test_files_that_are_no_json(folder: Path, content: bytes) -> None:
    for suffix in (".json", ".jsonl"):
        path = folder / f"labelled{suffix}"
        path.write_bytes(content)
        refused_in_one_line(lambda path=path: _all_rows(path), InputError)


def _all_rows(path: Path) -> None:
    for number, row in entries_of(path, read_json(path)):
        assert isinstance(number, int)
        assert isinstance(row, (Row, str))


def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"image": [b"1", b"2"], "question": ["a", "b"], "answers": [["x"], ["y"]]}), file)
    return file.getvalue()


@fuzzed(40)
@given(st.data())
def test_tables(folder: Path, data: st.DataObject) -> None:
    path = folder / "table.parquet"
    path.write_bytes(data.draw(mutated(parquet())))

    def read() -> None:
        table = open_table(path, flag="--images", extra="align")
        assert table is not None
        assert len(list(table.rows([table.picture_column()]))) <= 1000

    refused_in_one_line(read, InputError)


FIELDS = [*Annotation.__dataclass_fields__, *Case.__dataclass_fields__, *Sample.__dataclass_fields__]


@fuzzed(60)
@given(st.lists(json_of(FIELDS).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40), max_size=3))
@example([NESTED.encode()])
@example([b"\xff"])
def test_parts_of_a_run(folder: Path, lines: list[bytes]) -> None:
    path = folder / "part-00000.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    for row in (Sample, Annotation, Case):
        refused_in_one_line(lambda row=row: list(read_rows(path, row)), RunError)
    refused_in_one_line(lambda: read_examples(path), RunError)


@fuzzed(40)
@given(json_of(["config", "task", "stages", "base_model_name_or_path"]).map(json.dumps) | texts)
@example(NESTED)
def test_files_of_a_run_and_of_an_adapter(folder: Path, content: str) -> None:
    for name in ("run.json", "adapter_config.json"):
        (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    refused_in_one_line(lambda: read_run(folder), RunError)
    refused_in_one_line(lambda: base_of(folder), MpaEdgeError)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, tiny_idefics3: Path) -> Path:
    """A folder with a sound manifest."""
    from mpa_edge.bundle import NEEDED, describe_file, write_bundle
    from tiny_bundles import manifest_of

    root = tmp_path_factory.mktemp("manifest")
    for role in NEEDED["onnxruntime"]:
        (root / role).write_bytes(b"x")
    files = [describe_file(root, role, role) for role in NEEDED["onnxruntime"]]
    write_bundle(root, manifest_of(tiny_idefics3, "onnxruntime", "fp32", files))
    return root


@fuzzed(60)
@given(st.data())
def test_manifests(manifest: Path, folder: Path, data: st.DataObject) -> None:
    whole = (manifest / "bundle.json").read_bytes()
    content = json.loads(whole)
    keys = data.draw(st.sampled_from([(key,) for key in content] + [("image", key) for key in content["image"]]))
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = data.draw(json_of([*content, *content["image"], "path", "role", "sha256", "bytes"]))
    for text in (json.dumps(content).encode(), data.draw(mutated(whole))):
        (folder / "bundle.json").write_bytes(text)
        refused_in_one_line(lambda: read_bundle(folder), BundleError)


REQUEST = ["model", "messages", "role", "content", "type", "text", "image_url", "url", "stream", "n", "tools", "seed"]
values = st.sampled_from(["user", "system", "assistant", "text", "image_url", "data:image/png;base64,AA=="])
message = st.fixed_dictionaries({"role": values, "content": json_of(REQUEST, values)})


@fuzzed(80)
@given(
    json_of(REQUEST).map(json.dumps)
    | st.fixed_dictionaries({"messages": st.lists(message, min_size=1, max_size=4)}, optional={"n": values}).map(
        json.dumps
    )
    | texts
)
@example(NESTED)
@example('{"messages": [' + "{}," * 100_000 + "{}]}")
def test_chat_requests(body: str) -> None:
    def ask() -> None:
        request = parse_request(body.encode("utf-8", "surrogatepass"))
        url, turns = request.conversation()
        assert sum(turn.pictures for turn in turns) == 1
        assert isinstance(url, str)
        request.decoding(8)

    refused_in_one_line(ask, InputError)


def pictures() -> list[bytes]:
    """A small picture in each format."""
    found = []
    for name in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"):
        file = io.BytesIO()
        noise("RGB", (12, 10)).save(file, name)
        found.append(file.getvalue())
    return found


@fuzzed(150)
@given(st.data())
def test_pictures_and_data_urls(data: st.DataObject) -> None:
    content = data.draw(mutated(data.draw(st.sampled_from(pictures()))) | st.binary(max_size=60))
    sources: list[Any] = [content, f"data:image/png;base64,{base64.b64encode(content).decode()}"]
    outcomes = []
    for source in (*sources, "data:" + data.draw(texts)):
        try:
            image = open_image(source)
            assert image.mode == "RGB"
            outcomes.append((image.size, image.tobytes()))
        except ImageError as error:
            outcomes.append(error.reason)
    assert {text for text in outcomes if isinstance(text, str)} <= {"unreadable", "truncated", "too_large", "too_small"}
    assert outcomes[0] == outcomes[1]


numbers = st.from_regex(r"-?\$?[0-9,.]{1,12}(e[0-9]{1,4})?%?", fullmatch=True)


@fuzzed(100)
@given(texts | numbers, st.lists(texts | numbers, min_size=1, max_size=10))
def test_answers(prediction: str, references: list[str]) -> None:
    for metric in ("vqa_accuracy", "exact_match", "anls", "relaxed_accuracy"):
        assert 0 <= answers.metric_named(metric)(prediction, references) <= 1
    answers.normalize_mpa(prediction)
    assert "\n" not in answers.normalize_vqa(prediction)


quantities = st.sampled_from(["accuracy", "p95", "memory", "energy", "size", "p5", ""])
signs = st.sampled_from([">=", "<=", "≤", ">", "=="])
line = st.tuples(quantities, signs, texts | numbers, st.sampled_from(["", "%", "ms", "GB", "J"])).map("".join)


@fuzzed(100)
@given(st.lists(line, min_size=1, max_size=3).map(",".join) | texts)
def test_requirements(text: str) -> None:
    def read() -> None:
        lines = parse_lines(text)
        assert lines
        assert all(math.isfinite(line.value) for line in lines)

    refused_in_one_line(read, InputError)


toml_values = texts.filter(lambda text: "\ud800" not in text).map(json.dumps) | numbers | st.just("[1, [2]]")
keys = st.sampled_from(["name", "annotate_prompt", "question_template", "metric", "max_new_tokens", "max_answer_words"])


@fuzzed(80)
@given(st.lists(st.tuples(keys, toml_values).map(" = ".join), max_size=6).map("\n".join) | texts)
@example("x = " + NESTED)
def test_task_files(folder: Path, content: str) -> None:
    path = folder / "task.toml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    refused_in_one_line(lambda: task_named(str(path)), InputError)


@fuzzed(60)
@given(st.dictionaries(st.sampled_from(list(AlignConfig.model_fields)), json_of(["a"]), max_size=4))
@example({"max_requests": ["a" * 3000]})
def test_settings(values: dict[str, Any]) -> None:
    needed = {"images": "a", "teacher": "b", "student": "c", "task": "textvqa"}
    refused_in_one_line(lambda: AlignConfig(**needed | values), InputError)


@pytest.fixture(scope="module")
def prompts(request: pytest.FixtureRequest) -> list[Any]:
    """The tokenizers of four families, and what its pictures are made of."""
    from mpa_edge.export.families import prompt_settings, read_config
    from mpa_edge.processors import load_processor
    from mpa_edge.runtime.prompts import Prompts, read_tokenizer

    found = []
    for name in ("tiny_idefics3", "tiny_qwen2_vl", "tiny_llava", "tiny_internvl"):
        model = request.getfixturevalue(name)
        config, processor = read_config(model), load_processor(model)
        tokenizer = read_tokenizer(model / "tokenizer.json")
        added = {place: str(token.content) for place, token in tokenizer.get_added_tokens_decoder().items()}
        found.append((Prompts(tokenizer, prompt_settings(config, processor, "{question}", 8)), added, processor))
    return found


@fuzzed(60)
@given(data=st.data())
def test_typed_text_never_becomes_a_control_token(prompts: list[Any], data: st.DataObject) -> None:
    for made, added, processor in prompts:
        halves = [token[: len(token) // 2] for token in added.values()] + [token[1:] for token in added.values()]
        words = st.sampled_from([*added.values(), *halves, " ", "\n", "\ue000"])
        text = data.draw(st.lists(words | st.text(max_size=4), max_size=8).map("".join))
        assume("\ud800" not in text)
        image = processor.image_token
        ids, harmless = made.tokens(text, [2 * image]), made.tokens("x", [2 * image])
        assert [token for token in ids if token in added] == [token for token in harmless if token in added]


@pytest.mark.parametrize("piece", ["why? ", "a", "<image>", "漢", " ", "\n", "<|im_end|>"])
def test_a_question_of_a_megabyte_is_refused_at_once(prompts: list[Any], piece: str) -> None:
    from mpa_edge.runtime.prompts import Turn

    start = time.process_time()
    for made, *_ in prompts:
        assert made.exceeds([Turn("user", piece * (1_000_000 // len(piece.encode())))], 1024)
        assert not made.exceeds([Turn("user", piece * 20)], 1024)
    assert time.process_time() - start < 5
