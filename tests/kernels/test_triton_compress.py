# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the PyTorch reference."""

from dataclasses import replace

import pytest
import torch
from compress_cases import CASES, check_implementation, check_in_place, on_device
from compress_prompts import Case
from compress_refusals import (
    SPOILS,
    assert_left_alone,
    check_refused,
    check_small_pool_refused,
    refusable_call,
)

from starkv.errors import UsageError
from starkv.kernels.triton_compress import compress


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trajectories_equal_the_reference(case: Case, device: torch.device) -> None:
    check_implementation(compress, case, device)


IN_PLACE = (
    "native",
    "dim_80_float32",
    "ragged_with_spare_rows",
    "nearly_all_rows",
    "all_rows",
    "native_bfloat16",
)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in IN_PLACE], ids=lambda case: case.name
)
def test_a_cache_can_be_compacted_into_itself(case: Case, device: torch.device) -> None:
    check_in_place(compress, case, device)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_sequence_that_cannot_be_compressed_is_left_alone(spoil: str, device: torch.device) -> None:
    check_refused(compress, spoil, device)


def test_a_slot_that_is_too_small_is_left_alone(device: torch.device) -> None:
    check_small_pool_refused(compress, device)


def test_layers_of_a_sequence_are_compressed_together_or_not_at_all(device: torch.device) -> None:
    call = refusable_call(device)
    call.kv_len[1, 0] = call.window
    result = compress(call)
    assert_left_alone(call, result, 0)
    assert (result.new_len[:, 1:] > 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_call_can_be_captured_in_a_graph(device: torch.device) -> None:
    """Launches depend on no data: a replay compresses what the tensors hold then."""
    first, second = refusable_call(device), refusable_call(device)
    second.k.copy_(second.k.flip(3))
    expected = compress(on_device(second, device))
    captured = on_device(first, device)
    compress(captured)  # Kernels are compiled outside of the capture.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compress(captured)
    captured.k.copy_(second.k)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result.rows, expected.rows)
    assert torch.equal(result.scores, expected.scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling_kernel": 4}, "must be odd"),
        ({"slot": torch.zeros(3, dtype=torch.int64)}, "slot must be"),
    ],
)
def test_refused_on_the_host(change: dict[str, object], message: str, device: torch.device) -> None:
    with pytest.raises(UsageError, match=message):
        compress(replace(refusable_call(device), **change))


def test_a_head_dim_without_kernels_is_refused(device: torch.device) -> None:
    call = refusable_call(device)
    narrow = {name: getattr(call, name)[..., :48].contiguous() for name in ("k", "v", "q_window")}
    narrow |= {name: getattr(call, name)[..., :48].contiguous() for name in ("dst_k", "dst_v")}
    with pytest.raises(UsageError, match="head dim 48"):
        compress(replace(call, **narrow))


def test_a_cache_compacted_half_in_place_is_refused(device: torch.device) -> None:
    call = refusable_call(device)
    with pytest.raises(UsageError, match="in place"):
        compress(replace(call, dst_k=call.k, dst_v=call.v.clone(), dst_meta=call.row_meta.clone()))
