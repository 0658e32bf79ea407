"""The GGUF pair: names, metadata, types, and that other programs find in it what they look for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from mpa_edge.bundle import File
from mpa_edge.errors import ExportError, InputError
from mpa_edge.export.families import FAMILIES
from mpa_edge.export.gguf_tokenizer import SAMPLE_TEXTS, pre_tokenizer_name
from mpa_edge.export.merged import Names
from mpa_edge.export.to_gguf import to_gguf
from mpa_edge.export.tolerance import TOLERANCE, logit_error
from mpa_edge.runtime import open_bundle
from mpa_edge.transformers_vlm import TransformersVlm
from tiny_bundles import manifest_of
from tiny_models import make_idefics3, make_internvl, make_llava, make_qwen2_5_vl, make_qwen2_vl

Made = dict[str, tuple[list[File], dict[str, Any]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def made(tiny_idefics3: Path, root: Path) -> Made:
    return to_gguf(
        tiny_idefics3, {quant: root / quant for quant in ("f16", "q8_0", "q4_k_m")}, Names("acme/Tiny-VLM", "signs")
    )


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_file_names_follow_the_convention(made: Made) -> None:
    names = {quant: [file.path for file in files] for quant, (files, _) in made.items()}
    assert names["q4_k_m"] == [
        "Tiny-VLM-135K-signs-Q4_K_M.gguf",
        "mmproj-Tiny-VLM-135K-signs-F16.gguf",
        "tokenizer.json",
    ]
    assert names["f16"][0] == "Tiny-VLM-135K-signs-F16.gguf"


def test_names_are_ascii(tiny_idefics3: Path, tmp_path: Path) -> None:
    made = to_gguf(tiny_idefics3, {"f16": tmp_path / "f16"}, Names("modèle 500M", "läufer/1"))
    assert all(file.path.isascii() and "/" not in file.path for file in made["f16"][0])


def test_metadata(made: Made, root: Path, tiny_idefics3: Path) -> None:
    language = fields(root / "q8_0" / made["q8_0"][0][0].path)
    assert language["general.architecture"] == "llama"
    assert language["general.name"] == "Tiny-VLM signs"
    assert language["general.basename"] == "Tiny-VLM"
    assert language["general.finetune"] == "signs"
    assert language["general.license"] == "apache-2.0"
    assert language["general.base_model.0.name"] == "Tiny-VLM"
    assert language["general.base_model.0.organization"] == "acme"
    assert language["general.base_model.0.repo_url"] == "https://huggingface.co/acme/Tiny-VLM"
    assert language["tokenizer.chat_template"] == (tiny_idefics3 / "chat_template.jinja").read_text()
    vision = fields(root / "q8_0" / made["q8_0"][0][1].path)
    assert vision["general.type"] == "mmproj"
    assert vision["clip.vision.projection_dim"] == language["llama.embedding_length"] == 64


def test_no_path_of_this_machine_is_in_the_metadata(made: Made, root: Path, tiny_idefics3: Path) -> None:
    for file in root.rglob("*.gguf"):
        texts = [value for value in fields(file).values() if isinstance(value, str)]
        for private in (str(tiny_idefics3.parent), str(root), str(Path.home())):
            assert not any(private in text for text in texts)


def test_types_are_what_was_asked_for(made: Made) -> None:
    assert set(made["f16"][1]["tensor_types"]) == {"F16", "F32"}
    assert set(made["q8_0"][1]["tensor_types"]) == {"Q8_0", "F32"}
    assert made["f16"][1]["fallbacks"] == made["q8_0"][1]["fallbacks"] == {}


def test_rows_that_a_k_quant_cannot_take_are_told(made: Made) -> None:
    checks = made["q4_k_m"][1]
    assert checks["fallbacks"]["blk.0.attn_q.weight"] == "Q5_0"
    assert "Q4_K" not in checks["tensor_types"]
    sizes = {quant: files[0].bytes for quant, (files, _) in made.items()}
    assert sizes["q4_k_m"] < sizes["q8_0"] < sizes["f16"]


WIDE = {
    "idefics3": make_idefics3,
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llava": make_llava,
    "internvl": make_internvl,
}


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_k_quants_take_rows_of_whole_blocks(family: str, tmp_path: Path, picture: Any) -> None:
    """What the families' parity cannot see: their text models are too narrow for blocks of 256."""
    model = WIDE[family](tmp_path / "wide", width=256)
    quants = ("q6_k", "q5_k_m", "q4_k_m", "q4_k_s")
    files = to_gguf(model, {quant: tmp_path / quant for quant in quants}, Names("wide"))
    reference, image = TransformersVlm.load(str(model), device="cpu", dtype="float32"), picture(190, 60)
    with torch.inference_mode():
        wanted = reference.model(**reference.encode([image], ["What?"])).logits[0].numpy()
    for quant, (described, checks) in files.items():
        assert checks["fallbacks"] == {}
        assert f"Q{quant[1]}_K" in checks["tensor_types"]
        with open_bundle(tmp_path / quant, manifest_of(model, "llama.cpp", quant, described), threads=1) as vlm:
            assert logit_error(vlm.logits([image], "What?"), wanted) <= TOLERANCE["llama.cpp"][quant]


def test_llama_cpp_tokenizes_as_the_original(made: Made) -> None:
    checks = made["f16"][1]
    assert checks["pre_tokenizer"] == "smollm"
    assert checks["tokenizer_agreement"] == 1.0
    assert len(SAMPLE_TEXTS) >= 4


def test_an_unknown_quantization_names_the_flag(tiny_idefics3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--quant q3"):
        to_gguf(tiny_idefics3, {"q3": tmp_path / "q3"}, Names("x"))


def test_missing_pieces_are_named(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_idefics3, tmp_path / "model"))
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if list(merge) != ["Ċ", "Ċ"]]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ExportError, match=r"'\\n\\n'"):
        to_gguf(folder, {"f16": tmp_path / "f16"}, Names("x"))


def state_of(pre: Any, *, normalizer: Any = None) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    return state


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def test_pre_tokenizers_are_known_by_their_structure() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    qwen = pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")
    sequence = pre_tokenizers.Sequence
    assert pre_tokenizer_name(state_of(byte_level)) == "gpt-2"
    assert pre_tokenizer_name(state_of(sequence([digits, byte_level]))) == "smollm"
    assert pre_tokenizer_name(state_of(sequence([split, raw]))) == "llama-bpe"
    assert pre_tokenizer_name(state_of(sequence([qwen, raw]))) == "qwen2"
    assert pre_tokenizer_name(state_of(sequence([qwen, raw]), normalizer=normalizers.NFC())) == "qwen2"


def test_other_pre_tokenizers_are_not_guessed() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    grouped = pre_tokenizers.Digits(individual_digits=False)
    assert pre_tokenizer_name(state_of(pre_tokenizers.Whitespace())) is None
    assert pre_tokenizer_name(state_of(pre_tokenizers.Sequence([grouped, byte_level]))) is None
    assert pre_tokenizer_name(state_of(pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    assert pre_tokenizer_name(state_of(byte_level, normalizer=normalizers.Lowercase())) is None


def test_llama_cpp_pythons_own_chat_handler_loads_the_pair(
    made: Made, root: Path, picture: Callable[..., Any], tmp_path: Path
) -> None:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    language, mmproj = (str(root / "f16" / file.path) for file in made["f16"][0][:2])
    picture(80, 60).save(tmp_path / "a.png")
    handler = MTMDChatHandler(clip_model_path=mmproj, verbose=False)
    model = Llama(language, chat_handler=handler, n_ctx=1024, n_threads=1, verbose=False)
    content = [
        {"type": "image_url", "image_url": {"url": (tmp_path / "a.png").as_uri()}},
        {"type": "text", "text": "What is it?"},
    ]
    answer = model.create_chat_completion([{"role": "user", "content": content}], max_tokens=4, temperature=0.0)
    assert answer["usage"]["completion_tokens"] > 0
    model.close()


def test_llama_mtmd_cli_answers_with_the_pair(
    made: Made, root: Path, picture: Callable[..., Any], tmp_path: Path
) -> None:
    program = shutil.which("llama-mtmd-cli", path=os.environ.get("LLAMA_CPP_BIN", os.environ.get("PATH")))
    if program is None:
        pytest.skip("llama-mtmd-cli is not on PATH; name its folder in LLAMA_CPP_BIN")
    language, mmproj = (str(root / "f16" / file.path) for file in made["f16"][0][:2])
    picture(80, 60).save(tmp_path / "a.png")
    command = [program, "-m", language, "--mmproj", mmproj, "--image", str(tmp_path / "a.png"), "-p", "What is it?"]
    run = subprocess.run(
        [*command, "-n", "4", "--temp", "0", "-t", "1"], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
