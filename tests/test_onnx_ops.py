# SPDX-License-Identifier: Apache-2.0
"""The custom operators mean what a plain loop over numpy arrays says, with either body."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoder_runner import open_session
from hypothesis import given, settings
from hypothesis import strategies as st

from starkv.export.lower.ort_attention import lower_full_attention, lower_kv_attention
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, FULL_ATTENTION, KV_ATTENTION, OPSET, standard_functions

HEADS, KV_HEADS, DIM, CAPACITY = 4, 2, 8, 24


def one_node_model(function: onnx.FunctionProto, attributes: dict[str, int]) -> onnx.ModelProto:
    """A model that is one call of ``function``, with the names of its inputs and outputs.

    ``kv_len`` is that of a decoder with one layer: [1,B].
    """
    dtypes = {"kv_len": onnx.TensorProto.INT32, "past_extent": onnx.TensorProto.INT8}
    ranks = {"past_k": 4, "past_v": 4, "present_k": 4, "present_v": 4, "kv_len": 2, "past_extent": 1}
    inputs, outputs = (
        [
            onnx.helper.make_tensor_value_info(
                name, dtypes.get(name, onnx.TensorProto.FLOAT), [None] * ranks.get(name, 3)
            )
            for name in names
        ]
        for names in (function.input, function.output)
    )
    zero = onnx.numpy_helper.from_array(np.array(0, np.int64), "zero")
    names = ["layer_len" if name == "kv_len" else name for name in function.input]
    nodes = [onnx.helper.make_node(function.name, names, function.output, domain=DOMAIN, **attributes)]
    if names != list(function.input):
        nodes.insert(0, onnx.helper.make_node("Gather", ["kv_len", "zero"], ["layer_len"], axis=0))
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION, "com.microsoft": 1}
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "one_node", inputs, outputs, [zero]),
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()],
        functions=[function],
        ir_version=10,
    )


def lowered(model: onnx.ModelProto) -> bytes:
    """The model as ONNX Runtime gets it."""
    graph = ir.from_proto(model)
    lower_kv_attention(graph)
    lower_full_attention(graph)
    return ir.to_proto(graph).SerializeToString()


def sessions(operator: str, attributes: dict[str, int]) -> dict[str, ort.InferenceSession]:
    model = one_node_model(standard_functions()[operator], attributes)
    return {
        "standard": open_session(model.SerializeToString()),
        "onnxruntime": open_session(lowered(model)),
    }


KV_SESSIONS = sessions(KV_ATTENTION, {"num_heads": HEADS, "kv_num_heads": KV_HEADS})
BODIES = tuple(KV_SESSIONS)


def run_kv_attention(body: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    last_rows = feeds["kv_len"] + np.int32(feeds["q"].shape[1] - 1)
    feeds = feeds | {
        "kv_len": feeds["kv_len"][None],
        "last_rows": last_rows,
        "longest": np.array([last_rows.max() + 1], np.int32),
    }
    session = KV_SESSIONS[body]
    results: list[np.ndarray] = session.run(
        None, {entry.name: feeds[entry.name] for entry in session.get_inputs()}
    )
    return results


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
    out, present_k, present_v = run_kv_attention(body, feeds)
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
    clean = run_kv_attention(body, feeds)[0]
    for name in ("past_k", "past_v"):
        feeds[name][:, :, 6:] = 1e4
    np.testing.assert_array_equal(run_kv_attention(body, feeds)[0], clean)


@pytest.mark.parametrize("body", BODIES)
def test_full_attention_sees_every_token(body: str) -> None:
    session = sessions(FULL_ATTENTION, {"num_heads": HEADS})[body]
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((1, 9, HEADS * DIM)).astype(np.float32) for name in "qkv"}
    (out,) = session.run(None, feeds)
    heads = {name: rows.reshape(9, HEADS, DIM) for name, rows in feeds.items()}
    for token in range(9):
        for head in range(HEADS):
            expected = softmax_attention(heads["q"][token, head], heads["k"][:, head], heads["v"][:, head])
            actual = out[0, token].reshape(HEADS, DIM)[head]
            np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6)
