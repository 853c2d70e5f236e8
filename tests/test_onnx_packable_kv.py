# SPDX-License-Identifier: Apache-2.0
"""Attention over floats or codes in one node means what the operator of either cache means, and leaves the
other cache alone."""

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from decoder_runner import open_session
from low_rank_cases import Arrays
from quantized_kv_cases import QuantizedCase, quantized_kv_attention, random_feeds

from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, OPSET
from starkv.onnx_packable_kv import PACKABLE_KV_ATTENTION, packable_kv_functions

FLOAT_ROWS = 20
CASES = {bits: QuantizedCase(bits) for bits in (8, 4)}


@cache
def session(case: QuantizedCase) -> ort.InferenceSession:
    functions = packable_kv_functions()
    function = functions[PACKABLE_KV_ATTENTION]
    node = onnx.helper.make_node(
        PACKABLE_KV_ATTENTION, function.input, function.output, domain=DOMAIN, **case.attributes
    )
    codes = onnx.TensorProto.INT8 if case.bits == 8 else onnx.TensorProto.UINT8
    types = dict.fromkeys(("kv_len", "positions"), onnx.TensorProto.INT32)
    types["past_extent"] = onnx.TensorProto.INT8
    ranks = {name: array.ndim for name, array in packable_feeds(case, [0], 1).items()}

    def declare(name: str) -> onnx.ValueInfoProto:
        element = codes if name.endswith("_codes") else types.get(name, onnx.TensorProto.FLOAT)
        rank = ranks.get(name, 3 if name == "out" else 4)
        return onnx.helper.make_tensor_value_info(name, element, [None] * rank)

    inputs, outputs = ([declare(name) for name in side] for side in (function.input, function.output))
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_node", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        functions=list(functions.values()),
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return open_session(model.SerializeToString())


def packable_feeds(case: QuantizedCase, lengths: list[int], new_tokens: int, code_rows: int = 1) -> Arrays:
    """Inputs of a call. Both caches hold something everywhere."""
    feeds = random_feeds(case, [0] * len(lengths), capacity=code_rows)
    random = np.random.default_rng(new_tokens)

    def normal(*size: int) -> np.ndarray:
        return random.standard_normal(size).astype(np.float32)

    feeds |= {f"past_{name}_codes": feeds[f"past_{name}"] for name in "kv"}
    floats = (len(lengths), case.kv_heads, FLOAT_ROWS, case.dim)
    tokens = (len(lengths), new_tokens)
    return feeds | {
        "q": normal(*tokens, case.heads * case.dim),
        **{name: normal(*tokens, case.kv_heads * case.dim) for name in "kv"},
        **{f"past_{name}": normal(*floats) for name in "kv"},
        "kv_len": np.array(lengths, np.int32),
        "past_extent": np.zeros(max(lengths), np.int8),
    }


def run(case: QuantizedCase, feeds: Arrays) -> Arrays:
    names = [entry.name for entry in session(case).get_outputs()]
    return dict(zip(names, session(case).run(None, feeds), strict=True))


@pytest.mark.parametrize("bits", CASES)
@pytest.mark.parametrize("new_tokens", [1, 5])
@pytest.mark.parametrize("lengths", [[0], [11], [3, 0, 9]], ids=str)
def test_without_a_cache_of_codes_floats_are_attended_to(
    bits: int, new_tokens: int, lengths: list[int]
) -> None:
    case = CASES[bits]
    feeds = packable_feeds(case, lengths, new_tokens)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    call = AttentionCall(*(tensors[name] for name in ("q", "k", "v", "past_k", "past_v", "kv_len")))
    out, present_k, present_v = reference_attention(call)
    found = run(case, feeds)
    np.testing.assert_allclose(found["out"], out, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(found["present_k"], present_k)
    np.testing.assert_array_equal(found["present_v"], present_v)
    for name in ("k_codes", "v_codes"):
        np.testing.assert_array_equal(found[f"present_{name}"], feeds[f"past_{name}"])


@pytest.mark.parametrize("bits", CASES)
@pytest.mark.parametrize("lengths", [[0], [11], [3, 0, 9]], ids=str)
def test_a_cache_of_codes_is_attended_to(bits: int, lengths: list[int]) -> None:
    case = CASES[bits]
    feeds = packable_feeds(case, lengths, 1, code_rows=12)
    over_codes = feeds | {f"past_{name}": feeds[f"past_{name}_codes"] for name in "kv"}
    out, codes_k, codes_v = quantized_kv_attention(case, over_codes)
    found = run(case, feeds)
    np.testing.assert_allclose(found["out"], out, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(found["present_k_codes"], codes_k)
    np.testing.assert_array_equal(found["present_v_codes"], codes_v)
    for name in "kv":
        np.testing.assert_array_equal(found[f"present_{name}"], feeds[f"past_{name}"])


@pytest.mark.parametrize("bits", CASES)
def test_a_cache_of_codes_takes_one_token(bits: int) -> None:
    case = CASES[bits]
    errors = ort.capi.onnxruntime_pybind11_state
    # Shapes in the body contradict each other; which node says so first is ONNX Runtime's choice.
    with pytest.raises((errors.InvalidArgument, errors.RuntimeException, errors.Fail), match="running"):
        run(case, packable_feeds(case, [3], 2, code_rows=12))
