"""llama.cpp as an engine, through the low-level bindings of llama-cpp-python.

The high-level chat handlers give other tokens and other tiles than the training processor. Here mtmd sees ready tiles
only, each as a picture of its own size, and hands back its features; tokens and features go to the language model
chunk by chunk, with no sampler in between.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from mpa_edge.bundle import Bundle, Role
from mpa_edge.errors import BundleError, InputError, MissingExtra, ModelError
from mpa_edge.runtime.engine import Features, Logits, Positions
from mpa_edge.runtime.families import Cut, Tiles, family_of_bundle

try:
    import llama_cpp.llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd

    from mpa_edge.runtime.class_token import class_token_first
except (ImportError, OSError, AttributeError) as error:  # also a fork, or a build without multimodal support
    raise MissingExtra("llama-cpp-python with multimodal support", "gguf") from error

BATCH = 2048  # most tokens per call of llama_decode
UBATCH = 512  # most tokens computed at once
# llama.cpp reserves memory for this many rows of logits; an answer needs one, verification goes in steps of so many.
ROWS = 64
# M-RoPE in llama.cpp: time, height, width, and one that vision leaves at 0.
AXES = 4
DEVICES = ("auto", "cpu", "gpu", "cuda", "metal", "vulkan")
ALL_LAYERS = 999
PAIR: tuple[Role, Role] = ("language_model", "mmproj")

_NO_LOG = llama.llama_log_callback(lambda level, text, data: None)


def open_engine(folder: Path, bundle: Bundle, image_token: int, threads: int, device: str = "auto") -> LlamaCpp:
    """Load the pair of GGUF files that the manifest names.

    `device` is `cpu`; `cuda`, `metal`, `vulkan` or `gpu` for what this build of llama.cpp offloads to; `auto` for that
    where it does, else the CPU. Raises `InputError` when it offloads to nothing.
    """
    return LlamaCpp(folder, bundle, image_token, threads, offload=_offloads(device))


class LlamaCpp:
    """See `Engine`. Runs on the CPU, or wherever the installed build of llama.cpp offloads to."""

    name = "llama.cpp"

    def __init__(self, folder: Path, bundle: Bundle, image_token: int, threads: int, *, offload: bool = True) -> None:
        """Load the pair, and compute on an accelerator where `offload` is on and there is one; `BundleError` when
        llama.cpp refuses one of the files, or knows the image token by another id than `image_token`."""
        language_model, mmproj = (bundle.path_of(folder, role) for role in PAIR)
        silence()
        llama.llama_backend_init()
        self.device = "gpu" if offload and llama.llama_supports_gpu_offload() else "cpu"
        self._model: Any = None
        self._context: Any = None
        self._mtmd: Any = None
        self._one: Any = _batch_of_one()
        # Tokens in the cache, and the position of the next one: not the same where a picture has rows and columns.
        self._past = self._position = 0
        self._mark: tuple[int, int] | None = None
        self._family, self._image = family_of_bundle(bundle), bundle.image
        try:
            self._model = _load_model(language_model, offload)
            self._context = _new_context(self._model, language_model, bundle.prompt.context_length, threads)
            # Kept alive: llama.cpp calls it whenever it encodes.
            self._in_order = class_token_first(mmproj) if self._family.name == "llava" else None
            tile_tokens = self._family.tile_tokens(self._image)
            self._mtmd = _load_mmproj(mmproj, self._model, tile_tokens, threads, offload, self._in_order)
            vocabulary = llama.llama_model_get_vocab(self._model)
            _check_token(vocabulary, bundle.prompt.image_token, image_token, language_model)
        except BaseException:
            self.close()
            raise
        self._vocabulary_size = llama.llama_vocab_n_tokens(vocabulary)
        self._hidden = llama.llama_model_n_embd_inp(self._model)
        self._image_token_id = image_token

    def encode(self, cut: Cut) -> Features:
        """See `Engine.encode`."""
        return np.concatenate([self._encode_tile(tile) for tile in cut.tiles])

    def prefill(
        self,
        token_ids: Sequence[int],
        features: Features,
        positions: Positions | None = None,
        *,
        all_logits: bool = False,
    ) -> Logits:
        """See `Engine.prefill`."""
        ids = np.asarray(token_ids, np.int32)
        is_image = ids == self._image_token_id
        if is_image.sum() != len(features):
            raise ModelError(f"{is_image.sum()} image tokens in the prompt, features for {len(features)}")
        rows = np.zeros((len(ids), self._hidden), np.float32)
        rows[is_image] = features
        if positions is None:
            positions = np.arange(len(ids))[None]
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._past, self._position, self._mark = 0, 0, None
        collected: list[Logits] = []
        for part in _runs(is_image, ROWS if all_logits else BATCH):
            wanted = part.stop - part.start if all_logits else int(part.stop == len(ids))
            what = {"embd": rows[part]} if is_image[part.start] else {"token": ids[part]}
            collected.append(self._decode_batch(positions[:, part], wanted, **what))
        return np.concatenate(collected) if all_logits else cast("Logits", collected[-1][-1])

    def extend(self, token_ids: Sequence[int]) -> Logits:
        """See `Engine.extend`."""
        if len(token_ids) == 1:
            return self._decode_one(token_ids[0])
        ids = np.asarray(token_ids, np.int32)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            positions = np.arange(self._position, self._position + len(part))[None]
            logits = self._decode_batch(positions, int(start + BATCH >= len(ids)), token=part)
        return cast("Logits", logits[-1])

    def mark(self) -> None:
        """See `Engine.mark`."""
        self._mark = (self._past, self._position)

    def rewind(self) -> bool:
        """See `Engine.rewind`."""
        if self._mark is None:
            return False
        # A model with a recurrent state cannot take steps back and says so.
        if not llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, self._mark[1], -1):
            return False
        self._past, self._position = self._mark
        return True

    def close(self) -> None:
        """See `Engine.close`. Safe to call twice."""
        if self._mtmd:
            mtmd.mtmd_free(self._mtmd)
        if self._context:
            llama.llama_free(self._context)
        if self._model:
            llama.llama_model_free(self._model)
        if self._one:
            llama.llama_batch_free(self._one)
        self._mtmd = self._context = self._model = self._one = None

    def _encode_tile(self, tile: Tiles) -> Features:
        height, width, _ = tile.shape
        pixels = np.ascontiguousarray(tile)
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            chunk = self._image_chunk(bitmap, chunks)
            if mtmd.mtmd_encode_chunk(self._mtmd, chunk) != 0:
                raise ModelError("llama.cpp could not encode a tile")
            shape = (mtmd.mtmd_input_chunk_get_n_tokens(chunk), self._hidden)
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
                return chunk
        raise ModelError("llama.cpp found no picture in a tile")

    def _decode_batch(
        self,
        positions: Positions,
        wanted: int,
        token: np.ndarray[Any, Any] | None = None,
        embd: Features | None = None,
    ) -> Logits:
        """Append tokens at these positions (axes, tokens) to the cache; returns the logits (wanted, vocabulary) of the
        last `wanted`."""
        count = positions.shape[1]
        places = _places(positions, pictures=embd is not None)
        sequence_counts = np.ones(count, np.int32)
        sequence = ctypes.pointer(llama.llama_seq_id(0))
        sequences = (ctypes.POINTER(llama.llama_seq_id) * count)(*[sequence] * count)
        output = np.zeros(count, np.int8)
        output[count - wanted :] = 1
        batch = llama.llama_batch(
            n_tokens=count,
            token=None if token is None else token.ctypes.data_as(ctypes.POINTER(llama.llama_token)),
            embd=None if embd is None else embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=places.ctypes.data_as(ctypes.POINTER(llama.llama_pos)),
            n_seq_id=sequence_counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=sequences,
            logits=output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        return self._decode(batch, wanted, int(positions.max()))

    def _decode_one(self, token: int) -> Logits:
        """Append one token: for a small model, making a batch anew takes as long as half of its computation."""
        self._one.token[0], self._one.pos[0] = token, self._position
        return cast("Logits", self._decode(self._one, 1, self._position)[0])

    def _decode(self, batch: Any, wanted: int, last: int) -> Logits:
        """Compute a batch whose largest position is `last`; the logits (wanted, vocabulary) that it asks for."""
        status = llama.llama_decode(self._context, batch)
        if status != 0:
            raise ModelError(f"llama_decode failed with status {status} after {self._past} tokens")
        self._past, self._position = self._past + batch.n_tokens, max(self._position, last + 1)
        if wanted == 0:
            return np.empty((0, self._vocabulary_size), np.float32)
        rows = ctypes.c_float * (wanted * self._vocabulary_size)
        address = ctypes.cast(llama.llama_get_logits(self._context), ctypes.c_void_p).value
        # Copied: llama.cpp overwrites its buffer with the next batch.
        logits: Logits = np.frombuffer(rows.from_address(address), np.float32).reshape(wanted, -1).copy()
        return logits


def _batch_of_one() -> Any:
    """A batch for one text token of sequence 0, with its logits; to be used again and again."""
    batch = llama.llama_batch_init(1, 0, 1)
    batch.n_tokens = batch.n_seq_id[0] = batch.logits[0] = 1
    batch.seq_id[0][0] = 0
    return batch


def _runs(is_image: np.ndarray[Any, Any], size: int) -> Iterator[slice]:
    """The prompt as runs of text tokens and of image tokens, at most `size` long."""
    edges = [0, *(np.flatnonzero(np.diff(is_image)) + 1), len(is_image)]
    for first, end in pairwise(edges):
        for start in range(first, end, size):
            yield slice(start, min(start + size, end))


def _places(positions: Positions, *, pictures: bool) -> np.ndarray[Any, Any]:
    """Positions as a batch has them: one a token, or for pictures under M-RoPE all of one axis after the other.

    Source: `decode_embd_batch` in llama.cpp's mtmd-helper-common.h; of text llama.cpp takes one and repeats it.
    """
    if not pictures or len(positions) == 1:
        return np.ascontiguousarray(positions[0], np.int32)
    places = np.zeros((AXES, positions.shape[1]), np.int32)
    places[: len(positions)] = positions
    return places


def _offloads(device: str) -> bool:
    if device not in DEVICES:
        raise InputError(f"--device {device}: llama.cpp knows {', '.join(DEVICES)}")
    if device not in ("auto", "cpu") and not llama.llama_supports_gpu_offload():
        raise InputError(
            f"--device {device}: this llama.cpp was built for the CPU only; for CUDA: "
            'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir llama-cpp-python'
        )
    return device != "cpu"


def _load_model(path: Path, offload: bool) -> Any:
    params = llama.llama_model_default_params()
    params.n_gpu_layers = ALL_LAYERS if offload else 0
    # GCC 12 and older compile llama.cpp's set-up of Intel's AMX tiles into a crash at the first quantized product (they
    # drop the stores before `ldtilecfg`). The repacked buffers are the only way into that code.
    params.use_extra_bufts = b"AMX_INT8 = 1" not in llama.llama_print_system_info()
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise BundleError(f"{path}: llama.cpp cannot load it; is it a GGUF file that this version knows?")
    return model


def _new_context(model: Any, path: Path, context_length: int, threads: int) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx = context_length
    params.n_batch = BATCH
    params.n_ubatch = UBATCH
    params.n_outputs_max = ROWS
    params.n_threads = params.n_threads_batch = threads
    # Flash attention sums in half precision on the CPU: ten times the error in the logits, and no gain at this length.
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_perf = True
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise ModelError(f"{path}: no memory for a context of {context_length} tokens")
    return context


def _load_mmproj(
    path: Path, model: Any, tile_tokens: tuple[int, int], threads: int, offload: bool, evaluated: Any | None
) -> Any:
    params = mtmd.mtmd_context_params_default()
    params.use_gpu = offload
    params.print_timings = False
    params.warmup = False
    params.n_threads = threads
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # A budget of one tile: mtmd would else scale each tile to sizes of its own and cut it again.
    params.image_min_tokens, params.image_max_tokens = tile_tokens
    if evaluated is not None:
        params.cb_eval = evaluated
    context = mtmd.mtmd_init_from_file(os.fsencode(path), model, params)
    if not context:
        raise BundleError(f"{path}: llama.cpp cannot load it beside the language model")
    if not mtmd.mtmd_support_vision(context):
        mtmd.mtmd_free(context)
        raise BundleError(f"{path}: holds no vision encoder")
    return context


def _check_token(vocabulary: Any, token: str, number: int, path: Path) -> None:
    """`BundleError` unless the vocabulary has the token, and under this id."""
    text = token.encode()
    found = (llama.llama_token * 2)()
    count = llama.llama_tokenize(vocabulary, text, len(text), found, 2, False, True)
    if count != 1:
        raise BundleError(f"{path}: its vocabulary does not have {token!r} as one token")
    if found[0] != number:
        raise BundleError(f"{path}: {token!r} is its token {found[0]}, and token {number} of tokenizer.json")


def silence() -> None:
    """llama.cpp writes its log to stderr; what goes wrong comes back as a status and is raised."""
    llama.llama_log_set(_NO_LOG, ctypes.c_void_p(0))
    mtmd.mtmd_log_set(_NO_LOG, ctypes.c_void_p(0))
    mtmd.mtmd_helper_log_set(_NO_LOG, ctypes.c_void_p(0))
