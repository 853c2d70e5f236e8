# SPDX-License-Identifier: Apache-2.0
"""``QuantizedKVAttention`` of every implementation against the PyTorch reference."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from starkv.kernels.quantized_attention_call import QuantizedAttentionCall
from starkv.kernels.quantized_attention_reference import reference_quantized_attention
from starkv.validation.implementations import Implementation, QuantizedAttention
from starkv.validation.quantized_calls import QuantizedSize, make_quantized_call
from starkv.validation.report import Check
from starkv.validation.trial import Trial

SIZES = {
    "cpu": (
        QuantizedSize((300, 200, 100), 320, 8, query_heads=14, kv_heads=2),
        QuantizedSize((300, 200, 100), 320, 4, query_heads=14, kv_heads=2),
    ),
    "cuda": (
        QuantizedSize((13_605, 11_000, 7_000, 2_841), 13_632, 8, table_rows=4_096),
        QuantizedSize((13_605, 11_000, 7_000, 2_841), 13_632, 4, table_rows=4_096),
    ),
}
"""Where kernels are emulated, calls are small."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Norm of the error over that of the result. Codes are compared to the bit."""


def check_quantized_attention(
    size: QuantizedSize, dtype: torch.dtype, device: torch.device, others: list[Implementation]
) -> Iterator[Check]:
    """One check for each implementation."""
    call = make_quantized_call(size, dtype, device)
    expected = reference_quantized_attention(call)

    def repeatable(run: QuantizedAttention) -> Callable[[], object]:
        own = _own_cache(call)
        return lambda: run(own)

    trial = Trial(
        subject="QuantizedKVAttention",
        case=case_name(size),
        dtype=dtype,
        device=device,
        rows=max(size.held) + 1,
        reference=lambda: reference_quantized_attention(call),
        compare=lambda run, blank: _attend(call, expected, run, blank),
        repeatable=repeatable,
    )
    yield from trial.run([(other, other.quantized_attention) for other in others])


def case_name(size: QuantizedSize) -> str:
    """Such as "decode, 3 sequences of up to 300 rows of 8 bits"."""
    return f"decode, {len(size.held)} sequences of up to {max(size.held):,} rows of {size.bits} bits"


def _attend(
    call: QuantizedAttentionCall,
    expected: tuple[Tensor, Tensor, Tensor],
    run: QuantizedAttention,
    blank: Check,
) -> Check:
    out, keys, values = run(_own_cache(call))
    error = float((out.double() - expected[0]).norm() / expected[0].norm())
    failures = []
    if not error <= TOLERANCE[call.q.dtype]:
        failures.append(f"the output differs by {error:.1e} of itself")
    if not (torch.equal(keys, expected[1]) and torch.equal(values, expected[2])):
        failures.append("the cache does not hold the new row's codes behind the old ones")
    return blank.finished(failures, {"error": error})


def _own_cache(call: QuantizedAttentionCall) -> QuantizedAttentionCall:
    """Implementations write in place: each gets a cache of its own."""
    return replace(call, past_k=call.past_k.clone(), past_v=call.past_v.clone())
