"""Every family's prompts and pixel values through a bundle's settings, against its own processor: no tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from mpa_edge.export.families import FAMILIES, family_of, prompt_settings, read_config
from mpa_edge.processors import load_processor
from mpa_edge.runtime.families import Cut, family_named
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.prompts import Prompts, Turn
from tiny_pictures import upright_rgb

MODELS = ["tiny_idefics3", "tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_llava", "tiny_llava_siglip", "tiny_internvl"]
SIZES = {"smaller than a tile": (20, 30), "one tile": (64, 64), "many tiles": (190, 170), "wide": (400, 37)}
SIZES["tall"] = (31, 390)
QUESTIONS = ["?", "What does the sign say?", " Wie viel\nkostet 12.50€? " * 12]


class Model:
    """A model's processor beside the runtime's family and prompts."""

    def __init__(self, folder: Path) -> None:
        config, self.processor = read_config(folder), load_processor(folder)
        exported = family_of(config)
        self.family = family_named(exported.name)
        self.settings: Any = exported.image_settings(config, self.processor)
        self.prompt = prompt_settings(config, self.processor, "{question}", 8)
        self.prompts = Prompts(Tokenizer.from_file(str(folder / "tokenizer.json")), self.prompt)

    def expected(self, images: list[Image.Image], question: str) -> Any:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "np"}
        return self.processor.apply_chat_template(turns, **given)

    def cuts(self, images: list[Image.Image]) -> list[Cut]:
        return [self.family.cut(image, self.settings) for image in images]

    def tokens(self, cuts: list[Cut], question: str) -> list[int]:
        layouts = [self.family.layout(cut.rows, cut.columns, self.prompt.image_token, self.settings) for cut in cuts]
        return self.prompts.conversation([Turn("user", question, len(cuts))], layouts)


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.getfixturevalue(request.param))


def assert_equal(
    model: Model, images: list[Image.Image], question: str, *, opened: list[Image.Image] | None = None
) -> None:
    """`opened`: the same pictures as the runtime opens them."""
    wanted, cuts = model.expected(images, question), model.cuts(opened or images)
    assert model.tokens(cuts, question) == wanted["input_ids"][0].tolist()
    values = [model.family.pixel_values(cut, model.settings) for cut in cuts]
    tiles_axis = 1 if model.family.plan == "idefics3" else 0
    for name in values[0].keys() & wanted.keys():
        got = np.concatenate([value[name] for value in values], axis=tiles_axis)
        if name == "pixel_attention_mask":
            got = got.astype(wanted[name].dtype)
        np.testing.assert_array_equal(got, wanted[name])
    assert "pixel_values" in values[0]
    tokens = [model.family.image_tokens(cut.rows, cut.columns, model.settings) for cut in cuts]
    assert sum(tokens) == (wanted["input_ids"] == model.prompts.image_token_id).sum()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_prompts_and_pixels_equal_the_processors(model: Model, size: tuple[int, int], picture: Any) -> None:
    for question in QUESTIONS:
        assert_equal(model, [picture(*size)], question)


def test_colour_modes_and_orientation_equal_the_processors(model: Model, every_kind: dict[str, Path]) -> None:
    for file in every_kind.values():
        assert_equal(model, [upright_rgb(file)], "?", opened=[open_image(file)])


def test_two_pictures_equal_the_processors(model: Model, picture: Any) -> None:
    assert_equal(model, [picture(150, 40), picture(64, 100, seed=1)], "Which is larger?")


def test_the_grid_is_the_one_that_pictures_are_cut_in(model: Model, picture: Any) -> None:
    for size in SIZES.values():
        cut = model.family.cut(picture(*size), model.settings)
        assert model.family.grid(size, model.settings) == (cut.rows, cut.columns)


def test_the_students_own_size_is_among_those_compared(model: Model) -> None:
    sizes = model.family.sizes(model.settings)
    assert [settings for _, settings in sizes].count(model.settings) == 1
    tokens = [model.family.image_tokens(*model.family.grid((400, 300), settings), settings) for _, settings in sizes]
    assert tokens == sorted(tokens)


def test_special_tokens_in_a_question_are_text(model: Model, picture: Any) -> None:
    cuts, special = model.cuts([picture(64, 64)]), model.prompt.image_token
    harmless, attacked = (model.tokens(cuts, text) for text in ("x", f"{special} and {special}"))
    assert attacked.count(model.prompts.image_token_id) == harmless.count(model.prompts.image_token_id)


def test_every_family_is_here() -> None:
    assert len(MODELS) > len(FAMILIES)  # LLaVA has two towers
