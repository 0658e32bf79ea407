from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpa_edge.bundle import read_bundle, write_bundle
from mpa_edge.errors import BundleError, InputError, ModelError
from mpa_edge.export.to_onnx import to_onnx
from mpa_edge.runtime import BundleVlm, load, open_bundle
from mpa_edge.runtime.onnx import OnnxEngine
from tiny_bundles import manifest_of

# Float32 on both sides; sums are taken in another order. 2e-6 of the largest logit is what is seen.
FP32_TOLERANCE = 2e-5
QUESTION = "What does the sign say?"

Picture = Callable[..., Image.Image]
MakeBundle = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def make_bundle(tmp_path_factory: pytest.TempPathFactory, onnx_graphs: Callable[[Path], Path]) -> MakeBundle:
    """`make_bundle(model, quant)`: the folder of an ONNX bundle, made once."""
    root = tmp_path_factory.mktemp("bundles")

    def make(model: Path, quant: str) -> Path:
        folder = root / f"{model.name}-{quant}"
        if not folder.exists():
            files, checks = to_onnx(model, folder, quant, graphs=onnx_graphs(model))
            write_bundle(folder, manifest_of(model, "onnxruntime", quant, files, checks=checks))
        return folder

    return make


class Reference:
    """transformers in float32, with its own processor."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, image: Image.Image, question: str) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return self.processor(text=text, images=[[image]], return_tensors="pt")

    def logits(self, image: Image.Image, question: str) -> np.ndarray:
        with torch.inference_mode():
            return self.model(**self.inputs(image, question)).logits[0].numpy()

    def greedy(self, image: Image.Image, question: str, count: int) -> list[int]:
        inputs = self.inputs(image, question)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=count)[0]
        return [int(token) for token in tokens[inputs["input_ids"].shape[1] :]]


@pytest.fixture(scope="module", params=["one tile", "ten tiles", "four tiles"])
def case(request: pytest.FixtureRequest, tiny_idefics3: Path, tiny_one_tile: Path, picture: Picture) -> Any:
    """A model folder, a picture that becomes this many tiles under it, and their number."""
    folder, size, tiles = {
        "one tile": (tiny_one_tile, (97, 64), 1),  # and untied output weights
        "ten tiles": (tiny_idefics3, (200, 180), 10),
        "four tiles": (tiny_idefics3, (200, 40), 4),
    }[request.param]
    return folder, picture(*size), tiles


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def test_logits_at_every_position_equal_those_of_transformers(case: Any, make_bundle: MakeBundle) -> None:
    folder, image, tiles = case
    wanted = Reference(folder).logits(image, QUESTION)
    with load(make_bundle(folder, "fp32"), threads=1) as vlm:
        assert len(vlm.prepare([image], QUESTION)[1].cuts[0].tiles) == tiles
        got = vlm.logits([image], QUESTION)
    assert got.shape == wanted.shape
    assert got.dtype == np.float32
    assert relative(got, wanted) < FP32_TOLERANCE
    # The picture counts: another one gives other logits after it.
    assert relative(Reference(folder).logits(Image.new("RGB", image.size), QUESTION)[-1], wanted[-1]) > 1e-3


def test_greedy_tokens_equal_those_of_transformers(case: Any, make_bundle: MakeBundle) -> None:
    folder, image, _ = case
    reference = Reference(folder)
    with load(make_bundle(folder, "fp32"), threads=1) as vlm:
        for question in (QUESTION, "How many red circles are there?", "Yes or no?"):
            answer = vlm.ask(image, question)
            wanted = reference.greedy(image, question, 12)
            stop = vlm.bundle.prompt.stop_token_ids
            assert list(answer.tokens) == [token for token in wanted if token not in stop]
            assert answer.finish_reason == ("stop" if wanted[-1] in stop else "length")


def test_decoding_equals_reading_the_same_tokens_at_once(
    tiny_idefics3: Path, make_bundle: MakeBundle, picture: Picture
) -> None:
    engine, tokens, features = opened(make_bundle(tiny_idefics3, "fp32"), picture(200, 180))
    wanted = engine.prefill([*tokens, 11, 12, 13], features, all_logits=True)[-4:]
    got = [engine.prefill(tokens, features), *(engine.extend([token]) for token in (11, 12, 13))]
    np.testing.assert_allclose(np.stack(got), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_new_prompt_forgets_the_old_one(tiny_idefics3: Path, make_bundle: MakeBundle, picture: Picture) -> None:
    engine, tokens, features = opened(make_bundle(tiny_idefics3, "fp32"), picture(200, 180))
    first = engine.prefill(tokens, features)
    engine.extend([11])
    engine.prefill(tokens[::-1], features)
    np.testing.assert_array_equal(engine.prefill(tokens, features), first)


def test_a_kept_picture_gives_the_very_same_answers(
    tiny_idefics3: Path, make_bundle: MakeBundle, check_kept_pictures: Callable[..., None]
) -> None:
    with load(make_bundle(tiny_idefics3, "int8"), threads=1) as vlm:
        check_kept_pictures(vlm, QUESTION)


@pytest.mark.parametrize(("quant", "low", "high"), [("int8", 1e-4, 0.05), ("q4", 0.01, 0.5)])
def test_quantized_logits_stay_near_float32(
    tiny_idefics3: Path, make_bundle: MakeBundle, picture: Picture, quant: str, low: float, high: float
) -> None:
    """Bounds on a random model: below `low` nothing was quantized, above `high` it is broken (0.012 and 0.14 seen)."""
    image = picture(200, 180)
    logits = {}
    for name in ("fp32", quant):
        with load(make_bundle(tiny_idefics3, name), threads=1) as vlm:
            logits[name] = vlm.logits([image], QUESTION)
    error = np.sqrt(((logits[quant] - logits["fp32"]) ** 2).mean() / (logits["fp32"] ** 2).mean())
    assert low < error < high


def test_the_engine_runs_without_torch_and_onnx(
    tiny_idefics3: Path, make_bundle: MakeBundle, picture: Picture, tmp_path: Path
) -> None:
    picture(200, 40).save(tmp_path / "picture.png")
    bundle = make_bundle(tiny_idefics3, "int8")
    program = (
        "import json, sys\n"
        "from mpa_edge.runtime import load\n"
        f"with load({str(bundle)!r}, threads=1) as vlm:\n"
        f"    answer = vlm.ask({str(tmp_path / 'picture.png')!r}, {QUESTION!r})\n"
        "heavy = sorted({'torch', 'transformers', 'onnx', 'peft', 'pandas'} & set(sys.modules))\n"
        "print(json.dumps([answer.tokens, answer.prompt_tokens, heavy]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    tokens, prompt_tokens, heavy = json.loads(done.stdout)
    assert heavy == []
    assert tokens
    assert prompt_tokens > 4 * 16
    assert done.stderr == ""


def test_features_must_match_the_image_tokens(tiny_idefics3: Path, make_bundle: MakeBundle, picture: Picture) -> None:
    engine, tokens, features = opened(make_bundle(tiny_idefics3, "fp32"), picture(200, 40))
    with pytest.raises(ModelError, match="64 image tokens in the prompt for 48 image features"):
        engine.prefill(tokens, features[:48])


def test_a_tile_that_the_model_takes_for_padding_is_an_input_error(
    tiny_idefics3: Path, make_bundle: MakeBundle
) -> None:
    """Black pictures under a mean of 0: transformers drops such tiles too, and then counts too few features."""
    folder = make_bundle(tiny_idefics3, "fp32")
    bundle = read_bundle(folder)
    dark = bundle.model_copy(update={"image": bundle.image.model_copy(update={"mean": (0.0, 0.0, 0.0)})})
    pixels = np.full((64, 128, 3), 9, np.uint8)
    pixels[:, :64] = 0
    with open_bundle(folder, dark, threads=1) as vlm, pytest.raises(InputError, match="taken for padding"):
        vlm.ask(Image.fromarray(pixels), QUESTION)


def test_what_the_library_refuses_to_run_is_one_line(
    tiny_idefics3: Path, make_bundle: MakeBundle, picture: Picture
) -> None:
    """Tiles of another size than the vision encoder's, and a token that the embedding does not have."""
    folder = make_bundle(tiny_idefics3, "fp32")
    bundle = read_bundle(folder)
    large = bundle.model_copy(update={"image": bundle.image.model_copy(update={"tile_size": 96})})
    with open_bundle(folder, large, threads=1) as vlm:
        with pytest.raises(ModelError, match="the vision encoder cannot be run") as error:
            vlm.ask(picture(200, 40), QUESTION)
        assert str(error.value).isprintable()
        with pytest.raises(ModelError, match="the embedding cannot be run"):
            vlm.reader.engine.extend([10**6])


def test_a_damaged_graph_and_a_missing_provider_are_named(
    tiny_idefics3: Path, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = make_bundle(tiny_idefics3, "fp32")
    bundle = read_bundle(folder)
    with pytest.raises(InputError, match=r"NoSuchProvider is not in this ONNX Runtime: .*CPUExecutionProvider$"):
        OnnxEngine(folder, bundle, 0, providers=("NoSuchProvider",))
    with pytest.raises(InputError, match=r"Run: pip uninstall onnxruntime && pip install onnxruntime-directml$"):
        load(folder, device="directml")
    for file in bundle.files:
        (tmp_path / file.path).parent.mkdir(exist_ok=True)
        (tmp_path / file.path).write_bytes((folder / file.path).read_bytes())
    (tmp_path / "onnx" / "decoder_model_merged.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"decoder_model_merged.onnx cannot be loaded by ONNX Runtime"):
        OnnxEngine(tmp_path, bundle, 0)


def test_a_provider_that_does_not_work_is_not_replaced_in_silence(
    tiny_one_tile: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose ONNX Runtime has CUDA and whose CUDA libraries are missing."""
    import onnxruntime as ort

    folder = make_bundle(tiny_one_tile, "fp16")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(InputError, match=r'does not work here .*pip install "onnxruntime-gpu'),
    ):
        load(folder, device="cuda")
    with pytest.warns(UserWarning, match="going on with the CPU"), load(folder) as vlm:
        assert vlm.reader.engine.device == "CPUExecutionProvider"


def opened(folder: Path, image: Image.Image) -> tuple[OnnxEngine, list[int], Any]:
    """The engine of a bundle, and a prompt about the picture with its features."""
    with load(folder, threads=1) as vlm:
        assert isinstance(vlm, BundleVlm)
        tokens, seen = vlm.prepare([image], QUESTION)
    engine = OnnxEngine(folder, read_bundle(folder), vlm.prompts.image_token_id, threads=1)
    return engine, tokens, engine.encode(seen.cuts[0])
