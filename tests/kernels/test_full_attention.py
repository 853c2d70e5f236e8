# SPDX-License-Identifier: Apache-2.0
"""``FullAttention``'s kernel against the PyTorch reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from starkv.kernels.c_abi import FULL_ATTENTION_HEAD_DIMS, FullAttentionShape, KernelError
from starkv.kernels.cuda_library import KernelLibrary
from starkv.kernels.full_attention_call import FullAttentionCall, reference_full_attention

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of a number that is rounded to the type."""


def make_call(
    device: torch.device,
    tokens: int,
    sequences: int = 1,
    heads: int = 2,
    dim: int = 80,
    dtype: torch.dtype = torch.bfloat16,
) -> FullAttentionCall:
    generator = torch.Generator().manual_seed(tokens + dim)
    q, k, v = (torch.randn(sequences, tokens, heads * dim, generator=generator) for _ in range(3))
    return FullAttentionCall(*(tensor.to(device, dtype) for tensor in (2 * q, k, v)), heads)


def check(kernels: KernelLibrary, call: FullAttentionCall) -> Tensor:
    """One call against the reference; its output. Weights and output are each rounded to 16 bits."""
    expected = reference_full_attention(call)
    magnitudes = reference_full_attention(replace(call, v=call.v.abs()))
    out = kernels.full_attention(call)
    bound = (2 * ROUNDING[call.q.dtype] + 1e-4) * magnitudes
    excess = (out.float() - expected).abs() - bound
    assert bool((excess <= 0).all()), f"off by {excess.nan_to_num(torch.inf).max():.2e} too much"
    return out


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("dim", FULL_ATTENTION_HEAD_DIMS)
def test_every_head_dim(kernels: KernelLibrary, device: torch.device, dim: int, dtype: torch.dtype) -> None:
    """More than one block of queries, and a last tile that is not full."""
    check(kernels, make_call(device, 150, dim=dim, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300])
def test_any_number_of_tokens(kernels: KernelLibrary, device: torch.device, tokens: int) -> None:
    check(kernels, make_call(device, tokens, sequences=2, heads=3, dim=64))


@pytest.mark.parametrize("schedule", ["reverse", "shuffle"])
def test_the_order_of_threads_changes_nothing(
    kernels: KernelLibrary, device: torch.device, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(device, 140)
    first = check(kernels, call)
    monkeypatch.setenv("STARKV_CPU_SCHEDULE", schedule)
    assert torch.equal(check(kernels, call), first)


def test_what_is_no_number_shows(kernels: KernelLibrary, device: torch.device) -> None:
    """A broken key makes the whole head's output NaN, and only that head's."""
    call = make_call(device, 90)
    call.k[0, 89, 3] = torch.nan
    out = kernels.full_attention(call)
    assert out[..., :80].isnan().all()
    assert not out[..., 80:].isnan().any()


def test_what_cannot_be_is_refused(kernels: KernelLibrary, device: torch.device) -> None:
    with pytest.raises(KernelError, match="STARKV_ERROR_HEAD_DIM"):
        kernels.full_attention(make_call(device, 4, dim=72))
    shape = FullAttentionShape(sequences=1, tokens=4, heads=2, head_dim=64, dtype=1)
    assert kernels.abi.workspace_bytes(shape) == 0
    with pytest.raises(KernelError, match="STARKV_ERROR_NULL_POINTER"):
        kernels.abi.full_attention(shape, 0, 16, 32, 48)
    with pytest.raises(KernelError, match="STARKV_ERROR_OVERLAP"):
        kernels.abi.full_attention(shape, 16, 32, 48, 64)
    shape.tokens = 0
    with pytest.raises(KernelError, match="STARKV_ERROR_SHAPE"):
        kernels.abi.full_attention(shape, 16, 32, 48, 64)
