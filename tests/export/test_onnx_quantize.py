"""Graphs of a few nodes in other precisions: what is converted, what stays, and what comes out under ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpa_edge.errors import ExportError
from mpa_edge.export import onnx_tensors
from mpa_edge.export.onnx_quantize import PRECISIONS, convert

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
QUANTIZED = ("int8", "q4", "q4f16")
# Largest difference, as a fraction of the largest value: blocks of 8 bits, of 4 bits, and 11 bits at every step.
ALLOWED = {"int8": 0.02, "q4": 0.2, "q4f16": 0.2, "fp16": 0.002}


def write(
    path: Path, nodes: list[Any], weights: Mapping[str, Any], x: list[Any] | None = None, kind: int = FLOAT
) -> Path:
    """A graph from `x` to `y`; `weights` by name."""
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", kind, x or ["rows", "columns"])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        tensors,
    )
    # The checker wants the rank of an output.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, path)
    return path


def run(path: Path, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def converted(source: Path, quant: str) -> Path:
    target = source.with_name(f"{quant}.onnx")
    convert(source, target, PRECISIONS[quant])
    return target


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def assert_close(got: Any, wanted: Any, quant: str) -> None:
    assert got.dtype == np.float32
    assert np.abs(got - wanted).max() <= ALLOWED[quant] * np.abs(wanted).max()


@pytest.mark.parametrize("quant", QUANTIZED)
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (72, 40), (20, 33), (33, 1)])
def test_rows_that_fill_no_whole_number_of_blocks(quant: str, rows: int, columns: int, tmp_path: Path) -> None:
    weight, x = random(rows, columns), random(5, rows, seed=1)
    source = write(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], "product")], {"w": weight})
    target = converted(source, quant)
    assert operators(target)["MatMulNBits"] == 1
    assert operators(target)["MatMul"] == 0
    assert_close(run(target, x), x @ weight, quant)


@pytest.mark.parametrize("quant", QUANTIZED)
@pytest.mark.parametrize(("transposed", "biased"), [(0, True), (1, True), (1, False)])
def test_a_gemm_is_quantized_too(quant: str, transposed: int, biased: bool, tmp_path: Path) -> None:
    weight, bias, x = random(48, 40), random(40, seed=2), random(5, 48, seed=1)
    inputs = ["x", "w", "b"] if biased else ["x", "w"]
    weights = {"w": np.ascontiguousarray(weight.T) if transposed else weight, "b": bias}
    source = write(
        tmp_path / "m.onnx", [helper.make_node("Gemm", inputs, ["y"], "gemm", transB=transposed)], weights, ["rows", 48]
    )
    target = converted(source, quant)
    assert {"Gemm", "MatMul"}.isdisjoint(operators(target))
    assert_close(run(target, x), x @ weight + (bias if biased else 0), quant)


def test_a_gemm_of_another_kind_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "odd gemm", alpha=0.5)]
    source = write(tmp_path / "m.onnx", nodes, {"w": random(48, 40)}, ["rows", 48])
    with pytest.raises(ExportError, match="odd gemm is a Gemm that cannot be quantized"):
        converted(source, "q4")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("constant", [False, True])
def test_a_weight_that_would_stay_as_it_is_is_named(constant: bool, tmp_path: Path) -> None:
    weight = random(40, 48)
    first = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)) if constant else None
    nodes = [
        *([first] if first else []),
        helper.make_node("Transpose", ["w"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"], "hidden product"),
    ]
    source = write(tmp_path / "m.onnx", nodes, {} if constant else {"w": weight})
    with pytest.raises(ExportError, match="1 weights were not quantized, among them that of hidden product"):
        converted(source, "int8")


@pytest.mark.parametrize("quant", QUANTIZED)
def test_a_weight_in_a_constant_node_or_of_two_products_is_quantized(quant: str, tmp_path: Path) -> None:
    weight, x = random(48, 48, scale=0.2), random(5, 48, seed=1)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w"], ["y"], "second"),
    ]
    target = converted(write(tmp_path / "m.onnx", nodes, {}), quant)
    assert operators(target)["MatMulNBits"] == 2
    assert len([tensor for tensor in onnx.load(target).graph.initializer if tensor.name.endswith("_scales")]) == 1
    assert_close(run(target, x), x @ weight @ weight, quant)


def test_products_of_two_inputs_are_left_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"], "scores"),
    ]
    target = converted(write(tmp_path / "m.onnx", nodes, {}), "q4")
    assert operators(target) == {"Transpose": 1, "MatMul": 1}


@pytest.mark.parametrize("quant", ["fp16", *QUANTIZED])
def test_angles_are_taken_from_positions_in_float32(quant: str, tmp_path: Path) -> None:
    """Position 30001 is no float16, and its angle with frequencies in 4 bits is another one."""
    frequencies = (1 / 10000 ** (np.arange(32) / 32)).astype(np.float32)[None]
    nodes = [
        helper.make_node("Cast", ["x"], ["floats"], "cast", to=FLOAT),
        helper.make_node("MatMul", ["floats", "frequencies"], ["angles"], "turns"),
        helper.make_node("Cos", ["angles"], ["cosines"], "cos"),
        helper.make_node("MatMul", ["cosines", "w"], ["y"], "layer"),
    ]
    weights = {"frequencies": frequencies, "w": np.eye(32, dtype=np.float32)}
    source = write(tmp_path / "m.onnx", nodes, weights, ["rows", 1], INT64)
    positions = np.array([[0], [7], [2049], [30001]])
    np.testing.assert_allclose(run(converted(source, quant), positions), run(source, positions), atol=0.02)


@pytest.mark.parametrize("quant", ["fp16", "q4f16"])
def test_the_root_of_a_norm_is_taken_in_float32(quant: str, tmp_path: Path) -> None:
    """Squares of a hidden state of some hundreds are beyond float16, as are those of Qwen2."""
    weight = {"two": np.float32(2), "axes": np.array([-1]), "epsilon": np.float32(1e-6), "scale": random(2048, seed=3)}
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["squares"], "pow"),
        helper.make_node("ReduceMean", ["squares", "axes"], ["mean"], "mean"),
        helper.make_node("Add", ["mean", "epsilon"], ["shifted"], "shift"),
        helper.make_node("Sqrt", ["shifted"], ["root"], "root"),
        helper.make_node("Reciprocal", ["root"], ["factor"], "reciprocal"),
        helper.make_node("Mul", ["x", "factor"], ["normal"], "normal"),
        helper.make_node("Mul", ["normal", "scale"], ["y"], "scaled"),
    ]
    source = write(tmp_path / "m.onnx", nodes, weight, ["rows", 2048])
    x = random(3, 2048, scale=3000)
    assert np.square(x).max() > 65504
    target = converted(source, quant)
    assert_close(run(target, x), run(source, x), "fp16")
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(target).graph.initializer}
    assert (kinds["scale"], kinds["epsilon"]) == (TensorProto.FLOAT16, FLOAT)


def test_decisions_are_made_in_float32(tmp_path: Path) -> None:
    """2049 is more than 2048, but not in float16."""
    nodes = [
        helper.make_node("Greater", ["x", "limit"], ["more"], "more"),
        helper.make_node("Where", ["more", "low", "zero"], ["y"], "choose"),
    ]
    weights = {"limit": np.float32(2048), "low": np.float32(np.finfo(np.float32).min), "zero": np.float32(0)}
    target = converted(write(tmp_path / "m.onnx", nodes, weights), "fp16")
    # A mask's lowest number is float16's lowest, not minus infinity: infinity minus infinity is no number.
    assert run(target, np.array([[2048, 2049]], np.float32)).tolist() == [[0, -65504]]


def test_types_that_a_node_states_itself_become_half(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"], "zeros"),
        helper.make_node(
            "ConstantOfShape", ["shape"], ["twos"], "twos", value=numpy_helper.from_array(np.float32([2]))
        ),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], "ones", value=numpy_helper.from_array(np.int64([1]))),
        helper.make_node("Cast", ["ones"], ["floats"], "cast", to=FLOAT),
        helper.make_node("Sum", ["x", "zeros", "twos", "floats"], ["y"], "sum"),
    ]
    target = converted(write(tmp_path / "m.onnx", nodes, {}), "fp16")
    onnx.checker.check_model(target, full_check=True)
    assert run(target, np.float32([[1, 2]])).tolist() == [[4, 5]]


def test_a_number_that_both_kinds_of_nodes_use_stays_exact_where_it_counts(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "step"], ["angle"], "turn"),
        helper.make_node("Sin", ["angle"], ["sine"], "sine"),
        helper.make_node("Mul", ["sine", "step"], ["y"], "scale"),
    ]
    source = write(tmp_path / "m.onnx", nodes, {"step": np.float32(1.0009)})
    x = np.float32([[5000, 6000]])
    np.testing.assert_allclose(run(converted(source, "fp16"), x), run(source, x), atol=0.002)


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    weight = random(64, 64)
    weight[3, 3] = 70000
    source = write(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "big"], ["y"], "product")], {"big": weight})
    with pytest.raises(ExportError, match="big holds values beyond float16's 65504"):
        converted(source, "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_an_interrupted_write_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_tensors, "INLINE_BYTES", 1000)
    source = write(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], "p")], {"w": random(64, 64)})
    target = converted(source, "fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "fp16.onnx", "fp16.onnx_data"}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(onnx.checker, "check_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, PRECISIONS["fp16"])
    assert not target.exists()  # weights without a graph are nothing
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(onnx_tensors, "INLINE_BYTES", 10**6)
    converted(source, "fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "fp16.onnx"}
