"""ONNX Runtime as an engine: three graphs and a key-value cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort

from mpa_edge.bundle import Bundle, Role, one_line
from mpa_edge.errors import BundleError, InputError
from mpa_edge.runtime.embedding import TILES_AT_ONCE, EmbeddingEngine, Place, running, shaped
from mpa_edge.runtime.engine import Features, Logits, Positions
from mpa_edge.runtime.families import Cut, family_of_bundle

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# What people call a device -> the execution providers for it. What the first cannot do, the next one does.
PROVIDERS = {
    "cpu": (CPU,),
    "cuda": (CUDA, CPU),
    "tensorrt": (TENSORRT, CUDA, CPU),
    "openvino": ("OpenVINOExecutionProvider", CPU),
    "coreml": ("CoreMLExecutionProvider", CPU),
    "directml": ("DmlExecutionProvider", CPU),
}
# Providers with a memory of their own, by ONNX Runtime's name of it.
MEMORY = {CUDA: "cuda", TENSORRT: "cuda", "DmlExecutionProvider": "dml"}
# The build of ONNX Runtime on PyPI that has a provider; a Jetson's wheels come from NVIDIA, see the README.
PACKAGES = {
    CUDA: "onnxruntime-gpu",
    TENSORRT: "onnxruntime-gpu",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "DmlExecutionProvider": "onnxruntime-directml",
}
HALF = ("fp16", "q4f16")
# What transformers.js calls an input of Qwen2-VL's (not Qwen2.5-VL's) vision encoder -> the processor's name for it.
OTHER_NAMES = {"grid_thw": "image_grid_thw"}


def open_engine(
    folder: Path, bundle: Bundle, image_token: int, threads: int | None = None, device: str = "auto"
) -> OnnxEngine:
    """The engine of an ONNX bundle; see `OnnxEngine`.

    `device` is a key of `PROVIDERS`; `auto` is CUDA for a bundle in half precision where this ONNX Runtime has it and
    it works, else the CPU: the fused attention has GPU kernels for half precision only. Raises `InputError` for others.
    """
    if device == "auto":
        if bundle.quantization in HALF and CUDA in ort.get_available_providers():
            try:
                return OnnxEngine(folder, bundle, image_token, threads, providers=PROVIDERS["cuda"])
            except InputError as error:
                warnings.warn(f"{error}; going on with the CPU", stacklevel=2)
        device = "cpu"
    if device not in PROVIDERS:
        raise InputError(f"--device {device}: ONNX Runtime knows auto, {', '.join(PROVIDERS)}")
    return OnnxEngine(folder, bundle, image_token, threads, providers=PROVIDERS[device])


class OnnxEngine(EmbeddingEngine):
    """See `Engine`. `threads` None leaves the number to ONNX Runtime; `image_token` is that token's id.

    `providers` are ONNX Runtime's execution providers in order of preference; the key-value cache stays in the memory
    of the first one. Raises `BundleError` for a graph that cannot be loaded and `InputError` for a provider that is not
    installed, or does not work here.
    """

    name = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        image_token: int,
        threads: int | None = None,
        *,
        providers: Sequence[str] = (CPU,),
    ) -> None:
        _check_providers(providers)
        self.device = providers[0]
        self._memory = MEMORY.get(providers[0], "cpu")
        self._image = bundle.image
        self._family = family_of_bundle(bundle)
        self._image_token = image_token
        # The embedding is one table look-up; more threads would only wait for each other.
        self._embedding = _session(bundle, folder, "embed_tokens", 1, (CPU,))
        self._vision = _session(bundle, folder, "vision_encoder", threads, providers)
        self._decoder = _session(bundle, folder, "decoder", threads, providers)
        self._outputs = [output.name for output in self._decoder.get_outputs()]
        inputs = {value.name: value for value in self._decoder.get_inputs()}
        self._axes = inputs["position_ids"].shape[0] if len(inputs["position_ids"].shape) == 3 else 0
        self._empty = {
            name: _value(np.zeros((1, value.shape[1], 0, value.shape[3]), _numpy_type(value)))
            for name, value in inputs.items()
            if name.startswith("past_key_values.")
        }
        self._past: dict[str, Any] = {}
        self._place = Place()
        self._mark: tuple[dict[str, Any], Place] | None = None

    def encode(self, cut: Cut) -> Features:
        """See `Engine.encode`. A tile whose pixel values are all zero gives no features: the model skips it."""
        starts = range(0, len(cut.tiles), TILES_AT_ONCE)
        parts = [self._encode(replace(cut, tiles=cut.tiles[start : start + TILES_AT_ONCE])) for start in starts]
        return cast("Features", np.concatenate(parts))

    def _encode(self, cut: Cut) -> Features:
        types = {value.name: _numpy_type(value) for value in self._vision.get_inputs()}
        values = self._family.pixel_values(cut, self._image)
        feed = {name: values[OTHER_NAMES.get(name, name)].astype(kind, copy=False) for name, kind in types.items()}
        with running("vision encoder"):
            features = self._vision.run(None, feed)[0]
        return cast("Features", features.astype(np.float32, copy=False).reshape(-1, features.shape[-1]))

    def mark(self) -> None:
        """See `Engine.mark`. Every step writes a new cache, so the old one only has to be kept: memory for a second."""
        self._mark = (self._past, self._place)

    def rewind(self) -> bool:
        """See `Engine.rewind`."""
        if self._mark is None:
            return False
        self._past, self._place = self._mark
        return True

    def close(self) -> None:
        """See `Engine.close`."""
        self._past = self._empty = {}
        self._mark = None
        del self._embedding, self._vision, self._decoder

    def _forget(self) -> None:
        self._past, self._place, self._mark = self._empty, Place(), None

    def _embed(self, ids: Any) -> Features:
        with running("embedding"):
            embeds = self._embedding.run(None, {"input_ids": ids[None]})[0]
        return cast("Features", embeds.astype(np.float32, copy=False))

    def _step(self, embeds: Features, keep: int, positions: Positions | None = None) -> Logits:
        """Run the decoder on top of the cache and keep its new cache; logits (positions, vocabulary)."""
        positions, after = self._place.numbered(embeds.shape[1], positions)
        feed = {
            "inputs_embeds": _value(embeds),
            "attention_mask": _value(np.ones((1, after.length), np.int64)),
            "position_ids": _value(shaped(positions, self._axes)),
            "num_logits_to_keep": _value(np.array(keep, np.int64)),
        }
        with running("decoder"):
            outputs = self._run(feed | self._past)
        logits: Logits = outputs.pop("logits").numpy()[0].astype(np.float32, copy=False)
        self._past = {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}
        self._place = after
        return logits

    def _run(self, feed: dict[str, Any]) -> dict[str, Any]:
        """The decoder's outputs; bound to the device, so that the cache is never copied out."""
        binding = self._decoder.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._memory)
        self._decoder.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))


def _check_providers(wanted: Sequence[str]) -> None:
    """`InputError` with the cure for one that is not in this build of ONNX Runtime: all builds share one module, so
    that a second one beside the first breaks both."""
    missing = sorted(set(wanted) - set(ort.get_available_providers()))
    if missing:
        package = PACKAGES.get(missing[0])
        cure = f". Run: pip uninstall onnxruntime && pip install {package}" if package else ""
        raise InputError(f"{missing[0]} is not in this ONNX Runtime: {', '.join(ort.get_available_providers())}{cure}")


def _numpy_type(value: Any) -> type[Any]:
    """The type of a graph's input: "tensor(float16)" and the like."""
    kinds = {"float": np.float32, "float16": np.float16, "int64": np.int64, "bool": np.bool_}
    return kinds[value.type.removeprefix("tensor(").removesuffix(")")]


def _value(array: Any) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)


def _session(
    bundle: Bundle, folder: Path, role: Role, threads: int | None, providers: Sequence[str]
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; the input with a default is warned about at every start otherwise
    path = bundle.path_of(folder, role)
    if CUDA in providers and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries from pip's packages, where there are such
    try:
        session = ort.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # the C++ side raises a dozen kinds
        reason = one_line(str(error))
        raise BundleError(f"{path} cannot be loaded by ONNX Runtime {ort.__version__}: {reason}") from error
    # It goes on with the next provider where the first one's libraries or device are missing.
    if providers[0] not in session.get_providers():
        cure = 'pip install "onnxruntime-gpu[cuda,cudnn]"' if providers[0] in (CUDA, TENSORRT) else "see its log"
        raise InputError(f"{providers[0]} is in this ONNX Runtime and does not work here (its libraries? {cure})")
    return session
