# SPDX-License-Identifier: Apache-2.0
"""The custom operators mean what a plain loop over numpy arrays says, with either body."""

from typing import Any

import numpy as np
import onnx
import pytest
from decoder_runner import open_session
from hypothesis import given, settings
from hypothesis import strategies as st

from starkv.export.lower.ort import ort_functions
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, FULL_ATTENTION, KV_ATTENTION, OPSET, standard_functions

HEADS, KV_HEADS, DIM, CAPACITY = 4, 2, 8, 24


def one_node_model(function: onnx.FunctionProto, attributes: dict[str, int]) -> bytes:
    """A model that is one call of ``function``, with the names of its inputs and outputs."""
    dtypes = {"kv_len": onnx.TensorProto.INT32, "past_extent": onnx.TensorProto.INT8}
    ranks = {"past_k": 4, "past_v": 4, "present_k": 4, "present_v": 4, "kv_len": 1, "past_extent": 1}
    inputs, outputs = (
        [
            onnx.helper.make_tensor_value_info(
                name, dtypes.get(name, onnx.TensorProto.FLOAT), [None] * ranks.get(name, 3)
            )
            for name in names
        ]
        for names in (function.input, function.output)
    )
    node = onnx.helper.make_node(function.name, function.input, function.output, domain=DOMAIN, **attributes)
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION, "com.microsoft": 1}
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_node", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()],
        functions=[function],
        ir_version=10,
    )
    return model.SerializeToString()


BODIES = {"standard": standard_functions(), "onnxruntime": ort_functions()}
KV_SESSIONS = {
    name: open_session(
        one_node_model(functions[KV_ATTENTION], {"num_heads": HEADS, "kv_num_heads": KV_HEADS})
    )
    for name, functions in BODIES.items()
}


def softmax_attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """query [D], keys and values [n,D] → [D]."""
    scores = keys @ query / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


def kv_attention_by_loop(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    batch, new = feeds["q"].shape[:2]
    present = [feeds["past_k"].copy(), feeds["past_v"].copy()]
    out = np.zeros((batch, new, HEADS, DIM), np.float32)
    for b in range(batch):
        for s in range(new):
            row = feeds["kv_len"][b] + s
            for cache, fresh in zip(present, (feeds["k"], feeds["v"]), strict=True):
                cache[b, :, row] = fresh[b, s].reshape(KV_HEADS, DIM)
            for head in range(HEADS):
                shared = head // (HEADS // KV_HEADS)
                keys, values = (cache[b, shared, : row + 1] for cache in present)
                out[b, s, head] = softmax_attention(feeds["q"][b, s].reshape(HEADS, DIM)[head], keys, values)
    return [out.reshape(batch, new, HEADS * DIM), *present]


def random_feeds(new: int, lengths: list[int], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    batch = len(lengths)
    shapes = {
        "q": (batch, new, HEADS * DIM),
        "k": (batch, new, KV_HEADS * DIM),
        "v": (batch, new, KV_HEADS * DIM),
        "past_k": (batch, KV_HEADS, CAPACITY, DIM),
        "past_v": (batch, KV_HEADS, CAPACITY, DIM),
    }
    feeds: dict[str, Any] = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    return feeds | {"kv_len": np.array(lengths, np.int32), "past_extent": np.zeros(max(lengths), np.int8)}


def assert_kv_attention(body: str, feeds: dict[str, np.ndarray]) -> None:
    out, present_k, present_v = KV_SESSIONS[body].run(None, feeds)
    expected, expected_k, expected_v = kv_attention_by_loop(feeds)
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-6)
    for b, length in enumerate(feeds["kv_len"] + feeds["q"].shape[1]):
        np.testing.assert_array_equal(present_k[b, :, :length], expected_k[b, :, :length])
        np.testing.assert_array_equal(present_v[b, :, :length], expected_v[b, :, :length])


new_rows = st.integers(1, 8)
lengths = st.lists(st.integers(0, CAPACITY - 8), min_size=1, max_size=3)
seeds = st.integers(0, 99)


@given(new=new_rows, lengths=lengths, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_standard_body_takes_any_batch(new: int, lengths: list[int], seed: int) -> None:
    assert_kv_attention("standard", random_feeds(new, lengths, seed))


@given(new=new_rows, length=st.integers(0, CAPACITY - 8), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_onnxruntime_body_prefills_one_sequence(new: int, length: int, seed: int) -> None:
    assert_kv_attention("onnxruntime", random_feeds(new, [length], seed))


@given(lengths=lengths, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_onnxruntime_body_decodes_a_batch(lengths: list[int], seed: int) -> None:
    assert_kv_attention("onnxruntime", random_feeds(1, lengths, seed))


@pytest.mark.parametrize("body", BODIES)
def test_rows_behind_the_valid_ones_have_no_influence(body: str) -> None:
    feeds = random_feeds(1, [5], seed=0)
    clean = KV_SESSIONS[body].run(None, feeds)[0]
    for name in ("past_k", "past_v"):
        feeds[name][:, :, 6:] = 1e4
    np.testing.assert_array_equal(KV_SESSIONS[body].run(None, feeds)[0], clean)


@pytest.mark.parametrize("body", BODIES)
def test_full_attention_sees_every_token(body: str) -> None:
    session = open_session(one_node_model(BODIES[body][FULL_ATTENTION], {"num_heads": HEADS}))
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((1, 9, HEADS * DIM)).astype(np.float32) for name in "qkv"}
    (out,) = session.run(None, feeds)
    heads = {name: rows.reshape(9, HEADS, DIM) for name, rows in feeds.items()}
    for token in range(9):
        for head in range(HEADS):
            expected = softmax_attention(heads["q"][token, head], heads["k"][:, head], heads["v"][:, head])
            actual = out[0, token].reshape(HEADS, DIM)[head]
            np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("operator", [KV_ATTENTION, FULL_ATTENTION])
def test_both_bodies_have_one_signature(body: str, operator: str) -> None:
    definition, function = standard_functions()[operator], BODIES[body][operator]
    assert (function.input, function.output) == (definition.input, definition.output)
    assert function.attribute == definition.attribute
