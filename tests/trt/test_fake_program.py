# SPDX-License-Identifier: Apache-2.0
"""How the fake computes a graph: types, rounding, and what is computed only once."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_tensorrt.program import Program
from fake_tensorrt.shapes import ShapeError, ShapeModel
from fake_tensorrt.state import MisuseError
from onnx import TensorProto, helper
from small_engines import BF16, FLOAT, value


def program(nodes: list[Any], kinds: dict[str, int], constants: dict[str, Any], fold: bool = True) -> Program:
    inputs = [value(name, kind, 2) for name, kind in kinds.items()]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", FLOAT, 2)])
    return Program(graph, constants, 21, fold)


def no_plugin(*_: Any) -> Any:
    raise AssertionError


def test_operands_have_one_type() -> None:
    wrong = program([helper.make_node("Add", ["x", "w"], ["y"], name="n")], {"x": FLOAT, "w": BF16}, {})
    feeds = {"x": np.ones(2, np.float32), "w": np.ones(2, ml_dtypes.bfloat16)}
    with pytest.raises(MisuseError, match="strongly typed"):
        wrong.run(feeds, no_plugin)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_numbers_are_rounded_after_each_node(dtype: Any) -> None:
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"], name="plus"),
        helper.make_node("Sub", ["a", "w"], ["y"], name="minus"),
    ]
    feeds = {"x": np.array([1, 2], dtype), "w": np.array([4096, 4096], dtype)}
    (result,) = program(nodes, {"x": BF16, "w": BF16}, {}).run(feeds, no_plugin).values()
    assert result.dtype == dtype
    # 4097 is no number of 16 bits; float32 would keep the 1.
    assert result[0] == 0


def test_weights_of_4_bits_are_dequantized_in_blocks_and_once() -> None:
    codes = np.array([[1, 2], [3, 4], [5, 6], [7, -8]], np.int8)
    scales = np.array([[1, 10], [0.5, 2]], np.float16)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="d", axis=0, block_size=2),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="m"),
    ]
    quantized = program(nodes, {"x": TensorProto.FLOAT16}, {"q": codes, "s": scales})
    feeds = {"x": np.eye(4, dtype=np.float16)}
    for _ in range(2):
        (result,) = quantized.run(feeds, no_plugin).values()
        assert result.tolist() == [[1, 20], [3, 40], [2.5, 12], [3.5, -16]]
    assert list(quantized._folded) == ["w"]
    quantized.replace({"s": scales * 2})
    (result,) = quantized.run(feeds, no_plugin).values()
    assert result.tolist() == [[2, 40], [6, 80], [5, 24], [7, -32]]


def test_outputs_of_unknown_plugins_have_no_shape() -> None:
    node = helper.make_node("Other", ["x"], ["y"], name="o", domain="ai.starkv")
    for size, known in (("N", True), ("M", False)):
        graph = helper.make_graph([node], "g", [value("x", FLOAT, "N")], [value("y", FLOAT, size)])
        model = ShapeModel(graph, {}, 21)
        if known:
            assert model.outputs({"x": (3,)}) == {"y": (3,)}
        else:
            with pytest.raises(ShapeError, match="the shape of y can't be told"):
                model.outputs({"x": (3,)})


def test_casts_round() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], name="c", to=TensorProto.BFLOAT16)
    (result,) = program([node], {"x": FLOAT}, {}).run({"x": np.float32([1, 257])}, no_plugin).values()
    assert result.dtype == ml_dtypes.bfloat16
    assert result.astype(np.float32).tolist() == [1, 256]
