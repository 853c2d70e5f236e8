# SPDX-License-Identifier: Apache-2.0
"""The key bias's part of the logits, as ONNX Runtime's dialect works it out, is what a plain loop says."""

import numpy as np
import onnx_ir as ir
import pytest
from decoder_runner import open_session
from low_rank_cases import POSITIONS, Arrays
from quantized_kv_cases import QuantizedCase, random_feeds, rotated_bias

from starkv.export.lower.branch import Branch
from starkv.export.lower.graph_edit import new_input
from starkv.export.lower.ort_key_bias import KeyBiasLogits
from starkv.export.lower.ort_packed_attention import PACKED

SIZES = [
    {},
    {"section": (8,)},
    {"heads": 14},
    {"kv_heads": 1, "heads": 3},
    {"kv_heads": 6},
]


def key_bias_model(case: QuantizedCase, biases: list[np.ndarray]) -> bytes:
    """Every layer's logits in a branch, as a decoder has them."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24, "com.microsoft": 1}, name="key_bias")
    q = new_input(graph, "q", ir.DataType.FLOAT, ["B", 1, case.heads * case.dim])
    new_input(graph, "longest", ir.DataType.INT32, [1])
    packed = new_input(graph, PACKED, ir.DataType.BOOL, [1])
    negated = ir.node("Not", [packed], name="Not")
    graph.append(negated)
    logits = KeyBiasLogits(ir.Model(graph, ir_version=10), len(biases), case.section)
    for layer, bias in enumerate(biases):
        branch, other = Branch(graph, f"layers.{layer}/packed"), Branch(graph, f"layers.{layer}/exact")
        found = logits.write(branch, layer, q, bias, case.heads)
        branches = {
            "then_branch": other.finish([other.op("Identity", q)], [ir.DataType.FLOAT]),
            "else_branch": branch.finish([found], [ir.DataType.FLOAT]),
        }
        either = ir.node("If", negated.outputs, branches, name=f"layers.{layer}/If")
        either.outputs[0].name, either.outputs[0].dtype = f"logits.{layer}", ir.DataType.FLOAT
        graph.append(either)
        graph.outputs.append(either.outputs[0])
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


def rope_tables(case: QuantizedCase, feeds: Arrays) -> Arrays:
    ends = np.cumsum(case.section)[:-1]
    cosines, sines = (np.split(feeds[name], ends, axis=-1) for name in ("cos_table", "sin_table"))
    return {
        f"rope_table.{component}": np.concatenate(parts, axis=-1) / np.float32(np.sqrt(case.dim))
        for component, parts in enumerate(zip(cosines, sines, strict=True))
    }


def expected_logits(case: QuantizedCase, feeds: Arrays, length: int, sequence: int) -> np.ndarray:
    """``[Hq, rows]`` of one sequence."""
    query = feeds["q"][sequence, 0].astype(np.float64).reshape(case.kv_heads, -1, case.dim)
    rows = [rotated_bias(case, feeds, at) for at in feeds["positions"][sequence, :length]]
    return np.einsum("hqd,rhd->hqr", query, rows).reshape(case.heads, -1) / np.sqrt(case.dim)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("lengths", [[1], [11], [3, 1, 9]], ids=str)
def test_logits_of_every_layer(sizes: dict[str, int], lengths: list[int]) -> None:
    """Behind a sequence's rows stand −1, or what an earlier sequence left."""
    case = QuantizedCase(8, **sizes)
    layers = [random_feeds(case, lengths, seed=seed) for seed in (0, 1)]
    biases = [feeds["k_bias"].reshape(case.kv_heads, case.dim) for feeds in layers]
    session = open_session(key_bias_model(case, biases))
    shared = {"q": layers[0]["q"], "longest": np.array([max(lengths)], np.int32), PACKED: np.array([True])}
    for layer, feeds in enumerate(layers):
        for sequence, length in enumerate(lengths):
            feeds["positions"][sequence, length:] = -1 if sequence % 2 else POSITIONS - 1
        shared[f"row_positions.{layer}"] = feeds["positions"]
    found = session.run(None, shared | rope_tables(case, layers[0]))
    for feeds, logits in zip(layers, found, strict=True):
        assert logits.shape == (len(lengths), case.heads, 1, max(lengths))
        for sequence, length in enumerate(lengths):
            expected = expected_logits(case, feeds | {"q": shared["q"]}, length, sequence)
            np.testing.assert_allclose(logits[sequence, :, 0, :length], expected, atol=1e-4)
            assert np.abs(expected).max() > 1
