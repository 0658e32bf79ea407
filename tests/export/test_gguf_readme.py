"""The commands in a GGUF bundle's README, and the Modelfile for Ollama."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.bundle import Bundle, File, Source, sha256_of
from mpa_edge.export.families import family_of, prompt_settings, read_config
from mpa_edge.export.gguf_readme import gguf_commands, write_modelfile
from mpa_edge.processors import load_processor

WORDING = "{question}\nAnswer briefly."


@pytest.fixture
def bundle_of(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """`bundle_of(fixture)`: a manifest with the names of a pair, and a folder with the tokenizer."""

    def make(fixture: str) -> tuple[Path, Bundle]:
        model: Path = request.getfixturevalue(fixture)
        config, processor = read_config(model), load_processor(model)
        family = family_of(config)
        (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
        pair = (("signs-Q8_0.gguf", "language_model"), ("mmproj-signs-F16.gguf", "mmproj"))
        return tmp_path, Bundle(
            name="Shop signs-gguf-q8_0",
            family=family.name,
            engine="llama.cpp",
            quantization="q8_0",
            files=tuple(File(path=path, role=role, sha256="0" * 64, bytes=1) for path, role in pair),
            image=family.image_settings(config, processor),
            prompt=prompt_settings(config, processor, WORDING, 10),
            source=Source(student="tiny", tool_version="0"),
        )

    return make


@pytest.mark.parametrize(
    ("fixture", "prompt"),
    [
        ("tiny_idefics3", "<|im_start|>User:{{ .Prompt }}\nAnswer briefly.<end_of_utterance>\nAssistant:"),
        (
            "tiny_qwen2_vl",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{{ .Prompt }}\n"
            "Answer briefly.<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("tiny_llava", "USER: {{ .Prompt }}\nAnswer briefly. ASSISTANT:"),
        ("tiny_internvl", "<|im_start|>user\n{{ .Prompt }}\nAnswer briefly.<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_the_modelfile_has_the_models_own_prompt(fixture: str, prompt: str, bundle_of: Any) -> None:
    folder, bundle = bundle_of(fixture)
    entry = write_modelfile(folder, bundle)
    assert (entry.path, entry.role, entry.sha256) == ("Modelfile", "config", sha256_of(folder / "Modelfile"))
    text = (folder / "Modelfile").read_text()
    assert text.startswith("FROM ./signs-Q8_0.gguf\nFROM ./mmproj-signs-F16.gguf\n")
    assert f'TEMPLATE """{prompt}"""\n' in text
    assert "PARAMETER temperature 0\nPARAMETER num_ctx 1024\nPARAMETER num_predict 10\n" in text


def test_the_modelfile_stops_where_the_model_does(bundle_of: Any) -> None:
    folder, bundle = bundle_of("tiny_internvl")
    write_modelfile(folder, bundle)
    assert (folder / "Modelfile").read_text().endswith('PARAMETER stop "<|im_end|>"\n')


def test_the_readme_has_commands_for_every_program(bundle_of: Any) -> None:
    _, bundle = bundle_of("tiny_qwen2_vl")
    text = gguf_commands(bundle)
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("    ")]
    found = {line[0] for line in lines}
    assert found == {"mpa-edge", "llama-mtmd-cli", "llama-server", "mkdir", "ollama"}
    for line in lines:
        if line[0].startswith("llama-"):
            assert line[line.index("-m") + 1] == "signs-Q8_0.gguf"
            assert line[line.index("--mmproj") + 1] == "mmproj-signs-F16.gguf"
            assert line[line.index("--image-max-tokens") + 1] == "36"
    assert "-p 'What does the sign say?\\nAnswer briefly.'" in text
    assert "ollama create shop-signs-gguf-q8_0 -f Modelfile" in text


def test_only_pictures_of_dynamic_size_get_limits_and_only_llava_a_warning(bundle_of: Any) -> None:
    texts = {
        fixture: gguf_commands(bundle_of(fixture)[1]) for fixture in ("tiny_qwen2_vl", "tiny_llava", "tiny_idefics3")
    }
    assert ["--image-max-tokens" in text for text in texts.values()] == [True, False, False]
    assert ["#25814" in text for text in texts.values()] == [False, True, False]
