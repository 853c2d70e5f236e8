# SPDX-License-Identifier: Apache-2.0
"""Packed low-rank decode attention means what a plain loop says, and what was recorded."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoder_runner import open_session
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank_cases import Arrays, low_rank_attention, random_case
from recordings import recordings

from starkv.errors import UsageError
from starkv.export.lower.low_rank_attention import low_rank_node, stacked_key_factors
from starkv.onnx_low_rank import OUTPUTS, low_rank_function, low_rank_inputs
from starkv.onnx_low_rank_shape import LaneStorage, LowRankShape
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, OPSET

_TYPES = {
    "k_codes": {"int4": onnx.TensorProto.UINT8, "int8": onnx.TensorProto.INT8},
    "v_codes": {"int4": onnx.TensorProto.UINT8, "int8": onnx.TensorProto.INT8},
}
_INTEGERS = ("packed_len", "positions", "tail_len")
_RANKS = {"packed_len": 1, "tail_len": 1, "k_bias": 1, "v_bias": 1, "up_k": 2, "up_v": 2, "cos_table": 2} | {
    "sin_table": 2,
    "k_scales": 4,
    "tail_k": 4,
    "tail_v": 4,
    "present_tail_k": 4,
    "present_tail_v": 4,
}


def model_of(shape: LowRankShape, scales: int = onnx.TensorProto.FLOAT) -> bytes:
    """A model that is one call of the operator, with scales of this type."""
    function = low_rank_function(shape)

    def declare(name: str) -> onnx.ValueInfoProto:
        element = _TYPES.get(name, {}).get(shape.storage, onnx.TensorProto.FLOAT)
        if name in _INTEGERS:
            element = onnx.TensorProto.INT32
        if name in ("k_scales", "v_scales"):
            element = scales
        return onnx.helper.make_tensor_value_info(name, element, [None] * _RANKS.get(name, 3))

    node = onnx.helper.make_node(function.name, function.input, function.output, domain=DOMAIN)
    graph = onnx.helper.make_graph(
        [node], "one_node", [declare(name) for name in function.input], [declare(name) for name in OUTPUTS]
    )
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@cache
def session(shape: LowRankShape) -> ort.InferenceSession:
    return open_session(model_of(shape))


def run(shape: LowRankShape, feeds: Arrays) -> list[np.ndarray]:
    return session(shape).run(None, feeds)


GQA = {"heads": 14, "kv_heads": 2, "head_dim": 8, "key_ranks": (5, 8), "value_rank": 13}
SHAPES = {
    "one key factor per head, 7 queries each": GQA,
    "no grouping of queries": GQA | {"heads": 2},
    "one key factor for both heads": GQA | {"key_ranks": (11,)},
    "two heads to a factor, ranks over a tile": {
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 16,
        "key_ranks": (17, 32),
        "value_rank": 50,
    },
    "ranks too small for outliers": GQA | {"key_ranks": (1, 4), "value_rank": 3},
    "full ranks": {"heads": 4, "kv_heads": 2, "head_dim": 16, "key_ranks": (16, 16), "value_rank": 32},
}
STORAGES: tuple[LaneStorage, ...] = ("int4", "int8", "float")


def shape_of(name: str, storage: LaneStorage, *, sections: bool = True) -> LowRankShape:
    sizes = SHAPES[name]
    half = sizes["head_dim"] // 2
    section = (1, half // 2, half - half // 2 - 1) if sections else (half,)
    return LowRankShape(**sizes, mrope_section=section, storage=storage)


def assert_case(shape: LowRankShape, packed: list[int], tail: list[int], **options: object) -> None:
    feeds, keys, values = random_case(shape, packed, tail, **options)
    expected, tail_k, tail_v = low_rank_attention(shape, feeds, keys, values)
    out, present_k, present_v = run(shape, feeds)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(present_k, tail_k)
    np.testing.assert_array_equal(present_v, tail_v)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, storage: LaneStorage) -> None:
    assert_case(shape_of(name, storage), packed=[9, 3, 0], tail=[0, 5, 2])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("packed", "tail"), [([0], [0]), ([0, 0], [5, 1]), ([9], [0]), ([1], [5])], ids=str)
def test_lengths(packed: list[int], tail: list[int], storage: LaneStorage) -> None:
    assert_case(shape_of("one key factor per head, 7 queries each", storage), packed, tail)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sections", [True, False], ids=["three components", "one component"])
def test_bias_and_positions(bias: bool, sections: bool) -> None:
    shape = shape_of("one key factor for both heads", "int8", sections=sections)
    assert_case(shape, [4, 9], [3, 0], bias=bias)


@given(
    ranks=st.lists(st.integers(1, 40), min_size=2, max_size=2).map(tuple),
    value_rank=st.integers(1, 80),
    storage=st.sampled_from(STORAGES),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_ranks(ranks: tuple[int, ...], value_rank: int, storage: LaneStorage, seed: int) -> None:
    shape = LowRankShape(4, 2, 40, ranks, value_rank, (4, 8, 8), storage)
    assert_case(shape, [5, 2], [1, 4], seed=seed)


def test_no_packed_rows_at_all() -> None:
    """The least capacity there is, as long as nothing is packed."""
    shape = shape_of("one key factor per head, 7 queries each", "int4")
    assert_case(shape, [0, 0], [2, 5], capacity=1)


def test_rows_not_in_use_are_never_seen() -> None:
    shape = shape_of("one key factor per head, 7 queries each", "float")
    feeds, keys, values = random_case(shape, [9, 3], [5, 1])
    expected, *_ = low_rank_attention(shape, feeds, keys, values)
    for name in ("k_latent", "v_latent"):
        feeds[name] = feeds[name].copy()
        feeds[name][1, 3:] = 1e30
    for name in ("tail_k", "tail_v"):
        feeds[name][1, :, 2:] = 1e30
    np.testing.assert_allclose(run(shape, feeds)[0], expected, rtol=0, atol=1e-5)


def test_scales_may_be_bfloat16() -> None:
    shape = shape_of("one key factor per head, 7 queries each", "int4")
    feeds, _, _ = random_case(shape, [9, 3], [0, 2])
    expected = run(shape, feeds)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name in ("k_scales", "v_scales"):
        upper_half = (feeds[name].view(np.uint32) >> 16).astype(np.uint16)
        values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(upper_half, onnx.TensorProto.BFLOAT16)
    half = open_session(model_of(shape, scales=onnx.TensorProto.BFLOAT16))
    for ours, theirs in zip(half.run_with_ort_values(None, values), expected, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_tail_is_written_in_place() -> None:
    shape = shape_of("one key factor per head, 7 queries each", "float")
    feeds, keys, values = random_case(shape, [9, 3], [0, 2])
    _, tail_k, _ = low_rank_attention(shape, feeds, keys, values)
    memory = {name: ort.OrtValue.ortvalue_from_numpy(feeds[name].copy()) for name in ("tail_k", "tail_v")}
    binding = session(shape).io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, memory.get(name) or ort.OrtValue.ortvalue_from_numpy(array))
    binding.bind_output("out")
    for name, value in memory.items():
        binding.bind_ortvalue_output(f"present_{name}", value)
    session(shape).run_with_iobinding(binding)
    np.testing.assert_array_equal(memory["tail_k"].numpy(), tail_k)


@pytest.mark.parametrize(
    "changed",
    [
        {"key_ranks": (5, 8, 3)},
        {"key_ranks": (5, 9)},
        {"key_ranks": (0, 8)},
        {"value_rank": 17},
        {"mrope_section": (1, 3)},
        {"mrope_section": (1, 1, 1)},
        {"heads": 13},
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(changed: dict[str, object]) -> None:
    fitting = {**GQA, "mrope_section": (1, 1, 2), "storage": "int4"}
    LowRankShape(**fitting)
    with pytest.raises(UsageError, match=next(iter(changed))):
        LowRankShape(**fitting | changed)


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


def recorded_feeds(heads: Arrays) -> Arrays:
    """Inputs of one sequence, all but the packed rows. The new row's key and value are zero."""
    ranks = heads["ranks"].tolist()
    shape = recorded_shape(heads, "float")
    factors = np.split(heads["Uk"], np.cumsum(ranks)[:-1], axis=1)
    angles = np.arange(heads["pos"].max() + 1)[:, None] * heads["inv_freq"]
    row = np.zeros((1, 1, 4 * 128), np.float32)
    tail = np.zeros((1, 4, 1, 128), np.float32)
    return {
        "q": heads["q_rot"].reshape(1, 1, -1),
        "k": row,
        "v": row,
        "packed_len": np.array([heads["pos"].shape[1]], np.int32),
        "positions": heads["pos"].T[None],
        "tail_k": tail,
        "tail_v": tail,
        "tail_len": np.zeros(1, np.int32),
        "up_k": stacked_key_factors(shape, factors),
        "k_bias": heads["bk"].reshape(-1),
        "up_v": heads["Uv"],
        "v_bias": heads["bv"],
        "cos_table": np.cos(angles).astype(np.float32),
        "sin_table": np.sin(angles).astype(np.float32),
    }


def recorded_shape(heads: Arrays, storage: LaneStorage) -> LowRankShape:
    ranks = tuple(heads["ranks"].tolist())
    return LowRankShape(28, 4, 128, ranks, heads["cv"].shape[1], (16, 24, 24), storage)


def assert_recorded(shape: LowRankShape, feeds: Arrays, recorded: Arrays) -> None:
    """The new row scores 0 and adds nothing, so it takes a known share of the weights and that is all."""
    exponents = np.exp(recorded["logits"]).sum(axis=1, keepdims=True)
    expected = recorded["heads"] * (exponents / (exponents + 1))
    out = run(shape, feeds)[0].reshape(28, 128)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def load(path: Path) -> Arrays:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.parametrize("path", recordings("lowrank", "09b*.npz"), ids=lambda path: path.stem)
def test_recorded_latents(path: Path) -> None:
    heads = load(path)
    shape = recorded_shape(heads, "float")
    keys = np.zeros((1, 96, sum(shape.key_widths)), np.float32)
    parts = np.split(heads["ck"], np.cumsum(shape.key_ranks)[:-1], axis=1)
    for offset, part in zip(shape.key_offsets, parts, strict=True):
        keys[0, :, offset : offset + part.shape[1]] = part
    feeds = recorded_feeds(heads) | {"k_latent": keys, "v_latent": heads["cv"][None]}
    assert_recorded(shape, feeds, heads)


@pytest.mark.parametrize("path", recordings("lowrank", "11*.npz"), ids=lambda path: path.stem)
def test_recorded_packed_rows(path: Path) -> None:
    heads, packed = load(next(path.parent.glob("09b*.npz"))), load(path)
    stored = {
        "k_codes": packed["k_bytes"][None],
        "k_scales": packed["k_scales"][None],
        "v_codes": packed["v_bytes"][None],
        "v_scales": packed["v_scales"][None],
    }
    assert_recorded(recorded_shape(heads, "int4"), recorded_feeds(heads) | stored, packed)
