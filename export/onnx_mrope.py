"""Positions in three axes for a decoder graph whose attention counts in one (M-RoPE of Qwen2-VL and Qwen2.5-VL).

The pairs of a head's dimensions are split into sections; a section turns by the position of its own axis: time, height
or width (`Qwen2VLRotaryEmbedding` in transformers). Cosines and sines of a step's tokens are gathered once, and
each layer's queries and keys are turned before GroupQueryAttention, by ONNX Runtime's `RotaryEmbedding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from mpa_edge.errors import ExportError

# Positions of GroupQueryAttention's inputs, from the operator's specification.
QUERY, KEY, VALUE, COS, SIN = 0, 1, 2, 7, 8
ROTARY = "do_rotary"
PLACES, COS_NOW, SIN_NOW = "mrope.places", "mrope.cos", "mrope.sin"


@dataclass(frozen=True)
class Heads:
    """Sizes of the attention: numbers of query and of key heads, and the dimensions of one."""

    queries: int
    keys: int
    dim: int


def use_three_axes(model: onnx.ModelProto, position_ids: str, sections: Sequence[int], heads: Heads) -> None:
    """Let attention turn by `position_ids`, int64 (3, batch, sequence), an input that the graph has.

    Raises `ExportError` where the attention does not turn queries and keys itself, as the builder's does.
    """
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.extend(_turned(node, heads) if node.op_type == "GroupQueryAttention" else [node])
    first = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    caches = {COS_NOW: first.input[COS], SIN_NOW: first.input[SIN]}
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            _stop_turning(node)
    del model.graph.node[:]
    model.graph.node.extend([*_angles(model.graph, position_ids, caches, sections), *nodes])


def _turned(attention: onnx.NodeProto, heads: Heads) -> Iterator[onnx.NodeProto]:
    """The nodes that turn queries and keys, then the attention with their results as inputs."""
    if not attention.input[COS] or not any(item.name == ROTARY and item.i for item in attention.attribute):
        raise ExportError(f"{attention.name} has no rotary embedding of its own; another version of the builder?")
    name, width = attention.name, heads.dim
    if not attention.input[KEY]:  # queries, keys and values in one
        parts = [f"{name}.{part}" for part in ("query", "key", "value")]
        sizes = f"{name}.sizes"
        ints = [heads.queries * width, heads.keys * width, heads.keys * width]
        yield helper.make_node("Constant", [], [sizes], f"{name}/Sizes", value_ints=ints)
        yield helper.make_node("Split", [attention.input[QUERY], sizes], parts, f"{name}/Split", axis=-1)
        attention.input[QUERY], attention.input[KEY], attention.input[VALUE] = parts
    for place in (QUERY, KEY):
        turned = f"{attention.input[place]}.turned"
        yield helper.make_node(
            "RotaryEmbedding",
            [attention.input[place], PLACES, COS_NOW, SIN_NOW],
            [turned],
            f"{name}/RotaryEmbedding_{place}",
            domain="com.microsoft",
        )
        attention.input[place] = turned
    yield attention


def _stop_turning(attention: onnx.NodeProto) -> None:
    for attribute in attention.attribute:
        if attribute.name == ROTARY:
            attribute.i = 0
    del attention.input[COS:]


def _angles(
    graph: onnx.GraphProto, position_ids: str, caches: dict[str, str], sections: Sequence[int]
) -> Iterator[onnx.NodeProto]:
    """Cosines and sines of this step's tokens (batch * sequence, head / 2), and each token's row in them."""

    def constant(name: str, values: list[int]) -> str:
        if all(item.name != name for item in graph.initializer):
            graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def node(operator: str, inputs: list[str], output: str, **settings: Any) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [output], f"/mrope/{output}/{operator}", **settings)

    for axis in range(3):
        graph.initializer.append(helper.make_tensor(f"mrope.axis.{axis}", TensorProto.INT64, [], [axis]))
        yield node("Gather", [position_ids, f"mrope.axis.{axis}"], f"mrope.positions.{axis}", axis=0)
    start = 0
    ends = [sum(sections[: place + 1]) for place in range(len(sections))]
    for place, end in enumerate(ends):
        window = [constant(f"mrope.from.{place}", [start]), constant(f"mrope.to.{place}", [end])]
        for now, cache in caches.items():
            part = f"{now}.{place}"
            yield node("Slice", [cache, *window, constant("mrope.last", [1])], f"{part}.cache")
            yield node("Gather", [f"{part}.cache", f"mrope.positions.{place % 3}"], part, axis=0)
        start = end
    flat = constant("mrope.flat", [-1, ends[-1]])
    for now in caches:
        yield node("Concat", [f"{now}.{place}" for place in range(len(sections))], f"{now}.all", axis=-1)
        yield node("Reshape", [f"{now}.all", flat], now)
    yield node("Shape", ["mrope.positions.0"], "mrope.shape")
    yield node("Size", ["mrope.positions.0"], "mrope.count")
    for value, number in (("mrope.zero", 0), ("mrope.one", 1)):
        graph.initializer.append(helper.make_tensor(value, TensorProto.INT64, [], [number]))
    yield node("Range", ["mrope.zero", "mrope.count", "mrope.one"], "mrope.numbers")
    yield node("Reshape", ["mrope.numbers", "mrope.shape"], PLACES)
