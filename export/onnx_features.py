"""What a vision encoder's precision does to the image features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpa_edge.export.families import family_of, read_config
from mpa_edge.export.onnx_save import open_graph
from mpa_edge.export.samples import synthetic_questions
from mpa_edge.processors import load_processor
from mpa_edge.runtime.families import family_named
from mpa_edge.runtime.onnx import OTHER_NAMES

PICTURES, TILES = 2, 4


def feature_error(merged: Path, reference: Path, graph: Path) -> float:
    """The difference of a vision encoder's features from those of the one at `reference`, on drawn pictures.

    Root mean square, as a fraction of the reference's. `merged` is the folder of the model, for the pixels.
    """
    pictures = _pixels(merged)
    wanted, got = _features(reference, pictures), _features(graph, pictures)
    return float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))


def _pixels(merged: Path) -> list[dict[str, NDArray[Any]]]:
    config, processor = read_config(merged), load_processor(merged)
    family = family_of(config)
    settings, eyes = family.image_settings(config, processor), family_named(family.name)
    cuts = [eyes.cut(question.image, settings) for question in synthetic_questions(PICTURES)]
    return [eyes.pixel_values(replace(cut, tiles=cut.tiles[:TILES]), settings) for cut in cuts]


def _features(graph: Path, pictures: list[dict[str, NDArray[Any]]]) -> NDArray[np.float32]:
    session = open_graph(graph)
    names = [value.name for value in session.get_inputs()]
    found = [session.run(None, {name: pixels[OTHER_NAMES.get(name, name)] for name in names})[0] for pixels in pictures]
    return np.concatenate([features.reshape(-1, features.shape[-1]) for features in found])
