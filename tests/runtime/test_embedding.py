"""What ONNX Runtime and OpenVINO share around their graphs."""

from __future__ import annotations

import numpy as np
import pytest

from mpa_edge.errors import ModelError
from mpa_edge.runtime.embedding import Place, put_features, running, shaped


def test_positions_go_on_after_the_largest() -> None:
    first, place = Place().numbered(3)
    assert first.tolist() == [[0, 1, 2]]
    given, place = place.numbered(4, np.array([[3, 3, 3, 3], [3, 3, 4, 4], [3, 4, 3, 4]]))
    assert place == (7, 5)
    assert place.numbered(2)[0].tolist() == [[5, 6]]
    assert given.shape == (3, 4)


def test_positions_are_shaped_as_a_graph_has_them() -> None:
    row, axes = np.arange(3)[None], np.arange(9).reshape(3, 3)
    assert shaped(row, 0).tolist() == [[0, 1, 2]]
    assert shaped(row, 3).tolist() == [[[0, 1, 2]]] * 3
    assert shaped(axes, 3).tolist() == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]


def test_features_take_the_places_of_image_tokens() -> None:
    ids, features = np.array([7, 1, 7, 2]), np.array([[1, 2], [3, 4]], np.float32)
    embeds = np.zeros((1, 4, 2), np.float32)
    put_features(embeds, ids, 7, features)
    assert embeds[0].tolist() == [[1, 2], [0, 0], [3, 4], [0, 0]]
    with pytest.raises(ModelError, match="1 image tokens in the prompt for 2 image features"):
        put_features(embeds, ids, 1, features)
    # numpy would put a single number everywhere
    with pytest.raises(ModelError, match="image features are 1 wide, embeddings 2"):
        put_features(embeds, ids, 7, features[:, :1])


def test_what_a_library_raises_becomes_one_line() -> None:
    with pytest.raises(ModelError, match=r"the decoder cannot be run; .* first second$"), running("decoder"):
        raise RuntimeError("first\n second\n")
