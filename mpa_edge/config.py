"""The settings of each command: validated, with messages that name the flag as typed, saved beside the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mpa_edge.errors import InputError
from mpa_edge.passwords import holds_secret

# What is wrong with an address that has a password; the address itself is not repeated.
IN_FILES = (
    "an address with a password or a ? in it would end up in files. Put the secret into the environment: "
    "MPA_EDGE_API_KEY for a chat server, HF_TOKEN for the hub, and for a store what its client reads "
    "(of s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
)
# Characters of a value that an error repeats.
MOST_SHOWN = 200
Match = Literal["official", "paper"]
Select = Literal["parity", "all", "random", "disagree"]
Target = Literal["short", "written"]
Method = Literal["lora", "dora", "qlora", "full"]
Part = Literal["language", "connector", "vision"]
Checkpointing = Literal["auto", "on", "off"]
SaveAs = Literal["llava", "sharegpt"]
Engine = Literal["local", "ray"]
Accelerate = Literal["ddp", "fsdp", "deepspeed"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Settings that check themselves; what is wrong is an `InputError` that names the flag."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError("; ".join(_one_line(item) for item in error.errors())) from None

    @model_validator(mode="after")
    def _can_be_written(self) -> Settings:
        """All settings end up in a file: no name in another encoding than UTF-8 can."""
        for name, value in self:
            try:
                str(value).encode()
            except UnicodeEncodeError as error:
                told = {"flag": f"--{name.replace('_', '-')}"}
                raise PydanticCustomError("text", "{flag}: its name is not in UTF-8; use another one", told) from error
        return self

    def to_json(self) -> dict[str, Any]:
        """The resolved settings, for `run.json`."""
        return self.model_dump(mode="json")


# Under which heading `--help` lists a flag.
PICTURES, MODELS, QUESTIONS = "Pictures", "Models", "Questions"
TRAINING_SET, TRAINING, SCALE = "Training set", "Training", "More machines"


def setting(default: Any = ..., panel: str = "Main", *, help: str, shown: str | None = None, **bounds: Any) -> Any:
    """A field with what the command line says about it; `shown` is the default as people read it."""
    return Field(default, description=help, json_schema_extra={"panel": panel, "shown": shown}, **bounds)


class AlignConfig(Settings):
    """What `mpa-edge align` does: each field is the flag of its name (`batch_size` is `--batch-size`), and the command
    line takes type, default, help and panel from here."""

    images: str = setting(help="Unlabeled pictures: a folder, a glob, a list, .parquet files, or hf:DATASET.")
    teacher: str = setting(help="The large model: a folder, a hub id, a chat server (http://HOST/v1#MODEL), a bundle.")
    student: str = setting(help="The small model to deploy: a folder or a hub id.")
    task: str = setting(
        help="textvqa, stvqa, chartqa, okvqa, reference, or a TOML file: prompts, answer rule, metric and limits."
    )
    out: Path | None = setting(None, help="The run's folder.", shown="runs/TASK-STUDENT")
    limit: int | None = setting(None, ge=1, help="Use the first N pictures only.")
    seed: int = setting(0, ge=0, help="Same seed, same run.")
    fresh: bool = setting(
        False, help="Start over instead of going on where a run stopped; deletes the run in --mirror too."
    )

    metrics_file: Path | None = setting(
        None, help="Also keep progress here for Prometheus (node_exporter's textfile collector: NAME.prom)."
    )

    test: str | None = setting(
        None, PICTURES, help="Labelled file; pictures that it shares with --images, near-duplicates too, are kept out."
    )
    keep_shared: bool = setting(False, PICTURES, help="Report the pictures shared with --test, but use them.")

    ask: str | None = setting(
        None, MODELS, help="A bundle of the student to ask in its place: train on what the deployed file gets wrong."
    )
    teacher_4bit: bool = setting(False, MODELS, help="Load the teacher in 4 bit (NF4, needs a CUDA GPU).")
    teacher_longest_edge: int | None = setting(
        None, MODELS, ge=16, help="Largest picture edge that the teacher sees, in pixels.", shown="the processor's"
    )
    longest_edge: int | None = setting(
        None, MODELS, ge=16, help="The same for the student, from here to the bundle.", shown="the processor's"
    )
    max_requests: int | None = setting(None, MODELS, ge=1, help="Stop, resumably, after N requests to a chat server.")
    concurrency: int = setting(8, MODELS, ge=1, le=256, help="Requests to each chat server at once, at most.")
    teacher_timeout: float = setting(180, MODELS, gt=0, help="Seconds that a chat server has for one answer.")
    batch_size: int = setting(32, MODELS, ge=1, help="Pictures asked at once; halved when memory runs out.")
    device: Device = setting("auto", MODELS, help="Where transformers models run.")
    dtype: Dtype = setting("auto", MODELS, help="Their precision; auto is float32 on a CPU, bfloat16 elsewhere.")

    trust_remote_code: bool = setting(False, MODELS, help="Run Python code that a model's folder or hub page brings.")

    questions: int = setting(3, QUESTIONS, ge=1, le=64, help="Questions per picture.")
    question_share: float | None = setting(
        None, QUESTIONS, gt=0, le=1, help="Largest share of one question among all; the rest is collapsed."
    )
    temperature: float = setting(1.0, QUESTIONS, ge=0, le=5, help="Of the teacher when it writes questions.")
    match: Match = setting(
        "official", QUESTIONS, help="When an answer is right: the task's metric, or the paper's rule."
    )
    votes: int = setting(1, QUESTIONS, ge=1, le=64, help="Short answers of the teacher; most must confirm its own.")
    blind: bool = setting(False, QUESTIONS, help="Drop questions that the teacher answers without the picture.")
    chunk_size: int = setting(256, QUESTIONS, ge=1, help="Pictures per part; a killed run loses one part at most.")

    select: Select = setting("parity", TRAINING_SET, help="What becomes training data; all but parity are controls.")
    mix: float = setting(
        0.5, TRAINING_SET, ge=0, lt=1, help="Share of samples that both models answer right: less forgetting."
    )
    target: Target = setting(
        "short", TRAINING_SET, help="Text to learn: the teacher's short answer, or what it wrote with the question."
    )
    rounds: int = setting(1, TRAINING_SET, ge=1, le=16, help="Ask and train again against the updated student.")
    save_as: tuple[SaveAs, ...] = setting(
        (), TRAINING_SET, help="Also write the training set for other trainers; repeat for both.", shown="none"
    )

    method: Method = setting("lora", TRAINING, help="What is trained; qlora needs a CUDA GPU.")
    train: tuple[Part, ...] = setting(
        ("language",), TRAINING, help="Parts of the student to train; repeat for several.", shown="language"
    )
    rank: int = setting(32, TRAINING, ge=1, help="Rank of the adapter.")
    alpha: int = setting(64, TRAINING, ge=1, help="Its scale is alpha / rank.")
    learning_rate: float = setting(0.0, TRAINING, ge=0, lt=1, help="Peak learning rate.", shown="by student size")
    warmup: float = setting(0.05, TRAINING, ge=0, lt=1, help="Share of the steps in which the rate rises.")
    epochs: int = setting(10, TRAINING, ge=1, help="At most; the best on held-out pictures is kept.")
    patience: int = setting(3, TRAINING, ge=1, help="Stop after so many epochs without gain on held-out pictures.")
    holdout: float = setting(0.1, TRAINING, gt=0, le=0.5, help="Share of the pictures that is held out.")
    train_batch_size: int = setting(32, TRAINING, ge=1, help="Samples per forward and backward pass.")
    accumulate: int = setting(1, TRAINING, ge=1, help="Passes per optimizer step.")
    checkpointing: Checkpointing = setting("auto", TRAINING, help="Trade time for memory (gradient checkpointing).")

    accelerate: Accelerate | None = setting(
        None,
        SCALE,
        help="Train in several processes: ddp, fsdp, which spreads the student over them, or deepspeed, its optimizer.",
        shown="one",
    )
    processes: int | None = setting(None, SCALE, ge=1, help="How many of them.", shown="as many as GPUs")
    engine: Engine = setting("local", SCALE, help="Where pictures are asked about: in this process, or by Ray actors.")
    address: str | None = setting(
        None, SCALE, help="The Ray cluster: auto, or HOST:PORT.", shown="a Ray of this machine alone"
    )
    actors: int | None = setting(
        None, SCALE, ge=1, help="Ray actors, each with its models and a CPU core.", shown="as many as fit"
    )
    gpus_per_actor: float | None = setting(
        None, SCALE, ge=0, help="Share of a GPU, or several, for each.", shown="1 where the cluster has GPUs, else 0"
    )
    mirror: str | None = setting(
        None, SCALE, help="Also keep what was asked here, s3://BUCKET/RUN or any fsspec URL, and go on from there."
    )

    @model_validator(mode="after")
    def _no_address_holds_a_secret(self) -> AlignConfig:
        """All settings are written to `run.json`."""
        for name, value in self:
            if isinstance(value, str) and holds_secret(f"ray://{value}" if name == "address" else value):
                raise PydanticCustomError("secret", "{told}", {"told": f"--{name.replace('_', '-')}: {IN_FILES}"})
        return self

    @model_validator(mode="after")
    def _ray_is_asked_for(self) -> AlignConfig:
        """What says how Ray is used goes with it, and what only one process can count does not."""
        names = ("address", "actors", "gpus_per_actor")
        for name in names if self.engine == "local" else ("max_requests",):
            if getattr(self, name) is not None:
                flag, how = f"--{name.replace('_', '-')}", "goes" if self.engine == "local" else "does not go"
                raise PydanticCustomError("engine", "{flag} {how} with --engine ray", {"flag": flag, "how": how})
        return self

    @model_validator(mode="after")
    def _one_student_is_asked(self) -> AlignConfig:
        """From the second round on it is the trained student that is asked; its bundle does not exist yet."""
        if self.ask and self.rounds > 1:
            raise PydanticCustomError(
                "ask",
                "--ask with --rounds {rounds}: the bundle can be asked in the first round only",
                {"rounds": self.rounds},
            )
        return self

    @property
    def run(self) -> Path:
        """The run folder: `--out`, or runs/TASK-STUDENT."""
        return self.out or Path("runs") / f"{Path(self.task).stem}-{Path(self.student.rstrip('/')).name}"


def _one_line(error: Any) -> str:
    if not error["loc"]:
        return str(error["msg"])
    flag = "--" + str(error["loc"][0]).replace("_", "-")
    if error["type"] == "missing":
        return f"{flag} is needed"
    given = str(error["input"])
    given = given if len(given) <= MOST_SHOWN else f"{given[:MOST_SHOWN]} …"
    return f"{flag} {given}: {error['msg'][0].lower()}{error['msg'][1:]}"
