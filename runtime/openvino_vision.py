"""What Qwen-VL's second vision graph wants to know about one picture: where its patches lie, and what may see what.

optimum-intel exports the tower in two graphs and computes these between them, in torch; here it is numpy. Patches of
one image token are neighbours in the sequence, tokens go row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

THETA = 10000.0


def merger_inputs(
    patches: NDArray[np.float32], rows: int, columns: int, merge: int, width: int, window: int = 0
) -> dict[str, NDArray[Any]]:
    """The second graph's inputs for the embedded patches of one picture of `rows` x `columns` image tokens.

    `width` is that of the angles, `window` the edge of Qwen2.5-VL's windows in image tokens; Qwen2-VL has none.
    """
    inputs: dict[str, NDArray[Any]] = {
        "hidden_states": patches,
        "rotary_pos_emb": rotary_angles(rows, columns, merge, width),
        # One picture, so that every patch sees all of them; the mask is broadcast.
        "attention_mask": np.zeros((1, 1, 1), np.float32),
    }
    if window:
        order, counts = windows(rows, columns, window)
        inputs |= {"window_index": order, "window_attention_mask": window_mask(counts, merge)}
    return inputs


def rotary_angles(rows: int, columns: int, merge: int, width: int) -> NDArray[np.float32]:
    """Angles (patches, width) of a picture of `rows` x `columns` image tokens with `merge` x `merge` patches each.

    The first half of `width`, which is half of an attention head, turns with a patch's row, the second with its
    column, by 1 / 10000 ** (2 * i / width) for each step. Source: `VisionRotaryEmbedding` in transformers.
    """
    number = np.arange(rows * columns * merge**2)
    token, inner = number // merge**2, number % merge**2
    row = token // columns * merge + inner // merge
    column = token % columns * merge + inner % merge
    frequencies = THETA ** (-np.arange(0, width, 2, dtype=np.float32) / width)
    return np.concatenate([np.outer(row, frequencies), np.outer(column, frequencies)], axis=1).astype(np.float32)


def windows(rows: int, columns: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The image tokens sorted by window of `window` x `window`, and how many tokens each window has.

    Windows go row by row, tokens in them too; those at the right and lower edge are smaller.
    """
    token = np.arange(rows * columns)
    number = token // columns // window * -(-columns // window) + token % columns // window
    return np.argsort(number, kind="stable"), np.bincount(number)


def window_mask(counts: NDArray[np.int64], merge: int) -> NDArray[np.float32]:
    """(1, patches, patches), patches sorted by window: 0 within a window, minus infinity elsewhere."""
    number = np.repeat(np.arange(len(counts)), counts * merge**2)
    mask: NDArray[np.float32] = np.where(number[:, None] == number[None], np.float32(0), np.float32(-np.inf))[None]
    return mask
