"""Tasks: the built-in ones ask what their benchmarks ask, and a user's TOML file is as good as they are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mpa_edge.answers import METRICS
from mpa_edge.benchmarks.bench import BenchConfig, task_of
from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError
from mpa_edge.tasks import TASKS, Task, task_named, task_of_run

SHELVES = """
name = "shelves"
annotate_prompt = ["Ask about a price.", "Ask about a product."]
question_template = "{question} Answer briefly."
metric = "anls"
max_new_tokens = 16
max_answer_words = 3
"""


def write(folder: Path, text: str, name: str = "shelves.toml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_toml_file_is_a_task(tmp_path: Path) -> None:
    task = task_named(write(tmp_path, SHELVES))
    assert task == Task(
        "shelves", ("Ask about a price.", "Ask about a product."), "{question} Answer briefly.", "anls", 16, 3
    )
    assert task.prompt("What {question}?") == "What {question}? Answer briefly."


def test_a_prompt_is_enough(tmp_path: Path) -> None:
    task = task_named(write(tmp_path, 'annotate_prompt = "Fragen Sie nach dem Preis."', "preis.toml"))
    assert (task.name, task.annotate_prompt) == ("preis", "Fragen Sie nach dem Preis.")
    assert task.question_template == TASKS["textvqa"].question_template
    assert task.metric == "vqa_accuracy"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "annotate_prompt: Field required"),
        ("annotate_prompt", "not a TOML file"),
        ("annotate_prompt = 3", "annotate_prompt: .* valid list"),
        ("annotate_prompt = []", "annotate_prompt: .* at least 1 item"),
        ("annotate_prompt = [1]", "annotate_prompt.0: .* valid string"),
        ("annotate_prompt = ' '", "annotate_prompt: is blank"),
        ("annotate_prompt = 'a'\nname = 'textvqa'", "name: textvqa is the name of a task that is built in"),
        ("annotate_prompt = 'a'\nname = '../up'", "name: .* pattern"),
        ("annotate_prompt = 'a'\nquestion_template = 'Q'", "question_template: must hold {question} once"),
        ("annotate_prompt = 'a'\nmetric = 'bleu'", "metric: .* known: anls, containment"),
        ("annotate_prompt = 'a'\nmax_new_tokens = 0", "max_new_tokens: .* greater than or equal to 1"),
        ("annotate_prompt = 'a'\nmax_answer_words = '3'", "max_answer_words: .* valid integer"),
        ("annotate_prompt = 'a'\nprompt = 'b'", "prompt: no such key; known: name, annotate_prompt, question_template"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"--task .*shelves.toml: {message}"):
        task_named(write(tmp_path, text))


def test_a_name_or_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--task chess: no such task; known: chartqa, .* or name a TOML file"):
        task_named("chess")
    with pytest.raises(InputError, match=r"none.toml: cannot be read \(No such file"):
        task_named(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(InputError, match=r"bytes.toml: not a TOML file"):
        task_named(str(tmp_path / "bytes.toml"))


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_built_in_tasks_can_be_put_and_scored(task: Task) -> None:
    assert task.metric in METRICS
    assert task.prompt("What?").startswith("What?")
    assert len(set(task.annotate_prompts)) == len(task.annotate_prompts) >= 1
    assert all("Question: ...\nAnswer: ..." in prompt for prompt in task.annotate_prompts) or task.name == "reference"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("textvqa", ("reading words", "number")),
        ("stvqa", ("the text itself is the answer",)),
        ("chartqa", ("looks up", "compares", "trend", "calculation")),
        ("okvqa", ("knowledge that the picture does not show",)),
    ],
)
def test_each_benchmark_has_prompts_for_what_it_tests(name: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert sum(word in prompt for prompt in TASKS[name].annotate_prompts) == 1, word


def test_the_reference_task_has_the_one_prompt_that_its_teacher_was_trained_with() -> None:
    assert TASKS["reference"].annotate_prompts == ("Write a question about this picture and answer it.",)


def test_prompts_take_turns_within_a_picture_and_over_pictures() -> None:
    task = TASKS["chartqa"]
    for sample in ("a", "b", "c"):
        assert {task.prompt_about(sample, number) for number in range(4)} == set(task.annotate_prompts)
    first = Counter(task.prompt_about(f"{number:016x}", 0) for number in range(400))
    assert set(first) == set(task.annotate_prompts)
    assert min(first.values()) > 60


def test_a_run_keeps_its_task_without_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, SHELVES)
    task = task_named(path)
    run = json.loads(json.dumps({"config": {"task": path}, "task": task.to_json()}))
    Path(path).unlink()
    assert task_of_run(run) == task
    assert task_of_run({"config": {"task": "okvqa"}}) == TASKS["okvqa"]
    assert task_of_run({}) is None


def test_the_run_folder_is_named_after_the_task_not_its_path(tmp_path: Path) -> None:
    config = AlignConfig(images="i", teacher="t", student="a/small", task=f"{tmp_path}/shelves.toml")
    assert config.run == Path("runs/shelves-small")


def test_bench_takes_a_task_from_a_file_or_from_the_bundles(tmp_path: Path, manifest: Path) -> None:
    from mpa_edge.benchmarks.variants import variants_of

    path = write(tmp_path, SHELVES)
    config = BenchConfig(data=tmp_path / "x.jsonl", bundles=(str(manifest),), task=path)
    assert task_of(config, variants_of(config.bundles, ())) == task_named(path)
    found = task_of(config.model_copy(update={"task": None}), variants_of(config.bundles, ()))
    assert (found.name, found.metric, found.max_new_tokens) == ("shelves", "anls", 16)
    assert found.prompt("Q?") == "Q? Answer briefly."


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A bundle's folder, as far as reading its manifest goes."""
    from mpa_edge.bundle import NEEDED, Bundle, Idefics3Images, PromptSettings, Source, describe_file, write_bundle

    folder = tmp_path / "bundle"
    folder.mkdir()
    for role in NEEDED["llama.cpp"]:
        (folder / role).write_bytes(b"weights")
    image = Idefics3Images(
        tile_size=32, longest_edge=32, split=False, mean=(0.5,) * 3, std=(0.5,) * 3, rescale_factor=1 / 255,
        resample="bilinear", tokens_per_tile=4,
    )  # fmt: skip
    prompt = PromptSettings(
        chat_template="t", question_template="{question} Answer briefly.", image_token="<image>", stop_token_ids=(1,),
        max_new_tokens=16, context_length=64,
    )  # fmt: skip
    source = Source(student="s", task="shelves", metric="anls", tool_version="0")
    files = tuple(describe_file(folder, role, role) for role in NEEDED["llama.cpp"])
    write_bundle(
        folder,
        Bundle(name="b", family="idefics3", engine="llama.cpp", quantization="q8_0", files=files, image=image,
               prompt=prompt, source=source),
    )  # fmt: skip
    return folder
