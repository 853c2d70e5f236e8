# SPDX-License-Identifier: Apache-2.0
"""Packed low-rank decode attention means what a plain loop says."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoder_runner import open_session
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank_cases import low_rank_attention, random_case
from low_rank_session import GQA, SHAPES, STORAGES, model_of, run, session, shape_of

from starkv.errors import UsageError
from starkv.onnx_low_rank_shape import LaneStorage, LowRankShape


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
