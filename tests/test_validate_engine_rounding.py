# SPDX-License-Identifier: Apache-2.0
"""A reference that rounds as engines of 16 bits do: in the same places, and as much."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from tiny_families import make_tiny_opencua, make_tiny_qwen2_vl
from tiny_model import tiny_card

from starkv.cli.engine_rounding import rounding
from starkv.export.cards import load_card
from starkv.export.export_model import export_model
from starkv.export.lower.compute_dtype import MOVES
from starkv.export.lower.ort import lower_to_ort
from starkv.export.quantize.presets import PRESETS, load_preset
from starkv.manifest import ComputeDtype

GUI_TINY = Path(__file__).resolve().parent.parent / "models" / "gui-tiny"


@pytest.fixture(scope="module", params=["fp32", "int8", "int4", "qwen2_vl", "opencua"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gui-tiny in each preset, and the other families."""
    root = tmp_path_factory.mktemp(request.param)
    makers: dict[str, Any] = {"qwen2_vl": make_tiny_qwen2_vl, "opencua": make_tiny_opencua}
    if request.param in makers:
        makers[request.param](root / "checkpoint")
        export_model(root / "checkpoint", tiny_card(family=request.param), root / "export", PRESETS["fp32"])
    else:
        export_model(GUI_TINY, load_card("gui-tiny"), root / "export", load_preset(request.param))
    return root / "export"


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_what_computes_in_16_bits_is_rounded_and_nothing_else(
    exported: Path, graph: str, tmp_path: Path
) -> None:
    dtypes: tuple[ComputeDtype, ...] = ("float32", "float16")
    for dtype in dtypes:
        (tmp_path / dtype).mkdir()
        lower_to_ort(exported / f"{graph}.onnx", tmp_path / dtype / f"{graph}.onnx", dtype)
    narrow = {
        str(node.name).replace("MultiHeadAttention", "Attention")
        for node in ir.load(tmp_path / "float16" / f"{graph}.onnx").graph
        if node.outputs[0].dtype == ir.DataType.FLOAT16 and node.op_type not in MOVES | {"Cast"}
    }
    model = onnx.load(tmp_path / "float32" / f"{graph}.onnx", load_external_data=False)
    rounding("float16")(model.graph)
    rounded = {
        node.name.replace("MultiHeadAttention", "Attention")
        for node in model.graph.node
        if node.output[0].endswith(".exact")
    }
    assert narrow
    assert rounded == narrow


def product(rounded_to: ComputeDtype) -> np.ndarray:
    """π times 1 + 2^-9 in a graph of two nodes, rounded."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "y"], ["z"]), helper.make_node("Add", ["z", "x"], ["out"])],
        "product",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("z", "out")],
    )
    rounding(rounded_to)(graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(
        ["z", "out"], {"x": np.array([np.pi], np.float32), "y": np.array([1 + 2**-9], np.float32)}
    )
    return np.concatenate(found)


def test_inputs_and_results_are_rounded_but_not_residual_sums() -> None:
    half = np.float16(np.pi) * np.float16(1 + 2**-9)
    assert product("float16").tolist() == [np.float32(half), np.float32(half) + np.float32(np.pi)]
    # bfloat16 has 8 bits: π is 3.140625, and 1 + 2^-9 is 1.
    assert product("bfloat16").tolist() == [3.140625, np.float32(3.140625) + np.float32(np.pi)]
