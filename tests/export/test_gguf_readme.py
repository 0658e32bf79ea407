"""The commands in a GGUF bundle's README, and the Modelfile for Ollama."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.bundle import Bundle, File, sha256_of
from mpa_edge.export.build import _warnings
from mpa_edge.export.gguf_readme import gguf_commands, tokenizer_warning, write_modelfile
from tiny_bundles import manifest_of

WORDING = "{question}\nAnswer briefly."


@pytest.fixture
def bundle_of(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """`bundle_of(fixture)`: a manifest with the names of a pair, and a folder with the tokenizer."""

    def make(fixture: str) -> tuple[Path, Bundle]:
        model: Path = request.getfixturevalue(fixture)
        (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
        pair = (("signs-Q8_0.gguf", "language_model"), ("mmproj-signs-F16.gguf", "mmproj"))
        files = [File(path=path, role=role, sha256="0" * 64, bytes=1) for path, role in pair]
        how = {"name": "Shop signs-gguf-q8_0", "template": WORDING, "tokens": 10}
        return tmp_path, manifest_of(model, "llama.cpp", "q8_0", files, **how)

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


def test_a_stop_that_the_tokenizer_has_no_text_for_is_left_out(bundle_of: Any) -> None:
    folder, bundle = bundle_of("tiny_internvl")
    prompt = bundle.prompt.model_copy(update={"stop_token_ids": (*bundle.prompt.stop_token_ids, 10**6)})
    write_modelfile(folder, bundle.model_copy(update={"prompt": prompt}))
    stops = [line for line in (folder / "Modelfile").read_text().splitlines() if line.startswith("PARAMETER stop")]
    assert stops == ['PARAMETER stop "<|im_end|>"']


def with_prompt(bundle: Bundle, template: str) -> Bundle:
    chat = "{% for message in messages %}" + template + "{{ message.content[1].text }}{% endfor %}"
    return bundle.model_copy(update={"prompt": bundle.prompt.model_copy(update={"chat_template": chat})})


def test_braces_in_a_prompt_are_no_action_of_ollamas_template(bundle_of: Any) -> None:
    folder, bundle = bundle_of("tiny_internvl")
    write_modelfile(folder, with_prompt(bundle, """{{ 'a {{b}} "c" {' }}"""))
    text = (folder / "Modelfile").read_text()
    assert 'TEMPLATE """a {{ "{{" }}b}} "c" {{ "{" }}{{ .Prompt }}\nAnswer briefly."""\n' in text


def test_stops_with_quotes_and_lines_stay_whole(bundle_of: Any) -> None:
    folder, bundle = bundle_of("tiny_internvl")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|im_end|>"', json.dumps('say "x"\ny')))
    write_modelfile(folder, bundle)
    assert (folder / "Modelfile").read_text().endswith('PARAMETER stop """say "x"\ny"""\n')


def test_a_prompt_that_cannot_be_written_makes_no_modelfile_and_the_readme_says_so(bundle_of: Any) -> None:
    folder, bundle = bundle_of("tiny_internvl")
    bundle = with_prompt(bundle, 'say """{{ \':\' }}')
    assert write_modelfile(folder, bundle) is None
    assert not (folder / "Modelfile").exists()
    text = gguf_commands(bundle, modelfile=False)
    assert "There is no Modelfile for Ollama" in text
    assert "ollama create" not in text


def test_a_tokenizer_that_llama_cpp_does_not_follow_is_told(bundle_of: Any) -> None:
    _, bundle = bundle_of("tiny_internvl")
    assert tokenizer_warning(bundle.model_copy(update={"checks": {"gguf": {"tokenizer_agreement": 1.0}}})) is None
    assert "Mind" not in gguf_commands(bundle)
    other = bundle.model_copy(update={"checks": {"gguf": {"tokenizer_agreement": 0.75}}})
    assert "agrees with the model's on 75%" in gguf_commands(other)
    assert _warnings(other.model_copy(update={"checks": {**other.checks, "verify": {"warning": "few"}}})) == [
        "gguf-q8_0: few",
        f"gguf-q8_0: {tokenizer_warning(other)}",
    ]


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
