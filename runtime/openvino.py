"""OpenVINO as an engine: graphs in optimum-intel's layout, with the key-value cache inside the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mpa_edge.bundle import Bundle, QwenVlImages, Role, one_line
from mpa_edge.errors import BundleError, InputError
from mpa_edge.runtime.embedding import TILES_AT_ONCE, EmbeddingEngine, Place, running, shaped
from mpa_edge.runtime.engine import Features, Logits, Positions
from mpa_edge.runtime.families import Cut, family_of_bundle
from mpa_edge.runtime.openvino_library import opset13, ov
from mpa_edge.runtime.openvino_vision import merger_inputs

LOGITS_TO_KEEP = "num_logits_to_keep"
# Where a graph's notes hold how many image tokens wide a window of its attention is.
WINDOW = ("mpa_edge", "window_tokens")
INT64_MAX = 2**63 - 1
# Left alone OpenVINO computes in bfloat16 where the CPU has it, and rounds the cache to 8 bits: other answers on other
# machines than those that export verified.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def open_engine(
    folder: Path, bundle: Bundle, image_token: int, threads: int | None = None, device: str = "auto"
) -> OpenVinoEngine:
    """The engine of an OpenVINO bundle; see `OpenVinoEngine`. `auto` is the CPU, which export verified."""
    return OpenVinoEngine(folder, bundle, image_token, threads, device="CPU" if device == "auto" else device.upper())


class OpenVinoEngine(EmbeddingEngine):
    """See `Engine`. `threads` None leaves the number to OpenVINO; `image_token` is that token's id.

    `device` is OpenVINO's name of one (GPU, GPU.1, NPU) or of a way to use several (AUTO:GPU,CPU, HETERO:GPU,CPU): CPU
    by default, the only one that export verified; on others, which compute in half precision, answers may differ.
    Raises `BundleError` for a graph that cannot be loaded and `InputError` for a device that is not there, or cannot
    take the model.
    """

    name = "openvino"

    def __init__(
        self, folder: Path, bundle: Bundle, image_token: int, threads: int | None = None, *, device: str = "CPU"
    ) -> None:
        core = ov.Core()
        _check_device(device, core.available_devices)
        self._bundle, self.device = bundle, device
        self._family = family_of_bundle(bundle)
        self._image_token = image_token
        roles = {file.role for file in bundle.files}

        def load(role: Role, change: Callable[[ov.Model], None] = lambda model: None) -> Any:
            # The embedding is one table look-up; more threads would only wait for each other.
            wanted = 1 if role == "embed_tokens" else threads
            return _compiled(core, bundle.path_of(folder, role), device, wanted, change)

        self._embedding = load("embed_tokens")
        self._vision = load("vision_encoder")
        self._window = 0
        self._merger: Any = load("vision_merger", self._read_window) if "vision_merger" in roles else None
        language = load("language_model", _keep_last_logits)
        self._language = language.create_infer_request()
        self._axes = 3 if language.input("position_ids").partial_shape.rank.get_length() == 3 else 0
        self._place = Place()
        self._mark: Place | None = None

    def encode(self, cut: Cut) -> Features:
        """See `Engine.encode`."""
        pixels = self._family.pixel_values(cut, self._bundle.image)["pixel_values"]
        if self._merger is not None:
            return self._merged(self._see(pixels), cut)
        tiles = pixels.reshape(-1, *pixels.shape[-3:])
        starts = range(0, len(tiles), TILES_AT_ONCE)
        features = np.concatenate([self._see(tiles[start : start + TILES_AT_ONCE]) for start in starts])
        return cast("Features", features.reshape(-1, features.shape[-1]))

    def mark(self) -> None:
        """See `Engine.mark`. It costs nothing: what comes after is cut off by `rewind`."""
        self._mark = self._place

    def rewind(self) -> bool:
        """See `Engine.rewind`."""
        if self._mark is None:
            return False
        if self._place != self._mark:
            for state in self._language.query_state():
                kept = state.state.data[:, :, : self._mark.length]
                state.state = ov.Tensor(np.ascontiguousarray(kept))
        self._place = self._mark
        return True

    def close(self) -> None:
        """See `Engine.close`."""
        self._mark = None
        del self._embedding, self._vision, self._merger, self._language

    def _see(self, pixels: Any) -> Any:
        with running("vision encoder"):
            return self._vision(pixels)[0]

    def _merged(self, patches: Features, cut: Cut) -> Features:
        """Qwen-VL's patches, embedded, through the tower's blocks: (image tokens, hidden)."""
        merge = cast("QwenVlImages", self._bundle.image).merge_size
        width = self._merger.input("rotary_pos_emb").partial_shape[1].get_length()
        feed = merger_inputs(patches, cut.rows, cut.columns, merge, width, self._window)
        with running("vision merger"):
            return cast("Features", self._merger(feed)[0])

    def _read_window(self, model: ov.Model) -> None:
        """The edge of Qwen2.5-VL's windows in image tokens, which export wrote into the graph's own notes."""
        if model.has_rt_info(list(WINDOW)):
            self._window = int(model.get_rt_info(list(WINDOW)).astype(int))

    def _forget(self) -> None:
        self._language.reset_state()
        self._place, self._mark = Place(), None

    def _embed(self, ids: Any) -> Features:
        with running("embedding"):
            return cast("Features", self._embedding(ids[None])[0].astype(np.float32))

    def _step(self, embeds: Features, keep: int, positions: Positions | None = None) -> Logits:
        """Run the language model on top of its cache; logits (positions, vocabulary)."""
        positions, after = self._place.numbered(embeds.shape[1], positions)
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, after.length), np.int64),
            "position_ids": shaped(positions, self._axes),
            "beam_idx": np.zeros(1, np.int32),
            LOGITS_TO_KEEP: np.array(keep, np.int64),
        }
        with running("language model"):
            logits: Logits = self._language.infer(feed, share_inputs=True)["logits"][0]
        self._place = after
        return logits


def _check_device(device: str, here: Sequence[str]) -> None:
    """`InputError` for a device that is not here. GPU is GPU.0 where there are several; names of ways to use several
    (AUTO:…, HETERO:…) OpenVINO judges itself, when it compiles."""
    several = ":" in device or device == "AUTO"
    if not several and not any(known == device or known.startswith(f"{device}.") for known in here):
        raise InputError(f"OpenVINO sees no device {device} here: {', '.join(here)}")


def _compiled(
    core: ov.Core, path: Path, device: str, threads: int | None, change: Callable[[ov.Model], None]
) -> ov.CompiledModel:
    settings = {"PERFORMANCE_HINT": "LATENCY", **(EXACT if device == "CPU" else {})}
    if threads and device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    try:
        model = core.read_model(path)
        change(model)
    except RuntimeError as error:
        reason = one_line(str(error))
        raise BundleError(f"{path} cannot be loaded by OpenVINO {ov.__version__}: {reason}") from error
    try:
        return core.compile_model(model, device, settings)
    except RuntimeError as error:
        reason = one_line(str(error))
        if device == "CPU":  # which takes every graph that is sound
            raise BundleError(f"{path} cannot be loaded by OpenVINO {ov.__version__}: {reason}") from error
        raise InputError(f"--device {device}: OpenVINO {ov.__version__} cannot run {path} there: {reason}") from error


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
