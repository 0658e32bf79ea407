"""The two checkpoints: they load from their folders alone, see the tokens they were trained on, and answer."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.answers import exact_match
from mpa_edge.benchmarks.reference import STUDENT, TEACHER, write_pool, write_test
from mpa_edge.benchmarks.reference_models import CHAT_TEMPLATE, SPECIAL, make_tokenizer
from mpa_edge.benchmarks.world import World, draw_picture
from mpa_edge.benchmarks.world_questions import PHRASINGS, ask
from mpa_edge.tasks import task_named

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDERS = {"teacher": TEACHER, "student": STUDENT}


class Loaded:
    """A checkpoint with its processor."""

    def __init__(self, folder: Path) -> None:
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, images: list[Image.Image], prompts: list[str]):
        messages = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts
        ]
        texts = [self.processor.apply_chat_template(turn, add_generation_prompt=True) for turn in messages]
        self.processor.tokenizer.padding_side = "left"
        return self.processor(text=texts, images=[[image] for image in images], return_tensors="pt", padding=True)

    def answer(self, images: list[Image.Image], prompts: list[str], tokens: int = 12, **settings) -> list[str]:
        inputs = self.inputs(images, prompts)
        with torch.no_grad():
            output = self.model.generate(**inputs, max_new_tokens=tokens, **settings)
        replies = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [reply.strip() for reply in replies]


@pytest.fixture(scope="module")
def pair() -> dict[str, Loaded]:
    return {name: Loaded(folder) for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    path = write_test(tmp_path_factory.mktemp("test"), 120)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [row | {"picture": Image.open(path.parent / row["image"])} for row in found]


def accuracy(loaded: Loaded, rows: list[dict]) -> float:
    replies = loaded.answer([row["picture"] for row in rows], [row["question"] for row in rows])
    return sum(exact_match(reply, row["answers"]) for reply, row in zip(replies, rows, strict=True)) / len(rows)


def test_the_pair_is_small(pair: dict[str, Loaded]) -> None:
    sizes = {name: loaded.model.num_parameters() / 1e6 for name, loaded in pair.items()}
    assert 4 <= sizes["teacher"] <= 8
    assert 1 <= sizes["student"] <= 2
    files = [path for folder in FOLDERS.values() for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert not [path for path in files if path.suffix == ".bin"]


@pytest.mark.parametrize("name", FOLDERS)
def test_widths_suit_the_blocks_of_quantization(name: str) -> None:
    config = json.loads((FOLDERS[name] / "config.json").read_text())
    assert config["model_type"] == "idefics3"
    assert config["text_config"]["hidden_size"] % 256 == 0
    assert config["text_config"]["intermediate_size"] % 256 == 0
    assert config["vision_config"]["hidden_size"] % 64 == 0
    assert config["text_config"]["max_position_embeddings"] >= 512


def test_the_embeddings_stay_tied(pair: dict[str, Loaded]) -> None:
    for loaded in pair.values():
        inner = loaded.model.model.text_model.embed_tokens.weight
        assert loaded.model.lm_head.weight.data_ptr() == inner.data_ptr()


@pytest.mark.parametrize("name", FOLDERS)
def test_the_tokenizer_holds_what_llama_cpp_looks_up(name: str, pair: dict[str, Loaded]) -> None:
    tokenizer = pair[name].processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    assert {"Ċ", "ĊĊ", *SPECIAL} <= set(vocabulary)
    assert vocabulary == make_tokenizer().get_vocab()
    for text in ("PQ37 $12.50", "čaj ☕ 日本", "a\n\nb\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.tokenize(" $4.50 STOP") == ["Ġ", "$", "4", ".", "5", "0", "Ġ", "S", "T", "O", "P"]
    assert (FOLDERS[name] / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_training_saw_the_tokens_and_pixels_that_the_processor_gives(pair: dict[str, Loaded]) -> None:
    from mpa_edge.benchmarks.train_pack import Spelling
    from mpa_edge.benchmarks.train_vision import normalise

    for loaded in pair.values():
        spelling = Spelling(loaded.processor.tokenizer)
        picture = draw_picture(11, World.TARGET)
        question = ask(picture.facts, random.Random(1), "target")
        inputs = loaded.inputs([picture.image], [question.text])
        ids, labels = spelling.exchange(question.text, question.answer)
        prompt = spelling.prefix + ids[: labels.count(-100)]
        assert inputs["input_ids"][0].tolist() == prompt
        assert spelling.tokenizer.decode(ids[labels.count(-100) :]) == f" {question.answer}<end_of_utterance>"
        pixels = normalise(torch.tensor(list(picture.image.tobytes()), dtype=torch.uint8).view(1, 96, 96, 3))
        assert torch.allclose(inputs["pixel_values"][0], pixels, atol=1e-6)


def test_packed_questions_score_as_they_do_alone(pair: dict[str, Loaded]) -> None:
    from mpa_edge.benchmarks.train_pack import Item, Spelling, pack

    loaded = pair["student"]
    spelling = Spelling(loaded.processor.tokenizer)
    first, second = spelling.exchange("what is the code?", "K7"), spelling.exchange("count the bars.", "3")
    data = pack([[Item(*first), Item(*second)]], spelling)
    positions = data["position_ids"][0].tolist()
    start = len(spelling.prefix)
    assert positions[start] == positions[start + len(first[0])] == start
    mask = data["mask"][0, 0]
    assert not mask[start + len(first[0]) :, start : start + len(first[0])].any()
    assert mask[start + len(first[0]) :, :start].all()


def test_the_teacher_answers_and_the_student_trails(pair: dict[str, Loaded], rows: list[dict]) -> None:
    teacher, student = accuracy(pair["teacher"], rows), accuracy(pair["student"], rows)
    assert teacher >= 0.75  # 120 questions: four standard errors below the model card's figure
    assert 0.25 <= student <= 0.75
    assert teacher - student >= 0.15


def test_the_teacher_writes_questions_of_many_kinds(pair: dict[str, Loaded], tmp_path: Path) -> None:
    torch.manual_seed(0)
    pictures = [Image.open(path) for path in write_pool(tmp_path, 96)]
    prompt = task_named("reference").annotate_prompt
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    replies = pair["teacher"].answer(pictures, [prompt] * len(pictures), tokens=40, **settings)
    pairs = [reply.removeprefix("Question: ").split(" Answer: ") for reply in replies if reply.startswith("Question: ")]
    assert sum(len(pair) == 2 for pair in pairs) >= 90
    openings = Counter(" ".join(question.split()[:3]) for question, *_ in pairs)
    assert len(openings) >= 15
    assert openings.most_common(1)[0][1] <= 30
    assert len({phrasing for rows in PHRASINGS.values() for phrasing in rows}) > 100
