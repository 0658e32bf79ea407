"""LLaVA's CLIP tower under llama.cpp: the class token where the rest of the graph expects it.

llama.cpp's graph for LLaVA puts the class token behind the patches, and then gives out positions and picks the patches
as if it stood before them (ggml-org/llama.cpp#25814): every patch gets its neighbour's position, the first one is lost,
and the class token becomes an image token. No file can make up for that. Here the joined rows are put right as they
are computed; a llama.cpp that joins them the right way round is left alone. SigLIP towers have no class token.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from llama_cpp._ggml import libggml

CLASS_TOKEN = b"v.class_embd"


class _GgufParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def class_token_first(mmproj: Path) -> Any | None:
    """The callback for `mtmd_context_params.cb_eval`, or None where the tower has no class token.

    For mmproj files of the projector type `mlp`. The caller keeps the callback alive as long as the context.
    """
    row = _class_token(mmproj)
    if row is None:
        return None

    def evaluated(tensor: int, asks: bool, _: Any) -> bool:
        if asks:
            return bool(libggml.ggml_op_desc(ctypes.c_void_p(tensor)) == b"CONCAT")
        rows = np.empty((_rows(tensor), row.size), np.float32)
        if rows.nbytes == _bytes(tensor):
            _copy(libggml.ggml_backend_tensor_get, tensor, rows)
            if (turned := in_order(rows, row)) is not rows:
                _copy(libggml.ggml_backend_tensor_set, tensor, turned)
        return True

    return llama.ggml_backend_sched_eval_callback(evaluated)


def in_order(rows: np.ndarray[Any, Any], class_token: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows with the class token first; the very same array where it is not last."""
    return np.roll(rows, 1, axis=0) if np.array_equal(rows[-1], class_token) else rows


def _class_token(mmproj: Path) -> np.ndarray[Any, Any] | None:
    file = ctypes.c_void_p(libggml.gguf_init_from_file(os.fsencode(mmproj), _GgufParams(True, None)))
    if not file:
        return None
    try:
        place = libggml.gguf_find_tensor(file, CLASS_TOKEN)
        if place < 0:
            return None
        start = libggml.gguf_get_data_offset(file) + libggml.gguf_get_tensor_offset(file, place)
        size = libggml.gguf_get_tensor_size(file, place)
    finally:
        libggml.gguf_free(file)
    return np.fromfile(mmproj, np.float32, size // 4, offset=start)


def _rows(tensor: int) -> int:
    return int(libggml.ggml_nrows(ctypes.c_void_p(tensor)))


def _bytes(tensor: int) -> int:
    return int(libggml.ggml_nbytes(ctypes.c_void_p(tensor)))


def _copy(function: Any, tensor: int, rows: np.ndarray[Any, Any]) -> None:
    rows = np.ascontiguousarray(rows)
    function(ctypes.c_void_p(tensor), rows.ctypes.data_as(ctypes.c_void_p), 0, rows.nbytes)


def _declare() -> None:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signatures = {
        "ggml_op_desc": ([pointer], ctypes.c_char_p),
        "ggml_nrows": ([pointer], ctypes.c_int64),
        "ggml_nbytes": ([pointer], size),
        "ggml_backend_tensor_get": ([pointer, pointer, size, size], None),
        "ggml_backend_tensor_set": ([pointer, pointer, size, size], None),
        "gguf_init_from_file": ([ctypes.c_char_p, _GgufParams], pointer),
        "gguf_find_tensor": ([pointer, ctypes.c_char_p], ctypes.c_int64),
        "gguf_get_data_offset": ([pointer], size),
        "gguf_get_tensor_offset": ([pointer, ctypes.c_int64], size),
        "gguf_get_tensor_size": ([pointer, ctypes.c_int64], size),
        "gguf_free": ([pointer], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(libggml, name)
        function.argtypes, function.restype = arguments, result


_declare()
