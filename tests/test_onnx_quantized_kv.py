# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a quantized cache means what a plain loop says, and what ONNX Runtime's own operator
says where its cache may be quantized."""

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoder_runner import open_session
from low_rank_cases import Arrays
from quantized_kv_cases import QuantizedCase, quantized_kv_attention, random_feeds, rotated_bias

from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, OPSET
from starkv.onnx_quantized_kv import QUANTIZED_KV_ATTENTION, quantized_kv_function

OUTPUTS = ("out", "present_k", "present_v")
FLOAT, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32


def one_node_model(
    node: onnx.NodeProto, feeds: Arrays, cache_type: int, functions: list[onnx.FunctionProto]
) -> bytes:
    types = {"kv_len": INT32, "positions": INT32, "last_row": INT32, "longest": INT32}
    caches = dict.fromkeys(("past_k", "past_v", "present_k", "present_v"), cache_type)

    def declare(name: str, rank: int) -> onnx.ValueInfoProto:
        element = (types | caches).get(name, FLOAT)
        return onnx.helper.make_tensor_value_info(name, element, [None] * rank)

    inputs = [declare(name, feeds[name].ndim) for name in node.input if name]
    outputs = [declare(name, rank) for name, rank in zip(OUTPUTS, (3, 4, 4), strict=True)]
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION, "com.microsoft": 1}
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_node", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()],
        functions=functions,
        ir_version=10,
    )
    return model.SerializeToString()


def cache_type(case: QuantizedCase) -> int:
    return onnx.TensorProto.INT8 if case.bits == 8 else onnx.TensorProto.UINT8


@cache
def session(case: QuantizedCase) -> ort.InferenceSession:
    function = quantized_kv_function()
    node = onnx.helper.make_node(
        QUANTIZED_KV_ATTENTION, function.input, OUTPUTS, domain=DOMAIN, **case.attributes
    )
    return open_session(one_node_model(node, random_feeds(case, [0]), cache_type(case), [function]))


def run(case: QuantizedCase, feeds: Arrays) -> list[np.ndarray]:
    return session(case).run(None, feeds)


def assert_equals_loop(case: QuantizedCase, feeds: Arrays) -> None:
    expected, present_k, present_v = quantized_kv_attention(case, feeds)
    out, ours_k, ours_v = run(case, feeds)
    np.testing.assert_array_equal(ours_k, present_k)
    np.testing.assert_array_equal(ours_v, present_v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lengths", [[0], [11], [3, 0, 9]], ids=str)
def test_lengths(bits: int, lengths: list[int]) -> None:
    case = QuantizedCase(bits)
    assert_equals_loop(case, random_feeds(case, lengths))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "sizes",
    [{"heads": 14}, {"heads": 2}, {"section": (8,)}, {"section": (0, 8, 0)}, {"kv_heads": 1, "heads": 3}],
    ids=str,
)
def test_heads_and_sections(bits: int, sizes: dict[str, int]) -> None:
    case = QuantizedCase(bits, **sizes)
    assert_equals_loop(case, random_feeds(case, [5, 2], seed=1))


@pytest.mark.parametrize("bits", [8, 4])
def test_without_bias(bits: int) -> None:
    case = QuantizedCase(bits)
    assert_equals_loop(case, random_feeds(case, [5, 2], bias=False))


@pytest.mark.parametrize("bits", [8, 4])
def test_values_out_of_range_saturate(bits: int) -> None:
    case = QuantizedCase(bits)
    feeds = random_feeds(case, [1])
    feeds["v"] = np.where(np.arange(feeds["v"].size) % 2, np.float32(1e6), np.float32(-1e6))[None, None]
    assert_equals_loop(case, feeds)


@cache
def group_query_attention(case: QuantizedCase) -> ort.InferenceSession | None:
    """ONNX Runtime's operator with a quantized cache; None where this version has none."""
    inputs = ["q", "k", "v", "past_k", "past_v", "last_row", "longest"]
    inputs += ["", "", "", "bias_scores", "", "k_scale", "v_scale"]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        inputs,
        OUTPUTS,
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        do_rotary=0,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=case.bits,
    )
    feeds = without_bias(case, random_feeds(case, [0]))
    try:
        return open_session(one_node_model(node, feeds, cache_type(case), []))
    except (ort.capi.onnxruntime_pybind11_state.Fail, ort.capi.onnxruntime_pybind11_state.InvalidGraph):
        return None


def without_bias(case: QuantizedCase, feeds: Arrays) -> Arrays:
    """The same step for an operator that knows no bias: shares taken out, and given as scores."""
    heads = (case.kv_heads, case.dim)
    rows = int(feeds["kv_len"].max()) + 1
    scores = np.zeros((len(feeds["q"]), case.heads, 1, rows), np.float32)
    k = feeds["k"].copy()
    for b, length in enumerate(feeds["kv_len"].tolist()):
        new_bias = rotated_bias(case, feeds, feeds["positions"][b, length])
        k[b, 0] = (k[b, 0].reshape(heads) - new_bias.astype(np.float32)).reshape(-1)
        for row in range(length + 1):
            bias = rotated_bias(case, feeds, feeds["positions"][b, row])
            query = feeds["q"][b, 0].reshape(case.kv_heads, -1, case.dim)
            scores[b, :, 0, row] = np.einsum("hqd,hd->hq", query, bias).reshape(-1) / np.sqrt(case.dim)
    return feeds | {
        "k": k,
        "v": feeds["v"] - feeds["v_bias"],
        "bias_scores": scores,
        "last_row": feeds["kv_len"],
        "longest": np.array([rows], np.int32),
    }


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lengths", [[0], [11], [3, 0, 9]], ids=str)
def test_group_query_attention_says_the_same(bits: int, lengths: list[int]) -> None:
    case = QuantizedCase(bits, heads=14, dim=32, section=(4, 6, 6))
    theirs = group_query_attention(case)
    if theirs is None:
        pytest.skip(f"ONNX Runtime {ort.__version__} knows no quantized KV cache")
    feeds = random_feeds(case, lengths, seed=2)
    plain = without_bias(case, feeds)
    expected, present_k, present_v = theirs.run(
        None, {entry.name: plain[entry.name] for entry in theirs.get_inputs()}
    )
    out, ours_k, ours_v = run(case, feeds)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(ours_k[b, :, : length + 1], present_k[b, :, : length + 1])
        np.testing.assert_array_equal(ours_v[b, :, : length + 1], present_v[b, :, : length + 1])
    v_bias = feeds["v_bias"].reshape(case.kv_heads, 1, case.dim)
    with_bias = expected.reshape(len(lengths), case.kv_heads, -1, case.dim) + v_bias
    np.testing.assert_allclose(out, with_bias.reshape(out.shape), rtol=0, atol=2e-5)
