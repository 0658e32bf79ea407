"""SmolVLM-256M and -500M in their true dimensions with random weights: what they compute costs as much as the trained
models' work.

    python -m mpa_edge.benchmarks.smolvlm runs/smolvlm-256m      model, bundles and a report of times and memory

256,484,928 and 507,482,304 weights, as their model cards say: SigLIP base (tiles of 512 pixels, patches of 16), pixel
shuffle of 4 by 4 to 64 image tokens, SmolLM2-135M or -360M with an output layer of its own. The tokenizer is the
reference pair's, filled up to the true vocabulary with merges of its own tokens; every picture is one tile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpa_edge.benchmarks.reference_models import CHAT_TEMPLATE, SPECIAL, make_tokenizer

if TYPE_CHECKING:
    from transformers import Idefics3Config, PreTrainedTokenizerFast

TILE, IMAGE_TOKENS, VOCABULARY = 512, 64, 49280
SHUFFLE = 4  # patches in each direction that become one image token
VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": TILE,
    "patch_size": 16,
}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
}
TEXTS: dict[str, dict[str, Any]] = {
    "256M": {
        **TEXT,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "500M": {
        **TEXT,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
}


def smolvlm_config(size: str = "256M", **ids: int) -> Idefics3Config:
    """The configuration of "256M" or "500M"; `ids` are special tokens' ids."""
    from transformers import Idefics3Config

    special = {name: value for name, value in ids.items() if name != "image_token_id"}
    given: dict[str, Any] = dict(ids)
    return Idefics3Config(
        text_config={**TEXTS[size], **special, "tie_word_embeddings": False},
        vision_config=VISION,
        scale_factor=SHUFFLE,
        tie_word_embeddings=False,
        **given,
    )


def write_random_smolvlm(folder: Path, size: str = "256M", *, seed: int = 0) -> Path:
    """Write model, tokenizer and processor to a folder (4 bytes a weight); the folder."""
    import torch
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = full_tokenizer()
    images = Idefics3ImageProcessorPil(size={"longest_edge": TILE}, max_image_size={"longest_edge": TILE})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = smolvlm_config(size, image_token_id=processor.image_token_id, **ids)
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def full_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """The reference pair's tokenizer with further merges, of any two of its tokens, up to `size` tokens."""
    from tokenizers import models

    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary, merges = state["vocab"], [tuple(pair) for pair in state["merges"]]
    words = [token for token in vocabulary if token not in SPECIAL]
    for first, second in product(words, words):
        if len(vocabulary) >= size:
            break
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append((first, second))
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    return tokenizer


@dataclass(frozen=True)
class Costs:
    """What is measured: how many pictures are timed, answers of how many tokens, and in which formats."""

    timed: int = 30
    tokens: int = 12
    quants: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {"gguf": ("f16", "q8_0", "q4_k_m"), "onnx": ("fp32", "int8", "q4")}
    )


def report_costs(out: Path, size: str = "256M", costs: Costs | None = None, threads: int | None = None) -> Path:
    """Write the random model, its bundles, and a report of what they cost beside the model in PyTorch; report.json.

    What is there already is not made again. Nothing is asked for accuracy: random weights know nothing, and they never
    end an answer, so that all answers have the same length.
    """
    from mpa_edge.benchmarks.bench import BenchConfig, bench
    from mpa_edge.benchmarks.reference import write_test
    from mpa_edge.benchmarks.runtime_bundles import write_bundles
    from mpa_edge.bundle import MANIFEST

    costs = costs or Costs()
    model = out / f"SmolVLM-{size}-random"
    if not (model / "config.json").is_file():
        write_random_smolvlm(model, size)
    wanted = {f"{kind}-{quant}": (kind, quant) for kind, names in costs.quants.items() for quant in names}
    missing: dict[str, list[str]] = {}
    for name, (kind, quant) in wanted.items():
        if not (out / name / MANIFEST).is_file():
            missing.setdefault(kind, []).append(quant)
    write_bundles(model, out, missing, tokens=costs.tokens)
    if not (out / "test" / "test.jsonl").is_file():
        write_test(out / "test", costs.timed + 10)  # some are for the warm-up
    return bench(
        BenchConfig(
            data=(out / "test" / "test.jsonl",),
            name=f"SmolVLM-{size}'s dimensions, random weights",
            bundles=tuple(str(out / name) for name in wanted),
            baselines=(str(model),),
            task="reference",
            report=out / "report",
            latency_n=costs.timed,
            threads=None if threads is None else str(threads),
            costs_only=True,
            keep_timings=True,
        )
    )


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the model, the bundles and the report: 6 GB for 256M.")],
    size: Annotated[str, typer.Option(help="256M or 500M.")] = "256M",
    timed: Annotated[int, typer.Option(help="How many pictures are timed.")] = Costs.timed,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores without.")] = None,
    quants: Annotated[str, typer.Option(help="Formats and precisions, such as gguf-q8_0,onnx-int8.")] = "",
) -> None:
    """Report the times and the memory of SmolVLM's true dimensions, with random weights."""
    if size not in TEXTS:
        raise typer.BadParameter(f"{size}: one of {', '.join(TEXTS)}", param_hint="--size")
    chosen: dict[str, list[str]] = {}
    for name in filter(None, quants.split(",")):
        kind, _, quant = name.strip().partition("-")
        chosen.setdefault(kind, []).append(quant)
    path = report_costs(out, size, Costs(timed, quants=chosen) if chosen else Costs(timed), threads)
    typer.echo(path.with_suffix(".html"))


if __name__ == "__main__":
    typer.run(main)
