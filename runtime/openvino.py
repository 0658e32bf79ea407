"""OpenVINO as an engine: graphs in optimum-intel's layout, with the key-value cache inside the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer

from mpa_edge.bundle import Bundle, QwenVlImages, Role
from mpa_edge.errors import BundleError, InputError, ModelError
from mpa_edge.runtime.engine import Features, Logits, Positions
from mpa_edge.runtime.families import Cut, family_of_bundle
from mpa_edge.runtime.openvino_library import opset13, ov
from mpa_edge.runtime.openvino_vision import merger_inputs

# Tiles that go through the vision encoder together: attention over more of them takes memory and no less time.
TILES_AT_ONCE = 4
LOGITS_TO_KEEP = "num_logits_to_keep"
# Where a graph's notes hold how many image tokens wide a window of its attention is.
WINDOW = ("mpa_edge", "window_tokens")
INT64_MAX = 2**63 - 1
# Left alone OpenVINO computes in bfloat16 where the CPU has it, and rounds the cache to 8 bits: other answers on other
# machines than those that export verified.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def open_engine(folder: Path, bundle: Bundle, threads: int | None = None, device: str = "auto") -> OpenVinoEngine:
    """The engine of an OpenVINO bundle; see `OpenVinoEngine`. `auto` is the CPU, which export verified."""
    return OpenVinoEngine(folder, bundle, threads, device="CPU" if device == "auto" else device.upper())


class OpenVinoEngine:
    """See `Engine`. `threads` None leaves the number to OpenVINO.

    `device` is OpenVINO's name of one: CPU by default, the only one that export verified; on others, which compute in
    half precision, answers may differ. Raises `BundleError` for a graph that cannot be loaded and `InputError` for a
    device that is not there.
    """

    name = "openvino"

    def __init__(self, folder: Path, bundle: Bundle, threads: int | None = None, *, device: str = "CPU") -> None:
        core = ov.Core()
        if device not in core.available_devices:
            raise InputError(f"OpenVINO sees no device {device} here: {', '.join(core.available_devices)}")
        self._bundle, self.device = bundle, device
        self._family = family_of_bundle(bundle)
        self._image_token = _image_token(bundle, folder)
        roles = {file.role for file in bundle.files}

        def load(role: Role, change: Callable[[ov.Model], None] = lambda model: None) -> Any:
            # The embedding is one table look-up; more threads would only wait for each other.
            wanted = 1 if role == "embed_tokens" else threads
            return _compiled(core, bundle.path_of(folder, role), device, wanted, change)

        self._embedding = load("embed_tokens")
        self._vision = load("vision_encoder")
        self._window = 0
        self._merger = load("vision_merger", self._read_window) if "vision_merger" in roles else None
        language = load("language_model", _keep_last_logits)
        self._language = language.create_infer_request()
        self._axes = 3 if language.input("position_ids").partial_shape.rank.get_length() == 3 else 0
        # Tokens in the cache, and the position of the next one: not the same where a picture has rows and columns.
        self._length = self._position = 0
        self._mark: tuple[int, int] | None = None

    def encode(self, cut: Cut) -> Features:
        """See `Engine.encode`."""
        pixels = self._family.pixel_values(cut, self._bundle.image)["pixel_values"]
        if self._merger is not None:
            return self._merged(self._vision(pixels)[0], cut)
        tiles = pixels.reshape(-1, *pixels.shape[-3:])
        starts = range(0, len(tiles), TILES_AT_ONCE)
        features = np.concatenate([self._vision(tiles[start : start + TILES_AT_ONCE])[0] for start in starts])
        return cast("Features", features.reshape(-1, features.shape[-1]))

    def prefill(
        self,
        token_ids: Sequence[int],
        features: Features,
        positions: Positions | None = None,
        *,
        all_logits: bool = False,
    ) -> Logits:
        """See `Engine.prefill`."""
        ids = np.asarray(token_ids, np.int64)
        embeds = self._embed(ids)
        places = np.flatnonzero(ids == self._image_token)
        if len(places) != len(features):
            raise ModelError(f"{len(places)} image tokens in the prompt for {len(features)} image features")
        embeds[0, places] = features
        self._language.reset_state()
        self._length, self._position, self._mark = 0, 0, None
        logits = self._step(embeds, 0 if all_logits else 1, positions)
        last: Logits = logits[-1]
        return logits if all_logits else last

    def extend(self, token_ids: Sequence[int]) -> Logits:
        """See `Engine.extend`."""
        logits: Logits = self._step(self._embed(np.asarray(token_ids, np.int64)), 1)[-1]
        return logits

    def mark(self) -> None:
        """See `Engine.mark`. It costs nothing: what comes after is cut off by `rewind`."""
        self._mark = (self._length, self._position)

    def rewind(self) -> bool:
        """See `Engine.rewind`."""
        if self._mark is None:
            return False
        if self._length != self._mark[0]:
            for state in self._language.query_state():
                kept = state.state.data[:, :, : self._mark[0]]
                state.state = ov.Tensor(np.ascontiguousarray(kept))
        self._length, self._position = self._mark
        return True

    def close(self) -> None:
        """See `Engine.close`."""
        self._mark = None
        del self._embedding, self._vision, self._merger, self._language

    def _merged(self, patches: Features, cut: Cut) -> Features:
        """Qwen-VL's patches, embedded, through the tower's blocks: (image tokens, hidden)."""
        merge = cast("QwenVlImages", self._bundle.image).merge_size
        width = self._merger.input("rotary_pos_emb").partial_shape[1].get_length()
        feed = merger_inputs(patches, cut.rows, cut.columns, merge, width, self._window)
        return cast("Features", self._merger(feed)[0])

    def _read_window(self, model: ov.Model) -> None:
        """The edge of Qwen2.5-VL's windows in image tokens, which export wrote into the graph's own notes."""
        if model.has_rt_info(list(WINDOW)):
            self._window = int(model.get_rt_info(list(WINDOW)).astype(int))

    def _embed(self, ids: Any) -> Features:
        return cast("Features", self._embedding(ids[None])[0].astype(np.float32))

    def _step(self, embeds: Features, keep: int, positions: Positions | None = None) -> Logits:
        """Run the language model on top of its cache; logits (positions, vocabulary)."""
        end = self._length + embeds.shape[1]
        if positions is None:
            positions = np.arange(self._position, self._position + embeds.shape[1], dtype=np.int64)[None]
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": self._shaped(positions),
            "beam_idx": np.zeros(1, np.int32),
            LOGITS_TO_KEEP: np.array(keep, np.int64),
        }
        logits: Logits = self._language.infer(feed, share_inputs=True)["logits"][0]
        self._length, self._position = end, int(positions.max()) + 1
        return logits

    def _shaped(self, positions: Positions) -> Positions:
        """Positions (axes or 1, tokens) as the language model takes them: (batch, tokens), or (axes, batch, tokens)."""
        if not self._axes:
            return positions
        return np.ascontiguousarray(np.broadcast_to(positions, (self._axes, positions.shape[1]))[:, None])


def _compiled(
    core: ov.Core, path: Path, device: str, threads: int | None, change: Callable[[ov.Model], None]
) -> ov.CompiledModel:
    settings = {"PERFORMANCE_HINT": "LATENCY", **(EXACT if device == "CPU" else {})}
    if threads and device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    try:
        model = core.read_model(path)
        change(model)
        return core.compile_model(model, device, settings)
    except RuntimeError as error:
        raise BundleError(f"{path} cannot be loaded by OpenVINO {ov.__version__}: {error}") from error


def _keep_last_logits(model: ov.Model) -> None:
    """Let a caller ask for the last positions' logits only; of a long prompt the others cost more than the rest.

    The graph on disk stays as optimum-intel has it: another program would not feed this input.
    """
    head = model.output("logits").get_node().input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        raise BundleError("the language model's logits do not come from a MatMul; it is another tool's file")
    keep = opset13.parameter([], np.int64, name=LOGITS_TO_KEEP)
    keep.output(0).get_tensor().set_names({LOGITS_TO_KEEP})
    start = opset13.negative(opset13.reshape(keep, np.array([1]), special_zero=False))
    ones = np.array([1], np.int64)
    kept = opset13.slice(head.input_value(0), start, np.array([INT64_MAX]), ones, ones)
    head.input(0).replace_source_output(kept.output(0))
    model.add_parameters([keep])
    model.validate_nodes_and_infer_types()


def _image_token(bundle: Bundle, folder: Path) -> int:
    token = Tokenizer.from_file(str(bundle.path_of(folder, "tokenizer"))).token_to_id(bundle.prompt.image_token)
    if token is None:
        raise BundleError(f"the tokenizer has no token {bundle.prompt.image_token!r}")
    return int(token)
