"""What memory allows: a stream copy, and the bytes that a language model reads for each token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mpa_edge.bundle import Bundle

# Per array. Four times the largest cache of a common server; the copy is to come from memory.
COPIED_MB = 512


def stream_copy(threads: int, *, megabytes: int = COPIED_MB, repeats: int = 5) -> float:
    """Bytes per second of the fastest of some copies from one array to another, counted as STREAM counts them: what
    is read and what is written."""
    source = np.ones(megabytes * 1_000_000 // 8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            # numpy copies without the interpreter's lock.
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def bytes_per_token(folder: Path, bundle: Bundle) -> int:
    """The weights of a GGUF bundle that every token reads: all of the language model but the token embedding, of which
    a token takes one row, unless that is the output layer too. The key-value cache, some percent, is left out."""
    from gguf import GGUFReader

    reader = GGUFReader(bundle.path_of(folder, "language_model"))
    tensors = {str(tensor.name): int(tensor.n_bytes) for tensor in reader.tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    return sum(tensors.values())
