"""Control tokens typed as text, in every family: the model sees as many tiles and turns as without them, in training as
on the device, and a chat server is sent nothing that it could take for one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mpa_edge.chat_messages import request_of, without_control_tokens
from mpa_edge.export.families import family_of, prompt_settings, read_config
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.families import family_named
from mpa_edge.runtime.prompts import Prompts, read_tokenizer
from mpa_edge.runtime.vlm import GREEDY
from mpa_edge.tasks import Task, task_named
from mpa_edge.transformers_vlm import TransformersVlm
from tiny_bundles import manifest_of
from tiny_pictures import noise

FAMILIES = ["tiny_idefics3", "tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_llava", "tiny_internvl"]
# Beyond a family's own tokens: those of other families, and looks of a token that are none.
OTHERS = ["<image>", "<|im_start|>system\n", "<|im_end|>", "<end_of_utterance>", "</s>", "<video>", "<|video_pad|>"]
OTHERS += ["[INST]", "USER:", "Assistant:", "＜image＞", "\ue000", "{{ messages }}", "{% raw %}"]
PICTURE = noise("RGB", (100, 90))


@dataclass(frozen=True)
class Family:
    """One tiny model in both worlds: as it is trained, and as the device prompts it."""

    folder: Path
    vlm: TransformersVlm
    prompts: Prompts
    layout: str

    @property
    def tokens(self) -> list[str]:
        """Its control tokens, and what its processor looks for."""
        tokenizer, processor = self.vlm.processor.tokenizer, self.vlm.processor
        markers = [value for name, value in vars(processor).items() if name.endswith("_token")]
        return sorted({*map(str, tokenizer.added_tokens_decoder.values()), *filter(None, markers)})

    def control_ids(self, ids: list[int]) -> list[int]:
        """Those of the ids that mean something other than text."""
        added = self.vlm.processor.tokenizer.added_tokens_decoder
        return [token for token in ids if token in added]

    def trained(self, text: str) -> list[int]:
        """The prompt's tokens as the student is trained, and as a teacher of this family is asked."""
        ids: list[int] = self.vlm.encode([PICTURE], [text])["input_ids"][0].tolist()
        return ids


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    folder: Path = request.getfixturevalue(request.param)
    vlm = TransformersVlm.load(str(folder), device="cpu")
    config, processor = read_config(folder), vlm.processor
    prompt = prompt_settings(config, processor, "{question}", 8)
    images: Any = family_of(config).image_settings(config, processor)
    plan = family_named(family_of(config).name)
    layout = plan.layout(*plan.grid(PICTURE.size, images), prompt.image_token, images)
    return Family(folder, vlm, Prompts(read_tokenizer(folder / "tokenizer.json"), prompt), layout)


def test_typed_tokens_change_neither_tiles_nor_turns_in_training_and_on_the_device(family: Family) -> None:
    texts = [form for token in (*family.tokens, *OTHERS) for form in (token, f"a {token} b", 2 * token)]
    harmless = family.vlm.encode([PICTURE], ["x"])
    expected = family.control_ids(harmless["input_ids"][0].tolist())
    for start in range(0, len(texts), 32):
        batch = texts[start : start + 32]
        inputs = family.vlm.encode([PICTURE] * len(batch), batch)
        for row, text in enumerate(batch):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
            assert family.control_ids(ids) == expected, text
            assert ids == family.prompts.tokens(text, [family.layout]), text
        assert len(inputs["pixel_values"]) * len(harmless["input_ids"]) == len(harmless["pixel_values"]) * len(batch)


def task_of_file(folder: Path, template: str, prompt: str) -> Task:
    """A user's task with this wording."""
    path = folder / "task.toml"
    texts = {"question_template": template, "annotate_prompt": prompt}
    # A string of JSON is one of TOML.
    path.write_text("".join(f"{key} = {json.dumps(text)}\n" for key, text in texts.items()), encoding="utf-8")
    return task_named(str(path))


@pytest.mark.parametrize(
    ("template", "question"),
    [
        ("<image> {question}<end_of_utterance>", "What?"),
        ("ALL\n{question}ALL", "What?"),
        (" \n<im{question}e_of_utterance>\n", "age> or <end"),
    ],
)
def test_tokens_in_a_tasks_own_wording_are_text_on_all_sides(
    family: Family, tmp_path: Path, template: str, question: str
) -> None:
    template = template.replace("ALL", "".join([*family.tokens, *OTHERS]))
    task = task_of_file(tmp_path, template, prompt=template)
    bundle = manifest_of(family.folder, "onnxruntime", "fp32", template=task.question_template)
    no_engine: Any = SimpleNamespace(name="none")
    device = BundleVlm(bundle, no_engine, read_tokenizer(family.folder / "tokenizer.json"))
    trained = family.trained(task.prompt(question))
    expected = family.control_ids(family.trained("x"))
    assert family.control_ids(trained) == expected
    assert device.prompts.tokens(device.put(question), [family.layout]) == trained
    assert family.control_ids(family.trained(task.annotate_prompt)) == expected
    sent = request_of("m", "h", Image.new("RGB", (9, 9)), task.annotate_prompt, GREEDY, None)
    ids = family.vlm.processor.tokenizer(sent["messages"][0]["content"][1]["text"], add_special_tokens=False)
    assert family.control_ids(ids["input_ids"]) == []


def test_typed_tokens_end_no_target(family: Family) -> None:
    tokenizer, stop = family.vlm.processor.tokenizer, family.vlm.target_ids("x")[-1]
    for token in family.tokens:
        *text, last = family.vlm.target_ids(f"a {token} b")
        assert (family.control_ids(text), last) == ([], stop), token
        assert token in tokenizer.decode(text)


def test_a_template_that_trims_is_followed_for_typed_tokens_too(tiny_idefics3: Path) -> None:
    vlm = TransformersVlm.load(str(tiny_idefics3), device="cpu")
    template = "User:<image>{{ messages[0].content[1].text | trim }}<end_of_utterance>\nAssistant:"
    vlm.processor.chat_template = template
    padded, bare = (vlm.encode([PICTURE], [text])["input_ids"].tolist() for text in ("  <image> ?\n", "<image> ?"))
    assert padded == bare


def test_a_chat_servers_tokenizer_finds_no_control_token_in_a_question(family: Family) -> None:
    tokenizer = family.vlm.processor.tokenizer
    for token in [token for token in (*family.tokens, *OTHERS) if token.strip()]:
        for text in (token, f"a{token}{token} b", f"<{token}>"):
            sent = request_of("m", "h", Image.new("RGB", (9, 9)), text, GREEDY, None)["messages"][0]["content"][1]
            ids = tokenizer(sent["text"], add_special_tokens=False)["input_ids"]
            assert family.control_ids(ids) == [], text
            assert sent["text"].replace("\u200b", "") == text


@pytest.mark.parametrize("text", ["Is 3 < 4 and 5 > 4?", "a<b", "[a] [1]", "if (a<b && c>d)", "<3", "日本<本>語 <"])
def test_a_chat_server_gets_other_text_as_it_is(text: str) -> None:
    assert without_control_tokens(text).replace("<\u200b本", "<本") == text


pieces = st.sampled_from(["<", ">", "|", "/", "im_start", "image", " ", "end", "[", "INST", "]", "｜", "▁", "s", "\n"])


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(pieces | st.text(max_size=3), max_size=12).map("".join))
def test_a_chat_server_gets_every_character(text: str) -> None:
    sent = without_control_tokens(text)
    assert sent.replace("\u200b", "") == text.replace("\u200b", "")
    assert "<image>" not in sent
    assert "[INST]" not in sent
    assert without_control_tokens(sent) == sent


def test_a_question_beyond_the_models_positions_is_refused_and_spoils_no_other(tiny_idefics3: Path) -> None:
    vlm = TransformersVlm.load(str(tiny_idefics3), device="cpu")
    answers = vlm.answer([PICTURE] * 2, ["why? " * 10_000, "What?"])
    assert "tokens, the model takes" in (answers[0].error or "")
    assert answers[1].error is None
