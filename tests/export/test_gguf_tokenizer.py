"""SentencePiece vocabularies on the way to GGUF, from `tokenizer.json` alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from mpa_edge.errors import ExportError
from mpa_edge.export import gguf_tokenizer
from mpa_edge.export.gguf_tokenizer import pre_tokenizer_name, sentence_pieces
from mpa_edge.export.merged import Names
from mpa_edge.export.to_gguf import to_gguf


@pytest.fixture
def state(tiny_llava: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tiny_llava / "tokenizer.json").read_text())
    return found


def test_pieces_have_their_texts_kinds_and_the_order_of_merging(state: dict[str, Any]) -> None:
    vocabulary = {**state["model"]["vocab"], **{token["content"]: token["id"] for token in state["added_tokens"]}}
    size = len(vocabulary) + 3
    pieces = sentence_pieces(state, size)
    assert pieces is not None
    assert len(pieces.texts) == len(pieces.scores) == len(pieces.kinds) == size
    assert all(pieces.texts[place] == piece for piece, place in vocabulary.items())
    kinds = gguf.TokenType
    named = {"<unk>": kinds.UNKNOWN, "<s>": kinds.CONTROL, "<image>": kinds.CONTROL, "<0x0A>": kinds.BYTE}
    assert {piece: pieces.kinds[vocabulary[piece]] for piece in named} == named
    assert pieces.kinds[-3:] == [kinds.UNUSED] * 3
    first, last = ("".join(state["model"]["merges"][place]) for place in (0, -1))
    assert pieces.scores[vocabulary[first]] == 0 > pieces.scores[vocabulary[last]]
    assert pieces.space_first


def test_a_byte_level_tokenizer_has_no_pieces(tiny_qwen2_vl: Path, state: dict[str, Any]) -> None:
    other = json.loads((tiny_qwen2_vl / "tokenizer.json").read_text())
    assert sentence_pieces(other, 1000) is None
    assert pre_tokenizer_name(other) == "qwen2"
    assert pre_tokenizer_name(state) is None


def test_no_space_is_put_before_a_text_where_the_tokenizer_puts_none(state: dict[str, Any]) -> None:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    for pre, expected in ((metaspace, False), ({**metaspace, "prepend_scheme": "first"}, True)):
        pieces = sentence_pieces({**state, "normalizer": None, "pre_tokenizer": pre}, 1000)
        assert pieces is not None
        assert pieces.space_first is expected


def test_a_vocabulary_larger_than_the_models_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="vocab_size of 10"):
        sentence_pieces(state, 10)


def test_a_tokenizer_that_merges_in_another_order_is_told(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: Callable[..., Path]
) -> None:
    """The agreement is measured: it falls where llama.cpp tokenizes otherwise."""

    def forget(state: dict[str, Any]) -> None:
        state["model"]["merges"] = state["model"]["merges"][:20]

    monkeypatch.setattr(gguf_tokenizer, "SAMPLE_TEXTS", ("What does the sign say?", "🦙"))
    made = to_gguf(edited(tiny_llava, forget), {"f16": tmp_path / "out"}, Names("x"))
    assert made["f16"][1]["tokenizer_agreement"] == 0.5


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """`edited(model, change)`: a copy with its tokenizer changed."""
    import shutil

    def make(model: Path, change: Callable[[dict[str, Any]], None]) -> Path:
        folder = Path(shutil.copytree(model, tmp_path / "model"))
        state = json.loads((folder / "tokenizer.json").read_text())
        change(state)
        (folder / "tokenizer.json").write_text(json.dumps(state))
        return folder

    return make
