# SPDX-License-Identifier: Apache-2.0
"""Calls of ``LowRankKVAttention`` in a graph of onnx_ir."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoder_runner import open_session
from low_rank_cases import low_rank_attention, random_case
from low_rank_session import model_of, shape_of

from starkv.export.lower.low_rank_attention import low_rank_node, stacked_key_factors
from starkv.onnx_low_rank import low_rank_inputs


def test_two_layers_of_one_shape_share_a_definition_and_branches_may_call_it() -> None:
    """Two calls, one in the graph and one in a branch of If: the tail of one is the tail of the other."""
    shape = shape_of("two heads to a factor, ranks over a tile", "int8")
    feeds, keys, values = random_case(shape, [4], [1])
    model = ir.from_proto(onnx.load_from_string(model_of(shape)))
    first = model.graph[0]
    inputs = dict(zip(low_rank_inputs(shape), first.inputs, strict=True))
    call = low_rank_node(model, shape, inputs, "again")
    kept = ir.node("Identity", [first.outputs[0]], name="kept")
    kept.outputs[0].name, kept.outputs[0].dtype = "kept.0", ir.DataType.FLOAT
    packed = ir.Value(name="packed", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    branches = {
        "then_branch": ir.Graph([], [call.outputs[0]], nodes=[call], name="then"),
        "else_branch": ir.Graph([], [kept.outputs[0]], nodes=[kept], name="else"),
    }
    choice = ir.node("If", [packed], branches, name="choice")
    choice.outputs[0].name, choice.outputs[0].dtype = "chosen", ir.DataType.FLOAT
    model.graph.append(choice)
    model.graph.inputs.append(packed)
    model.graph.outputs.append(choice.outputs[0])
    assert len(model.functions) == 1
    stepped = open_session(ir.to_proto(model).SerializeToString())
    expected, *_ = low_rank_attention(shape, feeds, keys, values)
    for branch in (True, False):
        chosen = stepped.run(["chosen"], feeds | {"packed": np.array(branch)})[0]
        np.testing.assert_allclose(chosen, expected, rtol=0, atol=1e-5)


def test_missing_input_is_named() -> None:
    shape = shape_of("full ranks", "float")
    model = ir.from_proto(onnx.load_from_string(model_of(shape)))
    inputs = dict(zip(low_rank_inputs(shape), model.graph[0].inputs, strict=True))
    del inputs["up_k"]
    with pytest.raises(ValueError, match="up_k"):
        low_rank_node(model, shape, inputs, "call")


def test_key_factors_of_other_shapes_are_refused() -> None:
    shape = shape_of("full ranks", "float")
    with pytest.raises(ValueError, match="key factors"):
        stacked_key_factors(shape, [np.zeros((16, 16), np.float32), np.zeros((16, 15), np.float32)])
