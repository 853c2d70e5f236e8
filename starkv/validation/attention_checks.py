# SPDX-License-Identifier: Apache-2.0
"""``KVAttention`` of every implementation against the PyTorch reference."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.validation.implementations import Attention, Implementation
from starkv.validation.report import Check
from starkv.validation.trial import Trial


@dataclass(frozen=True)
class AttentionSize:
    """A call of ``KVAttention``."""

    name: str
    sequences: int
    new_tokens: int
    history: int
    query_heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128


SIZES = {
    "cpu": (
        AttentionSize("decode, 3 sequences of up to 300 rows", 3, 1, 300, query_heads=14, kv_heads=2),
        AttentionSize("prefill of 70 after 130 rows", 1, 70, 130, query_heads=14, kv_heads=2),
    ),
    "cuda": (
        AttentionSize("decode, 8 sequences of up to 13,605 rows", 8, 1, 13_605),
        AttentionSize("prefill of 2,841", 1, 2841, 0),
        AttentionSize("prefill of 2,000 after 4,000 rows", 1, 2000, 4000),
    ),
}
"""Where kernels are emulated, calls are small."""
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Norm of the error over that of the result: outputs and probabilities are rounded to the cache's type."""


def make_call(size: AttentionSize, dtype: torch.dtype, device: torch.device, seed: int = 0) -> AttentionCall:
    """A random call whose sequences hold different numbers of rows, fewer than the cache could hold."""
    random = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    batch, groups, dim = size.sequences, size.kv_heads, size.head_dim
    capacity = -(-(size.history + size.new_tokens + 1) // 64) * 64
    held = [size.history - size.history * b // (2 * batch) for b in range(batch)]
    return AttentionCall(
        q=draw(batch, size.new_tokens, size.query_heads * dim),
        k=draw(batch, size.new_tokens, groups * dim),
        v=draw(batch, size.new_tokens, groups * dim),
        past_k=draw(batch, groups, capacity, dim),
        past_v=draw(batch, groups, capacity, dim),
        kv_len=torch.tensor(held, dtype=torch.int32, device=device),
    )


def check_attention(
    size: AttentionSize, dtype: torch.dtype, device: torch.device, others: list[Implementation]
) -> Iterator[Check]:
    """One check for each implementation."""
    call = make_call(size, dtype, device)
    expected = reference_attention(call)

    def repeatable(run: Attention) -> Callable[[], object]:
        own = _own_cache(call)
        return lambda: run(own)

    trial = Trial(
        subject="KVAttention",
        case=size.name,
        dtype=dtype,
        device=device,
        rows=size.history + size.new_tokens,
        reference=lambda: reference_attention(call),
        compare=lambda run, blank: _attend(call, expected, run, blank),
        repeatable=repeatable,
    )
    yield from trial.run([(other, other.attention) for other in others])


def _attend(
    call: AttentionCall, expected: tuple[Tensor, Tensor, Tensor], run: Attention, blank: Check
) -> Check:
    out, keys, values = run(_own_cache(call))
    error = float((out.float() - expected[0]).norm() / expected[0].norm())
    failures = []
    if not error <= TOLERANCE[call.q.dtype]:
        failures.append(f"the output differs by {error:.1e} of itself")
    if not (torch.equal(keys, expected[1]) and torch.equal(values, expected[2])):
        failures.append("the cache does not hold the new rows behind the old ones")
    return blank.finished(failures, {"error": error})


def _own_cache(call: AttentionCall) -> AttentionCall:
    """Implementations write in place: each gets a cache of its own."""
    return replace(call, past_k=call.past_k.clone(), past_v=call.past_v.clone())
