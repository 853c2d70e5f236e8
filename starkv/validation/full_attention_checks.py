# SPDX-License-Identifier: Apache-2.0
"""``FullAttention`` of every implementation against the PyTorch reference."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.kernels.full_attention_call import FullAttentionCall, reference_full_attention
from starkv.validation.attention_checks import TOLERANCE
from starkv.validation.implementations import FullAttention, Implementation
from starkv.validation.report import Check
from starkv.validation.trial import Trial


@dataclass(frozen=True)
class FullAttentionSize:
    """A call of ``FullAttention`` with the heads of Qwen2.5-VL's vision tower."""

    name: str
    tokens: int
    heads: int = 16
    head_dim: int = 80


SIZES = {
    "cpu": (FullAttentionSize("an image of 150 patches", 150, heads=2),),
    "cuda": (FullAttentionSize("an image of 4,000 patches", 4_000),),
}
"""Where kernels are emulated, calls are small. The reference stores all scores, so no call is very large."""


def check_full_attention(
    size: FullAttentionSize, dtype: torch.dtype, device: torch.device, others: list[Implementation]
) -> Iterator[Check]:
    """One check for each implementation."""
    random = torch.Generator(device).manual_seed(0)
    shape = (1, size.tokens, size.heads * size.head_dim)
    q, k, v = (torch.randn(shape, generator=random, device=device).to(dtype) for _ in range(3))
    call = FullAttentionCall(q, k, v, size.heads)
    expected = reference_full_attention(call)
    trial: Trial[FullAttention] = Trial(
        subject="FullAttention",
        case=size.name,
        dtype=dtype,
        device=device,
        rows=size.tokens,
        reference=lambda: reference_full_attention(call),
        compare=lambda run, blank: _attend(call, expected, run, blank),
        repeatable=lambda run: lambda: run(call),
    )
    yield from trial.run([(other, other.full_attention) for other in others])


def _attend(call: FullAttentionCall, expected: Tensor, run: FullAttention, blank: Check) -> Check:
    error = float((run(call).float() - expected).norm() / expected.norm())
    failures = []
    if not error <= TOLERANCE[call.q.dtype]:
        failures.append(f"the output differs by {error:.1e} of itself")
    return blank.finished(failures, {"error": error})
