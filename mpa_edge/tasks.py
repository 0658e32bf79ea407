"""A task: what the teacher is asked to write, how a question is put, and what counts as right.

One place defines the inference prompt. Identification, training, the bundle's manifest, the runtime and the benchmark
all take it from here, so that nobody asks the student a question it was not trained on.

A task of one's own is a TOML file. All keys but `annotate_prompt` may be left out; these are the defaults:

    name = "shelves"                    # the file's name
    annotate_prompt = "Write …"         # or a list: the prompts take turns
    question_template = "{question}\\nAnswer the question using a single word or phrase."
    metric = "vqa_accuracy"             # or anls, relaxed_accuracy, exact_match, containment
    max_new_tokens = 32                 # of an answer
    max_answer_words = 5                # longer pseudo-answers are rejected

Control tokens in a prompt or a template, such as `<image>`, are the text that they are: the picture comes by itself,
before the question.
"""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from mpa_edge.answers import metric_named
from mpa_edge.bundle import Bundle
from mpa_edge.errors import InputError, RunError
from mpa_edge.records import Record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SLOT = "{question}"


@dataclass(frozen=True)
class Task(Record):
    """A task. `question_template` is the user's turn at inference, with `{question}` in it; `metric` names a function
    of `mpa_edge.answers`; answers of more than `max_answer_words` words are rejected at annotation."""

    name: str
    annotate_prompts: tuple[str, ...]
    question_template: str
    metric: str
    max_new_tokens: int
    max_answer_words: int

    def __post_init__(self) -> None:
        prompts = self.annotate_prompts
        object.__setattr__(self, "annotate_prompts", (prompts,) if isinstance(prompts, str) else tuple(prompts))

    def to_json(self) -> dict[str, Any]:
        """As it reads back: with a list."""
        return {**super().to_json(), "annotate_prompts": list(self.annotate_prompts)}

    @property
    def annotate_prompt(self) -> str:
        """The first prompt for the annotator; the only one of most tasks."""
        return self.annotate_prompts[0]

    def prompt(self, question: str) -> str:
        """The user's turn for a question."""
        return self.question_template.replace(SLOT, question)

    def prompt_about(self, sample_id: str, number: int) -> str:
        """The annotator's prompt for question `number` (from 0) about a picture: the prompts take turns, and which one
        comes first depends on the picture, so that one question per picture has the whole variety too."""
        return self.annotate_prompts[(zlib.crc32(sample_id.encode()) + number) % len(self.annotate_prompts)]


SHORT = "{question}\nAnswer the question using a single word or phrase."


def _written(*wishes: str) -> tuple[str, ...]:
    return tuple(f"{wish} Reply in the form:\nQuestion: ...\nAnswer: ..." for wish in wishes)


# What the prompts ask for is what the benchmarks' own papers say that they test: TextVQA (1904.08920) reading, and
# reasoning about what was read; ST-VQA (1905.13648) questions whose answer is the text itself; ChartQA (2203.10244)
# look-up, and compositional and visual reasoning; OK-VQA (1906.00067) ten categories of outside knowledge.
TASKS = {
    task.name: task
    for task in (
        Task(
            name="reference",
            annotate_prompts=("Write a question about this picture and answer it.",),
            question_template="{question}",
            metric="exact_match",
            max_new_tokens=12,
            max_answer_words=4,
        ),
        Task(
            name="textvqa",
            annotate_prompts=_written(
                "Write one question that can only be answered by reading words in this picture, such as a sign, a "
                "label, a brand, a title or a screen, and its answer in at most three words, as printed.",
                "Write one question whose answer is a number that can be read in this picture, such as a price, a "
                "time, a date, an amount or the number of a player, a house or a bus, and that number.",
                "Write one question about a particular thing in this picture, named by its colour, its kind or its "
                "place, that can only be answered by reading what is written on it, and its answer in at most three "
                "words, as printed.",
            ),
            question_template=SHORT,
            metric="vqa_accuracy",
            max_new_tokens=32,
            max_answer_words=5,
        ),
        Task(
            name="stvqa",
            annotate_prompts=_written(
                "Write one question about a text that is visible in this scene, such that the text itself is the "
                "answer, and give that text letter by letter.",
                "Choose an object or a place in this scene that carries a text. Write one question that says which "
                "one is meant and asks what is written there, and give the text letter by letter.",
            ),
            question_template=SHORT,
            metric="anls",
            max_new_tokens=32,
            max_answer_words=8,
        ),
        Task(
            name="chartqa",
            annotate_prompts=_written(
                "Write one question that looks up one value or label in this chart, named by its category, year or "
                "colour. Answer with a number or a label only.",
                "Write one question that compares values in this chart: which is highest, lowest or larger, or how "
                "many lie above or below some value. Answer with a number or a label only.",
                "Write one question about a trend in this chart: when something peaks, falls, crosses or changes "
                "most, or whether it rises or falls. Answer with a year, a label, a number or one word only.",
                "Write one question about this chart that needs a calculation from two or more of its values: a "
                "difference, a sum, an average or a ratio. Answer with the number only.",
            ),
            question_template=SHORT,
            metric="relaxed_accuracy",
            max_new_tokens=32,
            max_answer_words=5,
        ),
        Task(
            name="okvqa",
            annotate_prompts=_written(
                "Write one question about something visible in this picture whose answer needs knowledge that the "
                "picture does not show: what it is used for, made of, called, or how it works. Answer in one to three "
                "words.",
                "Write one question about the people, the activity, the food or the sport in this picture whose "
                "answer needs knowledge of the world, such as a rule, a custom, an ingredient or a typical place. "
                "Answer in one to three words.",
                "Write one question about the place, the animals, the plants, the vehicles, the brands or the weather "
                "in this picture whose answer needs knowledge of geography, history, nature or technology. Answer in "
                "one to three words.",
            ),
            question_template=SHORT,
            metric="vqa_accuracy",
            max_new_tokens=32,
            max_answer_words=3,
        ),
    )
}


def task_named(spec: str) -> Task:
    """The task of this name, or of a TOML file (a path that ends in `.toml`).

    Raises `InputError`: for a name that is none with the known ones, for a file with the key that is wrong.
    """
    if spec.lower().endswith(".toml"):
        return _read(Path(spec).expanduser())
    try:
        return TASKS[spec]
    except KeyError:
        known = ", ".join(sorted(TASKS))
        raise InputError(f"--task {spec}: no such task; known: {known}, or name a TOML file") from None


def task_of_run(run: dict[str, Any]) -> Task | None:
    """The task of a `run.json`'s content, as it was when the run started; None where none is named."""
    name = run.get("config", {}).get("task")
    try:
        return Task.from_json(run["task"]) if run.get("task") else task_named(name) if name else None
    except TypeError as error:
        raise RunError(f"run.json: not a task ({error})") from error


def task_of_bundle(bundle: Bundle) -> Task | None:
    """What a bundle's manifest says of the task that it was made for: enough to put and score questions, not to write
    any. None where it names no task."""
    source, prompt = bundle.source, bundle.prompt
    if not source.task or not source.metric:
        return None
    return Task(source.task, (), prompt.question_template, source.metric, prompt.max_new_tokens, max_answer_words=0)


class _TaskFile(BaseModel):
    """The content of a task's TOML file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    annotate_prompt: list[str] = Field(min_length=1)
    question_template: str = SHORT
    metric: str = "vqa_accuracy"
    max_new_tokens: int = Field(default=32, ge=1, le=1024)
    max_answer_words: int = Field(default=5, ge=1, le=256)

    @field_validator("name")
    @classmethod
    def _own_name(cls, name: str) -> str:
        if name in TASKS:
            raise ValueError(f"{name} is the name of a task that is built in")
        return name

    @field_validator("annotate_prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("annotate_prompt", "question_template")
    @classmethod
    def _not_blank(cls, value: Any, info: ValidationInfo) -> Any:
        if not all(text.strip() for text in ([value] if isinstance(value, str) else value)):
            raise ValueError("is blank")
        if info.field_name == "question_template" and value.count(SLOT) != 1:
            raise ValueError(f"must hold {SLOT} once, where the question stands")
        return value

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, name: str) -> str:
        metric_named(name)
        return name


def _read(path: Path) -> Task:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        file = _TaskFile(**{"name": path.stem, **values})
    except OSError as error:
        raise InputError(f"--task {path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {_said(item)}" for item in error.errors())
        raise InputError(f"--task {path}: {wrong}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--task {path}: not a TOML file ({error})") from error
    values = file.model_dump()
    return Task(annotate_prompts=tuple(values.pop("annotate_prompt")), **values)


def _said(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return f"no such key; known: {', '.join(_TaskFile.model_fields)}"
    return str(item["msg"]).removeprefix("Value error, ")
