# SPDX-License-Identifier: Apache-2.0
"""Calls of ``PackableKVAttention``, and what ``starkv validate ops`` says of right and wrong answers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.packable_attention_call import PackableAttentionCall, reference_packable_attention
from starkv.validation.implementations import Implementation
from starkv.validation.packable_calls import PackableSize, make_packable_call
from starkv.validation.packable_checks import check_packable_attention
from starkv.validation.quantized_calls import QuantizedSize


@pytest.mark.parametrize("cache", ["floats", "codes"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packable_attention(dtype: torch.dtype, cache: str, device: torch.device) -> None:
    def writes_the_other_cache(call: PackableAttentionCall) -> tuple[Tensor, ...]:
        out, *presents = reference_packable_attention(call)
        other = presents[0 if cache == "codes" else 2]
        other[0, 0, 0, 0] += 1
        return out, *presents

    def sees_the_newest_only(call: PackableAttentionCall) -> tuple[Tensor, ...]:
        _, *presents = reference_packable_attention(call)
        return reference_packable_attention(replace(call, kv_len=call.kv_len * 0))[0], *presents

    others = [
        Implementation("PyTorch", packable_attention=reference_packable_attention, timed=False),
        Implementation("other cache", packable_attention=writes_the_other_cache, timed=False),
        Implementation("newest only", packable_attention=sees_the_newest_only, timed=False),
    ]
    codes = QuantizedSize((40, 20), 48 if cache == "codes" else 1, 8, 4, 2, head_dim=64)
    size = PackableSize(codes, float_rows=48, new_tokens=1 if cache == "codes" else 3)
    checks = list(check_packable_attention(size, dtype, device, others))
    assert [check.status for check in checks] == ["passed", "failed", "failed"]
    assert {check.case for check in checks} == {
        "1 token over codes of 8 bits" if cache == "codes" else "3 tokens over floats"
    }
    name = "present_k" if cache == "codes" else "present_k_codes"
    assert checks[1].reason == f"{name} does not hold what it should"
    assert "the output differs" in checks[2].reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past_k_codes": torch.zeros(2, 2, 48, 64)}, "past_k_codes must be int8"),
        ({"past_v_codes": torch.zeros(2, 2, 48, 32, dtype=torch.int8)}, "past_v_codes must be torch.int8 of"),
        ({"past_k_codes": torch.zeros(2, 48, 64, dtype=torch.int8)}, r"past_k_codes must be \[B, G, K, R\]"),
        ({"past_v": torch.zeros(2, 2, 48, 32).half()}, "past_v must be torch.float16 of"),
        ({"positions": torch.zeros(2, 47, 3, dtype=torch.int32)}, "positions must be torch.int32 of"),
        ({"mrope_section": (8, 8, 8)}, "mrope_section must be 3 numbers that add up to 32"),
    ],
)
def test_packable_calls_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    size = PackableSize(QuantizedSize((40, 20), 48, 8, 4, 2, head_dim=64), float_rows=48)
    call = make_packable_call(size, torch.float16, torch.device("cpu"))
    call.check()
    with pytest.raises(UsageError, match=message):
        replace(call, **change).check()
