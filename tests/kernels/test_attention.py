# SPDX-License-Identifier: Apache-2.0
"""``KVAttention``'s kernels against the PyTorch reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.kernels.c_abi import KernelError
from starkv.kernels.cuda_library import KernelLibrary

DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of a number that is rounded to the type."""


def make_call(
    device: torch.device,
    held: list[int],
    capacity: int,
    tokens: int = 1,
    heads: int = 4,
    groups: int = 2,
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> AttentionCall:
    """Random tensors with a few rows that stand out; behind the held rows lies what is no number."""
    generator = torch.Generator().manual_seed(dim + tokens + capacity)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    past_k, past_v = (random(len(held), groups, capacity, dim) for _ in range(2))
    for sequence, rows in enumerate(held):
        past_k[sequence, :, max(rows, 0) :] = torch.nan
        past_v[sequence, :, max(rows, 0) :] = torch.nan
    tensors = {
        "q": 2 * random(len(held), tokens, heads * dim),
        "k": random(len(held), tokens, groups * dim),
        "v": random(len(held), tokens, groups * dim),
        "past_k": past_k,
        "past_v": past_v,
    }
    kv_len = torch.tensor(held, dtype=torch.int32, device=device)
    return AttentionCall(**{name: t.to(device, dtype) for name, t in tensors.items()}, kv_len=kv_len)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """NaN equals NaN."""
    assert torch.equal(actual.view(torch.int16), expected.view(torch.int16))


def check(kernels: KernelLibrary, call: AttentionCall, in_place: bool = True) -> Tensor:
    """One call against the reference; its output.

    Weights and output are each rounded to 16 bits: a value's share of the output is off by at most that part
    of itself twice, whatever its sign. Sums are float32 and add little.
    """
    expected, present_k, present_v = reference_attention(call)
    magnitudes, _, _ = reference_attention(replace(call, v=call.v.abs(), past_v=call.past_v.abs()))
    past_k, past_v = call.past_k.clone(), call.past_v.clone()
    own = replace(call, past_k=past_k, past_v=past_v)
    out, *caches = kernels.attention(own, in_place=in_place)
    bound = (2 * ROUNDING[call.q.dtype] + 1e-4) * magnitudes
    excess = (out.float() - expected).abs() - bound
    assert bool((excess <= 0).all()), f"off by {excess.nan_to_num(torch.inf).max():.2e} too much"
    assert_same_bits(caches[0], present_k)
    assert_same_bits(caches[1], present_v)
    if not in_place:
        assert_same_bits(past_k, call.past_k)
        assert_same_bits(past_v, call.past_v)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_decode(kernels: KernelLibrary, device: torch.device, dim: int, dtype: torch.dtype) -> None:
    """Ragged lengths: none, within a tile, at the borders of tiles and splits, and a full cache."""
    held = [0, 7, 15, 16, 64, 299]
    check(kernels, make_call(device, held, 300, heads=7, groups=1, dim=dim, dtype=dtype))


@pytest.mark.parametrize("sharing", [1, 4, 8, 16, 20, 33])
def test_decode_with_any_number_of_heads(kernels: KernelLibrary, device: torch.device, sharing: int) -> None:
    check(kernels, make_call(device, [40, 129], 140, heads=2 * sharing, groups=2))


@pytest.mark.parametrize("dim", [64, 256])
def test_decode_with_more_rows_than_one_step_of_a_block(
    kernels: KernelLibrary, device: torch.device, dim: int
) -> None:
    """So many KV heads that their blocks take several steps."""
    held = [0, 500, -1, 1023, 3, -1, 800, 64]
    check(kernels, make_call(device, held, 1024, heads=16, groups=16, dim=dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_prefill(kernels: KernelLibrary, device: torch.device, dim: int, dtype: torch.dtype) -> None:
    """Two blocks of queries; without history, and with one that is no multiple of a tile."""
    check(kernels, make_call(device, [0, 77], 230, tokens=150, heads=2, groups=1, dim=dim, dtype=dtype))


@pytest.mark.parametrize("tokens", [2, 15, 63, 64, 65, 127, 128, 129])
def test_prefill_of_any_length(kernels: KernelLibrary, device: torch.device, tokens: int) -> None:
    check(kernels, make_call(device, [0, 50, 62, 63, 64], tokens + 64, tokens=tokens, heads=1, groups=1))


@pytest.mark.parametrize("sharing", [1, 3])
def test_prefill_with_shared_heads(kernels: KernelLibrary, device: torch.device, sharing: int) -> None:
    check(kernels, make_call(device, [3], 80, tokens=70, heads=2 * sharing, groups=2))


@pytest.mark.parametrize("tokens", [1, 20])
def test_past_and_present_apart(kernels: KernelLibrary, device: torch.device, tokens: int) -> None:
    check(kernels, make_call(device, [5, 100], 128, tokens=tokens), in_place=False)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_sequence_that_its_cache_cannot_hold_is_left_alone(
    kernels: KernelLibrary, device: torch.device, tokens: int
) -> None:
    held = [-1, 90, 101 - tokens, 100, 2**31 - 1, -(2**31), 100 - tokens]
    out = check(kernels, make_call(device, held, 100, tokens=tokens))
    assert [row for row in range(len(held)) if out[row].any()] == ([1, 6] if tokens == 1 else [6])


def test_more_tokens_than_capacity(kernels: KernelLibrary, device: torch.device) -> None:
    assert not check(kernels, make_call(device, [0], 10, tokens=11)).any()


@pytest.mark.parametrize("tokens", [1, 70])
def test_what_is_no_number_shows(kernels: KernelLibrary, device: torch.device, tokens: int) -> None:
    """A broken key that a query sees makes its output NaN instead of a plausible number."""
    call = make_call(device, [30], 128, tokens=tokens, heads=1, groups=1)
    call.past_k[0, 0, 17, 3] = torch.nan
    out, _, _ = kernels.attention(call)
    assert out.isnan().all()


@pytest.mark.parametrize("schedule", ["reverse", "shuffle"])
@pytest.mark.parametrize("tokens", [1, 140])
def test_the_order_of_threads_changes_nothing(
    kernels: KernelLibrary,
    device: torch.device,
    tokens: int,
    schedule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU device, which is told to run threads in another order: a missing barrier would show."""
    call = make_call(device, [0, 90], 300, tokens=tokens, heads=3, groups=1, dim=80)
    first = check(kernels, call)
    monkeypatch.setenv("STARKV_CPU_SCHEDULE", schedule)
    assert_same_bits(check(kernels, call), first)


def test_what_cannot_be_is_refused(kernels: KernelLibrary, device: torch.device) -> None:
    with pytest.raises(KernelError, match="STARKV_ERROR_HEAD_DIM"):
        kernels.attention(make_call(device, [3], 16, dim=72))
    with pytest.raises(KernelError, match="STARKV_ERROR_HEADS"):
        kernels.attention(make_call(device, [3], 16, heads=65, groups=65))
    call = make_call(device, [3], 16)
    with pytest.raises(KernelError, match="STARKV_ERROR_OVERLAP"):
        kernels.attention(replace(call, past_v=call.past_k))
