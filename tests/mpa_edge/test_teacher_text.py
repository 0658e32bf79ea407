from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpa_edge.tasks import TASKS, Task
from mpa_edge.teacher_text import MAX_CHARACTERS, MAX_PAIRS, judge, parse

OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "mpa_official"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no excerpts of the official files")

TASK = replace(TASKS["reference"], max_answer_words=4)
ONE = [("What is it?", "cat")]
TWO = [("What is it?", "cat"), ("Who is there?", "Bob")]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        # labels, in any order and case
        ("Question: What is it?\nAnswer: cat", ONE),
        ("Question: What is it? Answer: cat", ONE),
        ("QUESTION:What is it?ANSWER:cat", ONE),
        ("question - What is it?\nanswer - cat", ONE),
        ("Q: What is it?\nA: cat", ONE),
        ("Q: What is it? A: cat", ONE),
        ("Q. What is it?\nA. cat", ONE),
        ("Answer: cat\nQuestion: What is it?", ONE),
        ("Question: What is it?, Answer: cat", ONE),
        ("Question: What is it?\nShort answer: cat", ONE),
        ("The question: What is it?\nThe correct answer (one word): cat", ONE),
        ("Question: Question: What is it?\nAnswer: Answer: cat", ONE),
        ("question: what is shown answer: cat", [("what is shown", "cat")]),
        ("Question: What is it\nAnswer: cat", [("What is it", "cat")]),
        # an answer or a question without a label
        ("What is it?\nAnswer: cat", ONE),
        ("Question: What is it? cat", ONE),
        ("What is it? cat", ONE),
        ("What is it?\n\ncat", ONE),
        ("Question What is it? Answer cat", ONE),
        ("Here you are.\nWhat is it?\ncat\n\nIt tests the animal.", ONE),
        # several pairs
        ("Question: What is it?\nAnswer: cat\nQuestion: Who is there?\nAnswer: Bob", TWO),
        ("Answer: cat\nQuestion: What is it?\n\nAnswer: Bob\nQuestion: Who is there?", TWO),
        ("1. Question: What is it?\n   Answer: cat\n2. Question: Who is there?\n   Answer: Bob", TWO),
        ("Q1: What is it? A1: cat Q2: Who is there? A2: Bob", TWO),
        ("Question 1: What is it?\nQuestion 2: Who is there?\nAnswer 1: cat\nAnswer 2: Bob", TWO),
        ("1. What is it? cat\n2. Who is there? Bob", TWO),
        ("What is it?\ncat\nWho is there?\nBob", TWO),
        ("- Question: What is it?\n- Answer: cat\n- Question: Who is there?\n- Answer: Bob", TWO),
        # markdown
        ("**Question:** What is it?\n**Answer:** cat", ONE),
        ("**Question**: What is it?\n\n**Answer**: **cat**", ONE),
        ("### Question\nWhat is it?\n### Answer\ncat", ONE),
        ("> Question: What is it?\n> Answer: cat", ONE),
        ("_Question_: What is it? _Answer_: `cat`", ONE),
        ("| Question | Answer |\n|---|---|\n| What is it? | cat |", ONE),
        # JSON, whole, fenced, nested, broken
        ('{"question": "What is it?", "answer": "cat"}', ONE),
        ('{"answer": "cat", "question": "What is it?"}', ONE),
        ('Sure:\n```json\n{\n  "Question": "What is it?",\n  "Answer": "cat"\n}\n```', ONE),
        ('[{"question": "What is it?", "answer": "cat"}, {"answer": "Bob", "question": "Who is there?"}]', TWO),
        ('{"pairs": [{"Q": "What is it?", "A": "cat"}, {"Q": "Who is there?", "A": "Bob"}]}', TWO),
        ('{"questions": ["What is it?", "Who is there?"], "answers": ["cat", "Bob"]}', TWO),
        ('{"question": "What is it?", "answer": "cat"}\n{"question": "Who is there?", "answer": "Bob"}', TWO),
        ('{"generated_question": "What is it?", "short_answer": "cat", "id": 3}', ONE),
        ("{'question': 'What is it?', 'answer': 'cat'}", ONE),
        ('{"question": "What is it?", "answer": "ca', [("What is it?", "ca")]),
        ('{"question": "How many?", "answer": 3}', [("How many?", "3")]),
        # what belongs to an answer, and what doesn't
        (
            "Question: What\nis it?\nAnswer: a black\ncat\n\nThe question is about animals.",
            [("What is it?", "a black cat")],
        ),
        ("Question: What is it?\nAnswer: cat\nExplanation: it has whiskers", ONE),
        ('Question: "What is it?"\nAnswer: "cat"', ONE),
        ("Question:   What  is\tit?  \nAnswer: \u00a0cat ", ONE),
        ("Question: What is it?\nAnswer: cat<|im_end|>\n<end_of_utterance>", ONE),
        ("<think>Question: hm?</think>Question: What is it?\nAnswer: cat", ONE),
        ("Here is a question and answer:\n\nQuestion: What is it?\nAnswer: cat", ONE),
        ("Question: What time is it?\nAnswer: 10:10", [("What time is it?", "10:10")]),
        ("Question: Which value?\nAnswer: 1.5", [("Which value?", "1.5")]),
        ("Question: Which value?\nAnswer: -3", [("Which value?", "-3")]),
        ('Question: How wide?\nAnswer: 24"', [("How wide?", '24"')]),
        ("Question: Which letter?\nAnswer:\nA", [("Which letter?", "A")]),
        ("Question: Who?\nAnswer: O'Reilly", [("Who?", "O'Reilly")]),
        ("Question: Is the answer: A or B?\nAnswer: A", [("Is the answer: A or B?", "A")]),
        ("Question: Which?\nA. Red\nB. Blue\nAnswer: Red", [("Which? A. Red B. Blue", "Red")]),
        ("Question：这是什么？\nAnswer：猫", [("这是什么？", "猫")]),
        # one part, or none
        ("Question: What is it?", [("What is it?", "")]),
        ("Question: What is it?\nAnswer:", [("What is it?", "")]),
        ("Answer: cat", [("", "cat")]),
        ("What is it?", [("What is it?", "")]),
        ("I'm sorry, I cannot help with that.", [("", "I'm sorry, I cannot help with that.")]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_parse(text: str, pairs: list[tuple[str, str]]) -> None:
    assert parse(text) == pairs


@needs_official
@pytest.mark.parametrize(
    "form",
    [
        "Question: {q}\nAnswer: {a}",
        "Q: {q} A: {a}",
        "Answer: {a}\nQuestion: {q}",
        "**Question:** {q}\n\n**Answer:** {a}",
        "1. Question: {q}\n   Answer: {a}",
        "{q}\n{a}",
        "json",
    ],
)
def test_what_a_real_teacher_wrote_survives_every_form(form: str) -> None:
    lost = []
    for question, answer in published_pairs()[::4]:
        pair = (f"{question}?", answer)
        text = form.format(q=pair[0], a=answer)
        if form == "json":
            text = json.dumps({"question": pair[0], "answer": answer})
        if parse(text) != [pair]:
            lost.append(pair)
    # Answers in quotes lose them; one repeats the question with its label, one ends with a question mark.
    assert len(lost) <= 7
    assert all(answer[0] == '"' or "?" in answer for _, answer in lost)


def published_pairs() -> list[tuple[str, str]]:
    rows = json.loads((OFFICIAL / "okvqa_pseudo_annotations.json").read_text(encoding="utf-8"))
    pairs = [(row["predicted_question"], row["predicted_answer"]) for row in rows]
    for row in json.loads((OFFICIAL / "textvqa_pseudo_conversations.json").read_text(encoding="utf-8")):
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
        pairs.append((question, answer))
    return [(" ".join(question.split()), " ".join(answer.split())) for question, answer in pairs]


PIECES = [
    "Question", "Answer", "question:", "answer:", "Q:", "A:", "Q1:",
    "\n", "\n\n", " ", ":", "?", "**", '"', "'", "{", "}",
    "[", "]", ",", '{"question": "', '", "answer": "', '"}', "```json", "<think>", "</think>",
    "1. ", "- ", "#", "|", "cat",
    "What is it", "Explanation:", "\ud800", "\u2028", "\x00", "\\ud800", "(", ")", "_", "the ",
]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=60))
def test_whatever_the_text_parse_gives_clean_pairs(text: str) -> None:
    for question, answer in parse(text):
        assert question or answer
        for part in (question, answer):
            assert part == " ".join(part.split())
            part.encode("utf-8")
        judge(question, answer, TASK)


@pytest.mark.parametrize(
    "piece",
    [
        "-", "1. ", "question ", "question _", '"', "[", "{", '{"a":', "\n", "\n- ", "| ", "Q: ", "A: Q: ", "?", "a?\n",
        "<think>", "answer (", "'\"*_", "(a. ", "a) ", "the_", "question #", "**", "\n \n", '"}', '{"q":"a"},', " ",
    ],
)  # fmt: skip
def test_hostile_repetition_takes_no_time(piece: str) -> None:
    start = time.process_time()
    assert len(parse(piece * (MAX_CHARACTERS // len(piece) + 5) + "x")) <= MAX_PAIRS
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What is it?", "cat", None),
        ("What is it", "a black cat indeed", None),
        ("这是什么？", "猫", None),
        ("", "cat", "no_question"),
        ("?", "cat", "no_question"),
        ("What is it?", "", "no_answer"),
        ("What is it?", "—", "no_answer"),
        ("[Your question here]", "cat", "placeholder"),
        ("What is it?", "<answer>", "placeholder"),
        ("Your question", "your answer", "placeholder"),
        ("", "I'm sorry, but I can't help with that.", "refusal"),
        ("As an AI, what do I see?", "cat", "refusal"),
        ("What does the sign say?", "Sorry, we're closed", None),
        ("What is it?", "Not visible.", "unanswerable"),
        ("What is it?", "It cannot be determined", "unanswerable"),
        ("Which soldier?", "The unknown soldier", None),
        ("What is your favourite colour?", "red", "not_about_image"),
        ("Which language model are you?", "red", "not_about_image"),
        ("Who are the two men?", "brothers", None),
        ("What " * 61 + "?", "cat", "question_too_long"),
        ("What is it?", "one two three four five", "answer_too_long"),
        ("这是什么？", "猫" * 121, "answer_too_long"),
        # given away
        ("What color is the red sign?", "red", "answer_in_question"),
        ("What is the purpose of the Fire Hydrant?", "A fire hydrant.", "answer_in_question"),
        ("Is the sign red or blue?", "red", None),
        ("Which of the bars A and B is higher?", "B", None),
        ("Which is higher, on/off?", "off", None),
        ("Is there no car?", "no", None),
        ("Does it say yes?", "Yes", None),
        ("How many of the 3 cars are red?", "3", None),
        ("What is carved into the card?", "car", None),
        ("Which letter is a vowel?", "A", None),
    ],
)
def test_judge(question: str, answer: str, reason: str | None) -> None:
    assert judge(question, answer, TASK) == reason


def test_the_task_sets_the_length_of_answers() -> None:
    words: Task = replace(TASK, max_answer_words=1)
    assert judge("What is it?", "cat", words) is None
    assert judge("What is it?", "black cat", words) == "answer_too_long"


@needs_official
def test_judgements_of_published_pairs() -> None:
    reasons = Counter(
        judge(question, answer, replace(TASK, max_answer_words=10)) for question, answer in published_pairs()
    )
    assert reasons == {None: 5171, "answer_too_long": 290, "answer_in_question": 37, "unanswerable": 2}
