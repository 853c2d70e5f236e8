# SPDX-License-Identifier: Apache-2.0
"""``PackableKVAttention`` of every implementation against the PyTorch reference, over either cache."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from starkv.kernels.packable_attention_call import PackableAttentionCall, reference_packable_attention
from starkv.validation.implementations import Implementation, PackableAttention
from starkv.validation.packable_calls import PackableSize, make_packable_call
from starkv.validation.quantized_calls import QuantizedSize
from starkv.validation.quantized_checks import TOLERANCE
from starkv.validation.report import Check
from starkv.validation.trial import Trial

SIZES = {
    "cpu": (
        PackableSize(QuantizedSize((200, 100), 1, query_heads=14, kv_heads=2), 240, new_tokens=33),
        PackableSize(QuantizedSize((200, 100), 240, query_heads=14, kv_heads=2), 240),
    ),
    "cuda": (
        PackableSize(QuantizedSize((11_000, 2_841), 1), 13_632, new_tokens=2_048),
        PackableSize(QuantizedSize((11_000, 2_841), 13_632, table_rows=4_096), 13_632),
    ),
}
"""One case for each cache: the kernels behind both have checks of their own."""
_CACHES = ("past_k", "past_v", "past_k_codes", "past_v_codes")


def check_packable_attention(
    size: PackableSize, dtype: torch.dtype, device: torch.device, others: list[Implementation]
) -> Iterator[Check]:
    """One check for each implementation."""
    call = make_packable_call(size, dtype, device)
    out, *presents = reference_packable_attention(call)

    def repeatable(run: PackableAttention) -> Callable[[], object]:
        own = _own_caches(call)
        return lambda: run(own)

    trial = Trial(
        subject="PackableKVAttention",
        case=size.name,
        dtype=dtype,
        device=device,
        rows=max(size.codes.held) + size.new_tokens,
        reference=lambda: reference_packable_attention(call),
        compare=lambda run, blank: _attend(call, out, presents, run, blank),
        repeatable=repeatable,
    )
    yield from trial.run([(other, other.packable_attention) for other in others])


def _attend(
    call: PackableAttentionCall, expected: Tensor, caches: list[Tensor], run: PackableAttention, blank: Check
) -> Check:
    out, *presents = run(_own_caches(call))
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    failures = []
    if not error <= TOLERANCE[call.q.dtype]:
        failures.append(f"the output differs by {error:.1e} of itself")
    for name, present, wanted in zip(_CACHES, presents, caches, strict=True):
        if not torch.equal(present, wanted):
            failures.append(f"{name.replace('past', 'present')} does not hold what it should")
    return blank.finished(failures, {"error": error})


def _own_caches(call: PackableAttentionCall) -> PackableAttentionCall:
    """Implementations write in place: each gets caches of its own."""
    return replace(call, **{name: getattr(call, name).clone() for name in _CACHES})
