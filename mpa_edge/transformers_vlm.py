"""A transformers model behind the `Vlm` interface: left-padded batches, greedy or sampled row by row.

Training takes its prompts from here too (`encode`, `target_ids`), so that the student is trained on exactly the tokens
and pixels that it is asked with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoModelForImageTextToText, BatchFeature, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from mpa_edge.devices import device_named, dtype_named, four_bit_config, require_four_bit
from mpa_edge.digests import digest_of_adapter, digest_of_folder
from mpa_edge.errors import InputError, ModelError
from mpa_edge.features import CACHE_BYTES, FeatureCache, known_pictures, takes_features
from mpa_edge.phases import Phases
from mpa_edge.plain_text import PlainText, append_left_padded
from mpa_edge.processors import load_processor
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.sampling import RowSampling, seed_of

# A private-use character stands for the user's text where a template is rendered to be cut there.
SLOT = "\ue000"
# What helps when a single picture is too much.
SMALLER = "Make pictures smaller (student: --longest-edge, teacher: --teacher-longest-edge)"
FOUR_BIT = "or load the model in 4 bit (student: --method qlora, teacher: --teacher-4bit)"


class TransformersVlm:
    """A loaded model with its processor."""

    engine = "transformers"

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        source: dict[str, Any] | None = None,
        batch_size: int = 32,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`source` says which weights these are (digest, revision, …), for fingerprints. `batch_size` shrinks when
        memory runs out. `cache_bytes` is what image features may take of main memory; 0 keeps none, and encodes
        pictures batch by batch."""
        self.name = name
        self.batch_size = batch_size
        self.model = model.eval()
        self.processor = processor
        self._source = source or {}
        self._stops = self._stop_tokens()
        self._plain = PlainText(processor)
        self._features = FeatureCache(cache_bytes) if cache_bytes and takes_features(model) else None
        self._features_proven = False
        # A model's own generation_config may sample, penalise repetitions and the like: the caller decides that here.
        self.model.generation_config = GenerationConfig(
            eos_token_id=self._stops, pad_token_id=self.pad, bos_token_id=model.generation_config.bos_token_id
        )

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        adapter: Path | None = None,
        name: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        four_bit: bool = False,
        longest_edge: int | None = None,
        trust_remote_code: bool = False,
    ) -> TransformersVlm:
        """Load a transformers folder or hub id, with a peft adapter on it if one is named; `ModelError` with the reason
        when that fails.

        `device` auto takes CUDA, then Apple's GPU, then the CPU; `dtype` auto is float32 on the CPU and bfloat16
        elsewhere. The adapter is not merged. `four_bit` quantizes the weights as they are loaded (see `devices`), and
        `longest_edge` sets how large the model sees pictures (see `processors.limit`); `InputError` where the machine
        or the processor cannot do that. Code that the model brings is run with `trust_remote_code` only.
        """
        place = device_named(device)
        if four_bit:
            require_four_bit(place)
        quantized = {"quantization_config": four_bit_config(), "device_map": {"": place}} if four_bit else {}
        if not sys.stderr.isatty():
            disable_progress_bar()
        try:
            processor = load_processor(spec, longest_edge, trust_remote_code=trust_remote_code)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                spec,
                dtype=dtype_named(dtype, place),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                **quantized,
            )
            if adapter is not None:
                model = _with_adapter(model, adapter)
        except InputError:
            raise
        except Exception as error:  # transformers and peft raise whatever they trip over
            where = spec if adapter is None else f"{adapter} on {spec}"
            raise ModelError(
                f"{where}: cannot be loaded as an image-text-to-text model ({_first_line(error)})"
            ) from error
        source: dict[str, Any] = {"weights": digest_of_folder(Path(spec))} if Path(spec).is_dir() else {"hub_id": spec}
        source["revision"] = getattr(model.config, "_commit_hash", None)
        if adapter is not None:
            source["adapter"] = digest_of_adapter(adapter)
        if four_bit:
            source["quantization"] = "nf4"
        else:
            model = model.to(place)
        return cls(model, processor, name=name or _name_of(spec), source=source, batch_size=batch_size)

    def answer(self, images: Sequence[Image], prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[Answer]:
        """As `Vlm.answer`. Phases are timed, and kept image features left alone, where one pair is asked: several have
        no latency of their own, and features from the cache would fake the latency of one."""
        if len(images) != len(prompts):
            raise InputError(f"{len(images)} pictures and {len(prompts)} prompts")
        if len(images) == 1:
            return self._answer(images, prompts, decoding, timed=True)
        # Prompts of like length share a batch, so that little is padding. Most of a prompt are its image tokens.
        order = sorted(range(len(prompts)), key=lambda index: (self._patches(images[index]), len(prompts[index])))
        answers: dict[int, Answer] = {}
        while len(answers) < len(order):
            most = self.batch_size
            batch = order[len(answers) : len(answers) + most]
            found = self._answer([images[index] for index in batch], [prompts[index] for index in batch], decoding)
            answers.update(zip(batch, found, strict=True))
            if self.batch_size < most:
                told = f"out of memory with {len(batch)} pictures at once, going on with {self.batch_size}"
                sys.stderr.write(f"{self.name}: {told}\n")
        return [answers[index] for index in range(len(prompts))]

    def encode(self, images: Sequence[Image], prompts: Sequence[str]) -> BatchFeature:
        """The model's inputs for one user turn per picture, left-padded, on the model's device.

        Special tokens that stand in a prompt (`<image>`, `<end_of_utterance>`) are encoded as the text they are.
        """
        return self._encode(self.processor, images, prompts)

    def encode_with_features(self, images: Sequence[Image], prompts: Sequence[str]) -> BatchFeature | None:
        """As `encode`, with image features in the place of pixels: `mm_encoder_outputs`, of which
        `["image"].pooler_output` lists each picture's features (tokens, width). Pictures asked before are not encoded
        again. None for a model that takes no features, or when none are to be kept.

        For generation and for training alike, as long as what makes the features is frozen.
        """
        if self._features is None:
            return None
        processor, pictures = known_pictures(self.processor, self.model, self._features)
        inputs = self._encode(processor, images, prompts)
        inputs["mm_encoder_outputs"] = pictures.encoder_outputs()
        return inputs

    def _encode(self, processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> BatchFeature:
        typed = {row: prompt for row, prompt in enumerate(prompts) if self._plain.holds_added_tokens(prompt)}
        turns = [
            _turn({"type": "image", "image": image}, prompt) for image, prompt in zip(images, prompts, strict=True)
        ]
        template, texts = self._cut_at(turns, typed) if typed else (None, {})
        inputs: BatchFeature = processor.apply_chat_template(
            turns,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        if typed:
            append_left_padded(inputs, texts, pad=self.pad)
        inputs.to(self.model.device, dtype=self.model.dtype)  # in place
        return inputs

    def _cut_at(self, turns: list[Any], typed: dict[int, str]) -> tuple[str, dict[int, list[int]]]:
        """Render the turns into their own messages, the typed ones up to where their text begins; returns a template
        that writes them out again, and the tokens that are missing of the typed ones: their text and what follows."""
        template = self.processor.apply_chat_template
        rendered = template(turns, add_generation_prompt=True)
        slotted = template([_turn({"type": "image"}, f" {SLOT} ")], add_generation_prompt=True)[0]
        trimmed = f" {SLOT} " not in slotted
        head, _, tail = slotted.partition(SLOT if trimmed else f" {SLOT} ")
        after = self.processor.tokenizer(tail, add_special_tokens=False)["input_ids"]
        for row, turn in enumerate(turns):
            turn[0]["rendered"] = head if row in typed else rendered[row]
        texts = {row: self._plain.encode(text.strip() if trimmed else text) + after for row, text in typed.items()}
        return "{{ messages[0]['rendered'] }}", texts

    def target_ids(self, answer: str) -> list[int]:
        """The tokens that the model should write after the prompt: the answer as its chat template renders an
        assistant's turn, up to and with the stop token."""
        user = _turn({"type": "image"}, "?")[0]
        assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        template = self.processor.apply_chat_template
        prompt = template([user], add_generation_prompt=True)
        whole = template([user, assistant], add_generation_prompt=False)
        text = whole[len(prompt) :] if whole.startswith(prompt) else answer
        if self._plain.holds_added_tokens(answer):
            # The template sets an answer off with white space at most; the stop token follows it.
            return [*self._plain.encode(text.partition(answer)[0] + answer), self._stops[0]]
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        stop = next((place for place, token in enumerate(ids) if token in self._stops), None)
        return [*ids, self._stops[0]] if stop is None else ids[: stop + 1]

    def describe(self) -> dict[str, Any]:
        """As `Vlm.describe`."""
        import transformers

        return {
            "engine": self.engine,
            "transformers": transformers.__version__,
            **self._source,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "image": _image_settings(self.processor),
        }

    def close(self) -> None:
        """Drop the model and what is kept of pictures, and give the memory back."""
        self.model = self._features = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def most_tokens(self) -> int | None:
        """The length that the language model's positions allow, where it has such a limit."""
        most: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return most

    @property
    def pad(self) -> int:
        """The token that fills up rows; it is masked."""
        tokenizer = self.processor.tokenizer
        return int(self._stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def _stop_tokens(self) -> list[int]:
        """What ends an answer: the generation config's tokens, and the tokenizer's own."""
        configured = self.model.generation_config.eos_token_id
        stops = list(configured) if isinstance(configured, (list, tuple)) else [configured]
        stops = [stop for stop in [*stops, self.processor.tokenizer.eos_token_id] if stop is not None]
        if not stops:
            raise ModelError(f"{self.name}: neither generation_config.json nor the tokenizer names a stop token")
        return list(dict.fromkeys(stops))

    def _patches(self, image: Image) -> int:
        """How much the image processor makes of a picture of this size, in its own measure."""
        count = getattr(self.processor.image_processor, "get_number_of_image_patches", lambda height, width, _: 0)
        try:
            found = count(image.height, image.width, {})
        except ValueError:  # a shape that it refuses; it will say so when it is asked in earnest
            return 0
        return int(found[0] if isinstance(found, tuple) else found)

    def _answer(
        self, images: Sequence[Image], prompts: Sequence[str], decoding: Decoding, *, timed: bool = False
    ) -> list[Answer]:
        """One batch, in smaller ones when it does not fit into memory or holds a pair that is refused."""
        size = len(images)
        try:
            return self._generate(images, prompts, decoding, timed=timed)
        except torch.AcceleratorError as error:
            # The device is in an unknown state: every further answer would fail too, and none of them for its own sake.
            raise ModelError(f"{self.name}: {_first_line(error)}") from error
        except (ValueError, RuntimeError) as error:
            no_memory = _is_out_of_memory(error)
            if size == 1:
                reason, cure = (
                    _first_line(error),
                    SMALLER if "quantization" in self._source else f"{SMALLER} {FOUR_BIT}",
                )
                return [Answer("", finish_reason="error", error=f"{reason}. {cure}" if no_memory else reason)]
        # The error is gone here, and with it what it held of the memory.
        torch.cuda.empty_cache()
        part = size // 2
        if no_memory:
            self.batch_size = min(self.batch_size, part)
        answers: list[Answer] = []
        while len(answers) < size:
            places = slice(len(answers), len(answers) + min(part, self.batch_size))
            answers += self._answer(images[places], prompts[places], decoding)
        return answers

    def _generate(
        self, images: Sequence[Image], prompts: Sequence[str], decoding: Decoding, *, timed: bool
    ) -> list[Answer]:
        if timed or self._features is None:
            return self._generate_from(self.encode, images, prompts, decoding, timed=timed)
        try:
            answers = self._generate_from(self.encode_with_features, images, prompts, decoding)
        except Exception as error:
            if self._features_proven or _is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            # A model that takes features in a way of its own. Or a picture is bad: then this raises too.
            answers = self._generate_from(self.encode, images, prompts, decoding)
            self._features = None
        self._features_proven = True
        return answers

    @torch.inference_mode()
    def _generate_from(
        self,
        encode: Callable[[Sequence[Image], Sequence[str]], Any],
        images: Sequence[Image],
        prompts: Sequence[str],
        decoding: Decoding,
        *,
        timed: bool = False,
    ) -> list[Answer]:
        with Phases(self.model, watch=timed) as phases:
            inputs = encode(images, prompts)
            width, most = inputs["input_ids"].shape[1], self.most_tokens
            if most is not None and width > most:
                raise ValueError(f"the prompt takes {width} tokens, the model takes {most}")
            phases.mark("encoded")
            choose: list[Any] = [phases]
            if decoding.temperature > 0:
                seeds = [seed_of(decoding.seed, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
                choose.append(RowSampling(seeds, decoding.temperature, decoding.top_p))
            output = self.model.generate(
                **inputs, max_new_tokens=decoding.max_new_tokens, do_sample=False, logits_processor=choose
            )
            phases.mark("done")
        prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        timings = phases.timings()
        return [
            self._answer_of(row, count, timings)
            for row, count in zip(output[:, width:].tolist(), prompt_tokens, strict=True)
        ]

    def _answer_of(self, ids: list[int], prompt_tokens: int, timings: Any) -> Answer:
        stop = next((place for place, token in enumerate(ids) if token in self._stops), None)
        tokens = ids if stop is None else ids[:stop]
        return Answer(
            text=self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            tokens=tuple(tokens),
            prompt_tokens=prompt_tokens,
            finish_reason="length" if stop is None else "stop",
            timings=timings,
        )


def _turn(image: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]


def _image_settings(processor: Any) -> dict[str, Any]:
    """The image processor's settings that shape pixels, as JSON."""
    settings = json.loads(processor.image_processor.to_json_string())
    return {key: value for key, value in settings.items() if value is not None and not key.startswith("_")}


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    from mpa_edge.lora import no_future_warnings

    # peft changes the model's layers in place; the model itself keeps its own methods.
    with no_future_warnings():
        return PeftModel.from_pretrained(model, str(adapter)).get_base_model()


def _name_of(spec: str) -> str:
    return Path(spec.rstrip("/")).name


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an error of its own for it, other devices only say so."""
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)
