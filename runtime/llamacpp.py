"""llama.cpp as an engine, through the low-level bindings of llama-cpp-python.

The high-level chat handlers give other tokens and other tiles than the training processor. Here mtmd sees ready tiles
only, each as a picture of its own size, and hands back its features; tokens and features go to the language model
chunk by chunk, with no sampler in between.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np

from mpa_edge.bundle import Bundle
from mpa_edge.errors import BundleError, MissingExtra, ModelError
from mpa_edge.runtime.engine import Features, Logits, Tiles

try:
    import llama_cpp.llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd
except (ImportError, OSError, AttributeError) as error:  # also a fork, or a build without multimodal support
    raise MissingExtra("llama-cpp-python with multimodal support", "gguf") from error

BATCH = 2048  # most positions per call of llama_decode
TILE_BATCH = 512  # most positions computed at once (llama.cpp's n_ubatch)

_NO_LOG = llama.llama_log_callback(lambda level, text, data: None)


def open_engine(folder: Path, bundle: Bundle, threads: int) -> LlamaCpp:
    """Load the pair of GGUF files that the manifest names."""
    image_token = bundle.prompt.image_token
    return LlamaCpp(
        bundle.path_of(folder, "language_model"),
        bundle.path_of(folder, "mmproj"),
        image_token=image_token,
        tokens_per_tile=bundle.image.tokens_per_tile,
        context_length=bundle.prompt.context_length,
        threads=threads,
    )


class LlamaCpp:
    """See `Engine`. Runs on the CPU, or wherever the installed build of llama.cpp offloads to."""

    name = "llama.cpp"

    def __init__(
        self,
        language_model: Path,
        mmproj: Path,
        *,
        image_token: str,
        tokens_per_tile: int,
        context_length: int,
        threads: int,
    ) -> None:
        """Load both files; `BundleError` when llama.cpp refuses one of them."""
        silence()
        llama.llama_backend_init()
        self._model: Any = None
        self._context: Any = None
        self._mtmd: Any = None
        self._past = 0
        self._mark: int | None = None
        self._tokens_per_tile = tokens_per_tile
        try:
            self._model = _load_model(language_model)
            self._context = _new_context(self._model, language_model, context_length, tokens_per_tile, threads)
            self._mtmd = _load_mmproj(mmproj, self._model, tokens_per_tile, threads)
        except BaseException:
            self.close()
            raise
        vocabulary = llama.llama_model_get_vocab(self._model)
        self._vocabulary_size = llama.llama_vocab_n_tokens(vocabulary)
        self._hidden = llama.llama_model_n_embd_inp(self._model)
        self._image_token_id = _token_id(vocabulary, image_token, language_model)

    def encode(self, tiles: Tiles) -> Features:
        """See `Engine.encode`."""
        return np.stack([self._encode_tile(tile) for tile in tiles])

    def prefill(self, token_ids: Sequence[int], features: Features, *, all_logits: bool = False) -> Logits:
        """See `Engine.prefill`."""
        images = sum(token == self._image_token_id for token in token_ids)
        rows = np.ascontiguousarray(features, np.float32).reshape(-1, self._hidden)
        if images != len(rows):
            raise ModelError(f"{images} image tokens in the prompt, features for {len(rows)}")
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._past, self._mark = 0, None
        collected: list[Logits] = []
        taken = 0
        # With all logits, chunks are as short as the buffer for logits that the context has.
        text_size = self._tokens_per_tile if all_logits else BATCH
        for chunk in _chunks(token_ids, self._image_token_id, self._tokens_per_tile, text_size):
            last = self._past + len(chunk) == len(token_ids)
            wanted = len(chunk) if all_logits else int(last)
            if chunk[0] == self._image_token_id:
                logits = self._decode_features(rows[taken : taken + len(chunk)], wanted)
                taken += len(chunk)
            else:
                logits = self._decode_batch(len(chunk), wanted, token=np.asarray(chunk, np.int32))
            collected.append(logits)
        return np.concatenate(collected) if all_logits else cast("Logits", collected[-1][-1])

    def extend(self, token_ids: Sequence[int]) -> Logits:
        """See `Engine.extend`."""
        ids = np.asarray(token_ids, np.int32)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            logits = self._decode_batch(len(part), int(start + BATCH >= len(ids)), token=part)
        return cast("Logits", logits[-1])

    def mark(self) -> None:
        """See `Engine.mark`."""
        self._mark = self._past

    def rewind(self) -> bool:
        """See `Engine.rewind`."""
        if self._mark is None:
            return False
        # A model with a recurrent state cannot take steps back and says so.
        if not llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, self._mark, -1):
            return False
        self._past = self._mark
        return True

    def close(self) -> None:
        """See `Engine.close`. Safe to call twice."""
        if self._mtmd:
            mtmd.mtmd_free(self._mtmd)
        if self._context:
            llama.llama_free(self._context)
        if self._model:
            llama.llama_model_free(self._model)
        self._mtmd = self._context = self._model = None

    def _encode_tile(self, tile: Tiles) -> Features:
        height, width, _ = tile.shape
        pixels = np.ascontiguousarray(tile)
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            chunk = self._image_chunk(bitmap, chunks)
            if mtmd.mtmd_encode_chunk(self._mtmd, chunk) != 0:
                raise ModelError("llama.cpp could not encode a tile")
            shape = (self._tokens_per_tile, self._hidden)
            # Copied: mtmd overwrites its buffer with the next tile.
            features = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._mtmd), shape).copy()
            return cast("Features", features)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _image_chunk(self, bitmap: Any, chunks: Any) -> Any:
        """The tile as mtmd's last image chunk, the overview: of the tile's own size, so that nothing is resampled."""
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        pictures = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(self._mtmd, chunks, ctypes.byref(text), pictures, 1) != 0:
            raise ModelError("llama.cpp could not prepare a tile")
        for index in reversed(range(mtmd.mtmd_input_chunks_size(chunks))):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                if tokens != self._tokens_per_tile:
                    raise BundleError(
                        f"mmproj gives {tokens} tokens per tile, the manifest says {self._tokens_per_tile}"
                    )
                return chunk
        raise ModelError("llama.cpp found no picture in a tile")

    def _decode_features(self, rows: Features, wanted: int) -> Logits:
        """One run of image tokens, with the mask that the model wants for pictures."""
        non_causal = mtmd.mtmd_decode_use_non_causal(self._mtmd, None)
        if non_causal:
            llama.llama_set_causal_attn(self._context, False)
        try:
            return self._decode_batch(len(rows), wanted, embd=np.ascontiguousarray(rows))
        finally:
            if non_causal:
                llama.llama_set_causal_attn(self._context, True)

    def _decode_batch(
        self, count: int, wanted: int, token: np.ndarray[Any, Any] | None = None, embd: Features | None = None
    ) -> Logits:
        """Append `count` positions to the cache; returns the logits (wanted, vocabulary) of the last `wanted`."""
        positions = np.arange(self._past, self._past + count, dtype=np.int32)
        sequence_counts = np.ones(count, np.int32)
        sequence = ctypes.pointer(llama.llama_seq_id(0))
        sequences = (ctypes.POINTER(llama.llama_seq_id) * count)(*[sequence] * count)
        output = np.zeros(count, np.int8)
        output[count - wanted :] = 1
        batch = llama.llama_batch(
            n_tokens=count,
            token=None if token is None else token.ctypes.data_as(ctypes.POINTER(llama.llama_token)),
            embd=None if embd is None else embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=positions.ctypes.data_as(ctypes.POINTER(llama.llama_pos)),
            n_seq_id=sequence_counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=sequences,
            logits=output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = llama.llama_decode(self._context, batch)
        if status != 0:
            raise ModelError(f"llama_decode failed with status {status} at position {self._past}")
        self._past += count
        if wanted == 0:
            return np.empty((0, self._vocabulary_size), np.float32)
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self._context), (wanted, self._vocabulary_size))
        return cast("Logits", logits.copy())


def _chunks(token_ids: Sequence[int], image_id: int, tokens_per_tile: int, text_size: int) -> Iterator[list[int]]:
    """The prompt as runs of text tokens, at most `text_size` long, and of image tokens, one tile each."""
    for is_image, run in groupby(token_ids, key=lambda token: token == image_id):
        tokens = list(run)
        size = tokens_per_tile if is_image else text_size
        for start in range(0, len(tokens), size):
            yield tokens[start : start + size]


def _load_model(path: Path) -> Any:
    params = llama.llama_model_default_params()
    # GCC 12 and older compile llama.cpp's set-up of Intel's AMX tiles into a crash at the first quantized product (they
    # drop the stores before `ldtilecfg`). The repacked buffers are the only way into that code.
    params.use_extra_bufts = b"AMX_INT8 = 1" not in llama.llama_print_system_info()
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise BundleError(f"{path}: llama.cpp cannot load it; is it a GGUF file that this version knows?")
    return model


def _new_context(model: Any, path: Path, context_length: int, tokens_per_tile: int, threads: int) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx = context_length
    params.n_batch = BATCH
    params.n_ubatch = max(TILE_BATCH, tokens_per_tile)
    # llama.cpp reserves memory for this many rows of logits; an answer needs one, verification a tile's.
    params.n_outputs_max = tokens_per_tile
    params.n_threads = params.n_threads_batch = threads
    # Flash attention sums in half precision on the CPU: ten times the error in the logits, and no gain at this length.
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_perf = True
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise ModelError(f"{path}: no memory for a context of {context_length} tokens")
    return context


def _load_mmproj(path: Path, model: Any, tokens_per_tile: int, threads: int) -> Any:
    params = mtmd.mtmd_context_params_default()
    params.use_gpu = True
    params.print_timings = False
    params.warmup = False
    params.n_threads = threads
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # A budget of exactly one tile: mtmd would else scale each tile up to the model's longest edge and cut it again.
    params.image_min_tokens = params.image_max_tokens = tokens_per_tile
    context = mtmd.mtmd_init_from_file(os.fsencode(path), model, params)
    if not context:
        raise BundleError(f"{path}: llama.cpp cannot load it beside the language model")
    if not mtmd.mtmd_support_vision(context):
        mtmd.mtmd_free(context)
        raise BundleError(f"{path}: holds no vision encoder")
    return context


def _token_id(vocabulary: Any, token: str, path: Path) -> int:
    text = token.encode()
    found = (llama.llama_token * 2)()
    count = llama.llama_tokenize(vocabulary, text, len(text), found, 2, False, True)
    if count != 1:
        raise BundleError(f"{path}: its vocabulary does not have {token!r} as one token")
    return int(found[0])


def silence() -> None:
    """llama.cpp writes its log to stderr; what goes wrong comes back as a status and is raised."""
    llama.llama_log_set(_NO_LOG, ctypes.c_void_p(0))
    mtmd.mtmd_log_set(_NO_LOG, ctypes.c_void_p(0))
    mtmd.mtmd_helper_log_set(_NO_LOG, ctypes.c_void_p(0))
