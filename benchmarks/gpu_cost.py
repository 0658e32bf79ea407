"""What a GPU takes for one answer and one training row of a large pair, beside what its arithmetic and memory allow.

    python -m mpa_edge.benchmarks.gpu_cost      Qwen2-VL-7B teaches SmolVLM-500M; an H100 takes some minutes

Random bfloat16 weights in the true dimensions, photos of 1024 x 768 pixels (999 image tokens for the teacher, 13 tiles
for the student), through the same code as `mpa-edge align`. As in a run, each stage puts several questions about every
picture, and answers are of the length given: random weights never end one.

| stage | one answer or row is |
|---|---|
| `write` | a question with its answer, sampled by the teacher; the picture is seen for the first time |
| `check` | a short answer of the teacher about a picture that it has seen |
| `student` | a short answer of the student; the picture is seen for the first time |
| `train` | a row of one epoch of LoRA, with features that are kept |

`floor_s` is the least that the device could take: two operations for each weight and token of the prompt (and each
patch, where the picture is new) at the measured rate of a large matrix product, and the weights read once for each
token of a batch at the measured rate of a copy. Only the last token of a prompt needs the output layer. A training row
is two such passes over its tokens, there and back: the weights themselves stay.

The result is written after each part, so that a machine that is taken away leaves what it measured.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpa_edge.asking import ask
from mpa_edge.benchmarks.host import host
from mpa_edge.records import write_atomic
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding

if TYPE_CHECKING:
    from mpa_edge.transformers_vlm import TransformersVlm

OUT = Path(__file__).parent / "results" / "gpu_cost.json"
QUESTION = "How many of the things in this picture are red, and what is written on the largest of them?"
WARM_UP = 2


@dataclass(frozen=True)
class Work:
    """Pictures of a series, questions about each, tokens of a long and of a short answer, rows per training step."""

    pictures: int = 32
    questions: int = 3
    long: int = 60
    short: int = 8
    train_batch: int = 16
    repeats: int = 3


@dataclass(frozen=True)
class Rates:
    """What the device does at best: floating-point operations and copied bytes (read and written) per second."""

    flops: float
    copied: float


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: of the language model's layers, of its output layer, and of the image encoder."""

    layers: int
    output: int
    vision: int


def measure(teacher: TransformersVlm, student: TransformersVlm, work: Work, folder: Path) -> Iterator[dict[str, Any]]:
    """All that is known, after each stage; the student is trained in place. Pictures are written to `folder`."""
    short = Decoding(work.short)
    long = [Decoding(work.long, temperature=1.0, seed=number) for number in range(work.questions)]
    series = [
        write_photos(folder / str(number), WARM_UP if number == 0 else work.pictures)
        for number in range(work.repeats + 1)
    ]
    _say("the photos are written")
    rates = rates_of(teacher.model.device)
    stages: dict[str, dict[str, Any]] = {}
    found = {"work": asdict(work), "flops_per_s": rates.flops, "copied_bytes_per_s": rates.copied, "stages": stages}
    for name, vlm, decodings, seen in (
        ("write", teacher, long, False),
        ("check", teacher, [short] * work.questions, True),
        ("student", student, [short] * work.questions, False),
    ):
        taken = [_timed(vlm, partial(_ask, vlm, photos, decodings)) for photos in series][1:]
        _say(f"{name}: {[_short(second) for second in taken]} s")
        stages[name] = _told(taken, work.pictures * work.questions) | _floor(
            vlm, series[1][0], decodings[0], work, rates, seen=seen
        )
        yield found
    stages["train"] = _train(student, series[1], work, rates)
    yield found


def _ask(vlm: TransformersVlm, photos: list[Path], decodings: list[Decoding]) -> None:
    """One question about every picture for each way to decode; all of one way in one call, as the stages do."""
    for decoding in dict.fromkeys(decodings):
        paths = [path for path in photos for _ in range(decodings.count(decoding))]
        prompts = [f"{QUESTION} ({number})" for number in range(len(paths))]
        failed = [answer.error for answer in ask(vlm, paths, prompts, decoding) if answer.error]
        if failed:
            raise RuntimeError(failed[0])


def _train(student: TransformersVlm, photos: list[Path], work: Work, rates: Rates) -> dict[str, Any]:
    import torch

    from mpa_edge.benchmarks.align_ways import train_epoch
    from mpa_edge.config import AlignConfig
    from mpa_edge.methods import make_trainable
    from mpa_edge.training_data import Example, TrainingData

    examples = [
        Example(f"{path}", path.name, path, f"{QUESTION} ({number})", "an answer", "parity")
        for path in photos
        for number in range(work.questions)
    ]
    data = TrainingData(student, examples)
    _say(f"the rows are prepared: {_timed(student, data.prepare):.1f} s")
    config = AlignConfig(images="-", teacher="-", student="student", task="reference")
    with tempfile.TemporaryDirectory() as folder:
        trainee = make_trainable(student, config, Path(folder), None)
    optimizer = torch.optim.AdamW(trainee.weights.values(), lr=1e-4)

    def epoch() -> None:
        train_epoch(student.model, data, list(range(len(examples))), work.train_batch, optimizer)

    epoch()
    taken = [_timed(student, epoch) for _ in range(work.repeats)]
    _say(f"train: {[_short(second) for second in taken]} s")
    prompt = student.encode([open_image(photos[0])], [QUESTION])["input_ids"].shape[1]
    floor = 2 * 2 * _weights(student).layers * prompt / rates.flops
    return _told(taken, len(examples)) | {"prompt_tokens": prompt, "floor_s": _short(floor)}


def _floor(
    vlm: TransformersVlm, photo: Path, decoding: Decoding, work: Work, rates: Rates, *, seen: bool
) -> dict[str, Any]:
    """See the module; `seen` pictures cost the encoder nothing."""
    weights = _weights(vlm)
    inputs = vlm.encode([open_image(photo)], [QUESTION])
    prompt = inputs["input_ids"].shape[1]
    patches = 0 if seen else _patches(vlm, inputs) / work.questions
    prefill = 2 * (weights.layers * prompt + weights.vision * patches) / rates.flops
    batch = min(vlm.batch_size, work.pictures * work.questions)
    read = (weights.layers + weights.output) * vlm.model.dtype.itemsize
    decode = decoding.max_new_tokens * read / rates.copied / batch
    return {
        "prompt_tokens": prompt,
        "answer_tokens": decoding.max_new_tokens,
        "batch": batch,
        "floor_s": _short(prefill + decode),
    }


def _patches(vlm: TransformersVlm, inputs: Any) -> int:
    """How many patches the encoder sees of a picture."""
    if "image_grid_thw" in inputs:
        return int(inputs["image_grid_thw"].prod(-1).sum())
    *_, height, width = inputs["pixel_values"].shape
    tiles = inputs["pixel_values"].numel() // (3 * height * width)
    return int(tiles * (height // vlm.model.config.vision_config.patch_size) ** 2)


def _weights(vlm: TransformersVlm) -> Weights:
    vision = sum(weight.numel() for weight in vlm.model.get_encoder(modality="image").parameters())
    tables = {id(layer.weight): layer.weight.numel() for layer in (vlm.model.get_input_embeddings(), _output(vlm))}
    every = sum(weight.numel() for weight in vlm.model.parameters())
    return Weights(every - vision - sum(tables.values()), _output(vlm).weight.numel(), vision)


def _output(vlm: TransformersVlm) -> Any:
    return vlm.model.get_output_embeddings()


def rates_of(device: Any) -> Rates:
    """The best of some large matrix products and copies on a torch device."""
    import torch

    gpu = device.type == "cuda"
    size, kind = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    source = torch.randn((1 << 29) if gpu else (1 << 24), device=device)
    target = torch.empty_like(source)
    product = min(_seconds(device, lambda: left @ right) for _ in range(10))
    copy = min(_seconds(device, lambda: target.copy_(source)) for _ in range(10))
    return Rates(2 * size**3 / product, 2 * source.nbytes / copy)


def _say(line: str) -> None:
    typer.echo(f"{datetime.now():%H:%M:%S} {line}", err=True)


def _timed(vlm: TransformersVlm, work: Callable[[], Any]) -> float:
    return _seconds(vlm.model.device, work)


def _seconds(device: Any, work: Callable[[], Any]) -> float:
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _told(taken: list[float], count: int) -> dict[str, Any]:
    return {"seconds": _short(median(taken) / count), "count": count, "raw_s": [_short(second) for second in taken]}


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def write_photos(folder: Path, count: int, size: tuple[int, int] = (1024, 768)) -> list[Path]:
    """So many different pictures with soft shapes and some noise, as JPEG."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        draw = np.random.default_rng([number, *folder.name.encode()])
        small = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + draw.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


def open_random(name: str, make: Callable[[], tuple[Any, Any]], device: str, batch_size: int) -> TransformersVlm:
    """A model with random weights, made where it runs, in the type that models have there."""
    import torch

    from mpa_edge.benchmarks.export_models import made_in
    from mpa_edge.devices import device_named, dtype_named
    from mpa_edge.transformers_vlm import TransformersVlm

    place = device_named(device)
    torch.manual_seed(0)
    with place, made_in(dtype_named("auto", place)):
        model, processor = make()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return TransformersVlm(model.to(place), processor, name=name, batch_size=batch_size)


def main(
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = OUT,
    device: Annotated[str, typer.Option(help="auto, cuda, or cpu (which takes hours).")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Questions that are asked at once.")] = 32,
    pictures: Annotated[int, typer.Option(help="Pictures of each repeat.")] = Work.pictures,
) -> None:
    """Measure, and write the result after each part."""
    from mpa_edge.benchmarks.export_models import QWEN_7B_TEXT, random_qwen2_vl, random_smolvlm

    teacher = open_random(
        "Qwen2-VL-7B", lambda: random_qwen2_vl(QWEN_7B_TEXT, tied=False, most_image_tokens=1280), device, batch_size
    )
    student = open_random("SmolVLM-500M", lambda: random_smolvlm(longest_edge=2048), device, batch_size)
    _say("both models are made")
    about = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m mpa_edge.benchmarks.gpu_cost",
        "host": host(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(teacher, student, Work(pictures=pictures), Path(folder)):
            result = about | _device(teacher.model.device) | {"batch_size": batch_size} | found
            write_atomic(out, json.dumps(result, indent=2) + "\n")
    for name, stage in result["stages"].items():
        typer.echo(f"{name:<8} {stage['seconds']:.4f} s each, floor {stage['floor_s']:.4f} s")


def _device(device: Any) -> dict[str, Any]:
    """Its name, and the most memory that was ever taken of it."""
    import torch

    if device.type != "cuda":
        return {"device": device.type, "peak_gpu_bytes": None}
    return {"device": torch.cuda.get_device_name(device), "peak_gpu_bytes": torch.cuda.max_memory_allocated(device)}


if __name__ == "__main__":
    typer.run(main)
