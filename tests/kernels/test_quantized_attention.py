# SPDX-License-Identifier: Apache-2.0
"""``QuantizedKVAttention``'s kernels against the PyTorch reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.kernels.c_abi import KernelError
from starkv.kernels.cuda_library import KernelLibrary
from starkv.kernels.quantized_attention_call import QuantizedAttentionCall
from starkv.kernels.quantized_attention_reference import (
    decode,
    reference_quantized_attention,
    rotated_bias,
)
from starkv.validation.quantized_calls import QuantizedSize, make_quantized_call

DIMS = (64, 80, 96, 128, 256)
BITS = (8, 4)
# Queries and weights of 16-bit calls are rounded to 11 bits each, outputs to those of their type.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 8e-3}
"""Of the sum of what the rows add to an output, each taken as positive."""


def call_of(
    device: torch.device,
    held: tuple[int, ...],
    capacity: int,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 4,
    groups: int = 2,
    dim: int = 64,
    bits: int = 8,
) -> QuantizedAttentionCall:
    return make_quantized_call(QuantizedSize(held, capacity, bits, heads, groups, dim), dtype, device)


def magnitudes(call: QuantizedAttentionCall) -> Tensor:
    """What rows add to an output, each taken as positive: ``out`` where values and their bias have no signs.

    Values whose codes are turned positive differ from the exact ones by what clipping takes, at most a step.
    """
    half = 1 << (call.bits - 1)
    positive = call.past_v.clone()
    if call.bits == 8:
        positive = positive.to(torch.int32).abs().clamp(max=half - 1).to(torch.int8)
    else:
        halves = [
            (code.to(torch.int32) - half).abs().clamp(max=half - 1) + half
            for code in (call.past_v & 15, call.past_v >> 4)
        ]
        positive = (halves[0] | halves[1] << 4).to(torch.uint8)
    # The new row's value, without its bias, may be of any sign; as its magnitude it gets the bias on top.
    own = (call.v.float() - call.v_bias).abs() + call.v_bias.abs()
    return reference_quantized_attention(
        replace(call, past_v=positive, v=own, k=call.k.float(), q=call.q.float(), v_bias=call.v_bias.abs())
    )[0]


def check(kernels: KernelLibrary, call: QuantizedAttentionCall, in_place: bool = True) -> Tensor:
    """One call against the reference: codes to the bit, outputs to the tolerance. Its output."""
    expected, present_k, present_v = reference_quantized_attention(call)
    own = replace(call, past_k=call.past_k.clone(), past_v=call.past_v.clone())
    out, *caches = kernels.quantized_attention(own, in_place=in_place)
    assert torch.equal(caches[0], present_k)
    assert torch.equal(caches[1], present_v)
    error = (out.double() - expected).abs() / magnitudes(call).clamp(min=1e-3)
    assert float(error.max()) <= TOLERANCE[call.q.dtype], f"off by {float(error.max()):.2e}"
    assert not out.isnan().any()
    if not in_place:
        assert torch.equal(own.past_k, call.past_k)
        assert torch.equal(own.past_v, call.past_v)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_every_head_dim(
    kernels: KernelLibrary, device: torch.device, dim: int, bits: int, dtype: torch.dtype
) -> None:
    """Ragged lengths: none, within a tile, at the borders of tiles and splits, and a full cache."""
    held = (0, 7, 15, 16, 64, 299)
    check(kernels, call_of(device, held, 300, dtype, heads=7, groups=1, dim=dim, bits=bits))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sharing", [1, 8, 9, 16, 20, 33])
def test_any_number_of_heads(
    kernels: KernelLibrary, device: torch.device, sharing: int, dtype: torch.dtype
) -> None:
    bits = BITS[sharing % 2]
    check(kernels, call_of(device, (3, 69), 70, dtype, heads=2 * sharing, bits=bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 256])
def test_more_rows_than_one_step_of_a_block(
    kernels: KernelLibrary, device: torch.device, dim: int, bits: int
) -> None:
    """So many KV heads that their blocks take several steps."""
    held = (500, -1, 3, -1, -1, -1, -1, -1)
    check(kernels, call_of(device, held, 501, heads=32, groups=32, dim=dim, bits=bits))


@pytest.mark.parametrize("bits", BITS)
def test_past_and_present_apart(kernels: KernelLibrary, device: torch.device, bits: int) -> None:
    check(kernels, call_of(device, (5, 100), 128, bits=bits), in_place=False)


def test_a_sequence_that_its_cache_cannot_hold_is_left_alone(
    kernels: KernelLibrary, device: torch.device
) -> None:
    held = (-1, 90, 100, 2**31 - 1, -(2**31), 99)
    out = check(kernels, call_of(device, held, 100))
    assert [row for row in range(len(held)) if out[row].any()] == [1, 5]


@pytest.mark.parametrize("component", [0, 1, 2])
@pytest.mark.parametrize("position", [-1, 600, 2**31 - 1])
def test_a_new_row_without_a_place_in_the_tables_is_left_alone(
    kernels: KernelLibrary, device: torch.device, component: int, position: int
) -> None:
    call = call_of(device, (20, 20), 64)
    call.positions[1, 20, component] = position
    out = check(kernels, call)
    assert out[0].any()
    assert not out[1].any()


@pytest.mark.parametrize("position", [-1, 600, 2**31 - 1])
def test_an_older_row_without_a_place_in_the_tables_shows(
    kernels: KernelLibrary, device: torch.device, position: int
) -> None:
    call = call_of(device, (40,), 64)
    call.positions[0, 17, 1] = position
    out, _, _ = kernels.quantized_attention(call)
    assert out.isnan().all()


@pytest.mark.parametrize("sharing", [2, 12])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_behind_the_new_position(
    kernels: KernelLibrary, device: torch.device, dtype: torch.dtype, sharing: int
) -> None:
    """No model has them, so nothing is tabulated for them; the result is the same."""
    call = call_of(device, (40, 100), 128, dtype, heads=2 * sharing)
    call.positions[0, 40] = torch.tensor([0, 3, 1])
    call.positions[1, 100] = 0
    check(kernels, call)


@pytest.mark.parametrize("sections", [(32, 0, 0), (0, 0, 32), (1, 30, 1), (11, 9, 12)])
def test_any_sections(kernels: KernelLibrary, device: torch.device, sections: tuple[int, int, int]) -> None:
    check(kernels, replace(call_of(device, (0, 77), 90), mrope_section=sections))


@pytest.mark.parametrize("table_rows", [1, 15, 16, 17, 1100])
def test_tables_of_any_length(kernels: KernelLibrary, device: torch.device, table_rows: int) -> None:
    """Fewer positions than a block tabulates at once, and more than all blocks do."""
    call = make_quantized_call(
        QuantizedSize((1, 60), 64, 8, 4, 2, 64, max(table_rows, 70)), torch.float16, device
    )
    if table_rows <= 17:
        call.positions[:] = torch.minimum(call.positions, torch.tensor(table_rows - 1))
        call.cos_table, call.sin_table = (
            table[:table_rows].contiguous() for table in (call.cos_table, call.sin_table)
        )
    else:
        call.positions[1, 60] = table_rows - 1
        call.positions[1, 3:60] = torch.arange(1024, 1024 + 57, device=device)[:, None]
    check(kernels, call)


@pytest.mark.parametrize("bits", BITS)
def test_codes_at_ties_and_limits(kernels: KernelLibrary, device: torch.device, bits: int) -> None:
    """Halfway between two codes, beyond the last one, infinite; without a bias numbers are as written."""
    call = call_of(device, (3,), 8, torch.float32, heads=2, groups=1, bits=bits)
    numbers = [
        0.5,
        1.5,
        -0.5,
        -1.5,
        2.5,
        126.5,
        127.5,
        -128.5,
        300.0,
        -300.0,
        torch.inf,
        -torch.inf,
        7.5,
        -8.5,
    ]
    call.k[0, 0, : len(numbers)] = torch.tensor(numbers)
    call.v[0, 0, -len(numbers) :] = torch.tensor(numbers)
    ones = torch.ones_like(call.k_scale)
    check(kernels, replace(call, k_scale=ones, v_scale=ones, k_bias=0 * ones, v_bias=0 * ones))


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_queries_of_any_size(kernels: KernelLibrary, device: torch.device, scale: float) -> None:
    """Folded into 16 bits they neither overflow nor vanish: keys are scaled the other way."""
    call = call_of(device, (90,), 128, torch.float32)
    check(
        kernels,
        replace(
            call, q=call.q * scale, k_scale=call.k_scale / scale, k_bias=call.k_bias / scale, k=call.k / scale
        ),
    )


def test_scores_that_leave_one_row_all_attention(kernels: KernelLibrary, device: torch.device) -> None:
    call = call_of(device, (250,), 256, torch.float16)
    check(kernels, replace(call, q=call.q * 50))


def test_what_is_no_number_shows(kernels: KernelLibrary, device: torch.device) -> None:
    """A query that is no number makes its own head's output NaN, and no other's."""
    call = call_of(device, (90,), 128)
    call.q[0, 0, 64 + 5] = torch.nan
    out = kernels.quantized_attention(call)[0].view(4, 64)
    assert out[1].isnan().all()
    assert not out[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("schedule", ["reverse", "shuffle"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads", [3, 12])
def test_the_order_of_threads_changes_nothing(
    kernels: KernelLibrary,
    device: torch.device,
    heads: int,
    bits: int,
    schedule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU device, which is told to run threads in another order: a missing barrier would show."""
    call = call_of(device, (0, 290), 300, torch.float32, heads=heads, groups=1, dim=80, bits=bits)
    first = check(kernels, call)
    monkeypatch.setenv("STARKV_CPU_SCHEDULE", schedule)
    assert torch.equal(check(kernels, call), first)


@pytest.mark.parametrize("bits", BITS)
def test_it_is_attention_to_what_the_codes_stand_for(device: torch.device, bits: int) -> None:
    """The reference itself: ``KVAttention``'s on keys and values with their biases on top."""
    call = call_of(device, (30, 64), 65, torch.float32, bits=bits)
    out, present_k, present_v = reference_quantized_attention(call)
    groups, dim = 2, call.head_dim
    safe = call.positions.clamp(min=0)
    keys = decode(present_k) * call.k_scale.view(groups, 1, dim) + rotated_bias(call, safe).transpose(1, 2)
    values = decode(present_v) * call.v_scale.view(groups, 1, dim) + call.v_bias.view(groups, 1, dim)
    newest = [torch.stack([rows[b, :, held] for b, held in enumerate((30, 64))]) for rows in (keys, values)]
    exact = AttentionCall(
        q=call.q,
        k=newest[0].view(2, 1, -1).float(),
        v=newest[1].view(2, 1, -1).float(),
        past_k=keys.float(),
        past_v=values.float(),
        kv_len=call.kv_len,
    )
    torch.testing.assert_close(out.float(), reference_attention(exact)[0], rtol=1e-4, atol=1e-4)


def test_codes_are_the_new_row_to_half_a_step(device: torch.device) -> None:
    """The reference itself: what is stored, plus the bias at its position, is the key that came in."""
    call = call_of(device, (9,), 16, torch.float32)
    _, present_k, present_v = reference_quantized_attention(call)
    bias = rotated_bias(call, call.positions[0, 9])
    key = decode(present_k[0, :, 9]) * call.k_scale.view(2, 64) + bias
    value = decode(present_v[0, :, 9]) * call.v_scale.view(2, 64) + call.v_bias.view(2, 64)
    half_a_step = 0.501
    assert ((key - call.k.view(2, 64)).abs() <= half_a_step * call.k_scale.view(2, 64)).all()
    assert ((value - call.v.view(2, 64)).abs() <= half_a_step * call.v_scale.view(2, 64)).all()
    assert present_k[0, :, 9].unique().numel() > 32


def test_what_cannot_be_is_refused(kernels: KernelLibrary, device: torch.device) -> None:
    def refuse(call: QuantizedAttentionCall, name: str) -> None:
        with pytest.raises(KernelError, match=f"starkv_quantized_attention: STARKV_ERROR_{name}"):
            kernels.quantized_attention(call)

    refuse(call_of(device, (3,), 16, dim=72), "HEAD_DIM")
    refuse(call_of(device, (3,), 16, heads=65, groups=65), "HEADS")
    call = call_of(device, (3,), 16)
    refuse(replace(call, past_v=call.past_k), "OVERLAP")
    refuse(replace(call, mrope_section=(-1, 32, 1)), "ARGUMENT")
    storage = torch.zeros(call.q.numel() + 1, dtype=call.q.dtype, device=device)
    refuse(replace(call, q=storage[1:].view(call.q.shape)), "MISALIGNED")
    with pytest.raises(UsageError, match="mrope_section must be 3 numbers that add up to 32"):
        kernels.quantized_attention(replace(call, mrope_section=(16, 24, 24)))
    with pytest.raises(UsageError, match="past_k must be int8"):
        kernels.quantized_attention(replace(call, past_k=call.past_k.to(torch.int32)))
    with pytest.raises(UsageError, match=r"past_v must be torch\.int8"):
        kernels.quantized_attention(replace(call, past_v=call.past_v.to(torch.uint8)))
    with pytest.raises(UsageError, match="q must be float32, float16 or bfloat16"):
        kernels.quantized_attention(replace(call, q=call.q.double()))
    with pytest.raises(UsageError, match="can't share 2 KV heads"):
        kernels.quantized_attention(replace(call, q=call.q.repeat(1, 1, 2)[..., : 3 * 64].contiguous()))
