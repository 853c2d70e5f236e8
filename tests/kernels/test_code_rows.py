# SPDX-License-Identifier: Apache-2.0
"""Rows of a float cache that become codes, and the reverse: the kernels against the PyTorch reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.code_rows_reference import reference_dequantize_rows, reference_quantize_rows
from starkv.kernels.cuda_library import KernelLibrary
from starkv.kernels.cuda_structures import code_rows_buffers, code_rows_shape
from starkv.kernels.quantized_attention_call import QuantizedAttentionCall
from starkv.validation.code_rows_calls import CodeRowsSize, make_code_rows_call

DIMS = (64, 80, 96, 128, 256)
BITS = (8, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# No row, one, a full tile of a block and the rows beside it, and all that fits.
SMALL = CodeRowsSize((0, 1, 15, 16, 17, 40), capacity=40, slot_capacity=43, kv_heads=2, head_dim=64)


def own(call: CodeRowsCall) -> CodeRowsCall:
    """The call with caches of its own."""
    caches = {name: getattr(call, name).clone() for name in ("k", "v", "k_codes", "v_codes")}
    return replace(call, **caches)


def assert_same(result: Tensor, expected: Tensor) -> None:
    """To the last bit, but for which NaN it is."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def check_quantized(kernels: KernelLibrary, call: CodeRowsCall) -> CodeRowsCall:
    """Both caches whole, with the rows and slots that nobody may touch, and the counts. What was written."""
    expected = reference_quantize_rows(call)
    result = own(call)
    wrong_rows = kernels.quantize_rows(result)
    for ours, theirs in zip((result.k_codes, result.v_codes, wrong_rows), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert_same(result.k, call.k)
    assert_same(result.v, call.v)
    return result


def check_dequantized(kernels: KernelLibrary, call: CodeRowsCall) -> CodeRowsCall:
    """Likewise of the reverse."""
    expected = reference_dequantize_rows(call)
    result = own(call)
    kernels.dequantize_rows(result)
    for ours, theirs in zip((result.k, result.v), expected, strict=True):
        assert_same(ours, theirs)
    assert torch.equal(result.k_codes, call.k_codes)
    assert torch.equal(result.v_codes, call.v_codes)
    return result


def rows_in_use(call: CodeRowsCall) -> list[tuple[Tensor, Tensor]]:
    """Each layer's codes of keys and of values, ``[G, rows, R]``."""
    return [
        (call.k_codes[layer, call.slot, :, :rows], call.v_codes[layer, call.slot, :, :rows])
        for layer, rows in enumerate(call.lengths.tolist())
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_every_head_dim(
    kernels: KernelLibrary, device: torch.device, dim: int, bits: int, dtype: torch.dtype
) -> None:
    call = make_code_rows_call(replace(SMALL, head_dim=dim, bits=bits), dtype, device)
    result = check_quantized(kernels, call)
    check_dequantized(kernels, call)
    codes = result.k_codes[5, call.slot, :, :40]
    assert codes.unique().numel() > {8: 150, 4: 100}[bits]


@pytest.mark.parametrize("kv_heads", [1, 3, 8, 64])
@pytest.mark.parametrize("bits", BITS)
def test_any_number_of_heads(kernels: KernelLibrary, device: torch.device, kv_heads: int, bits: int) -> None:
    """A block's threads have several rows at once, some of them none, or several columns one by one."""
    size = CodeRowsSize((5, 19), 20, 20, bits, kv_heads, head_dim=96)
    call = make_code_rows_call(size, torch.bfloat16, device)
    check_quantized(kernels, call)
    check_dequantized(kernels, call)


@pytest.mark.parametrize("sections", [(32, 0, 0), (0, 0, 32), (1, 30, 1), (11, 9, 12)])
def test_any_sections(kernels: KernelLibrary, device: torch.device, sections: tuple[int, int, int]) -> None:
    call = replace(make_code_rows_call(SMALL, torch.float32, device), mrope_section=sections)
    check_quantized(kernels, call)
    check_dequantized(kernels, call)


@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize(("capacity", "slot_capacity"), [(17, 64), (64, 17)])
def test_caches_of_other_sizes(
    kernels: KernelLibrary, device: torch.device, capacity: int, slot_capacity: int, slot: int
) -> None:
    size = replace(SMALL, lengths=(17, 3), capacity=capacity, slot_capacity=slot_capacity, slot=slot)
    call = make_code_rows_call(size, torch.float16, device)
    check_quantized(kernels, call)
    check_dequantized(kernels, call)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_codes_survive_a_round_trip(
    kernels: KernelLibrary, device: torch.device, dim: int, bits: int
) -> None:
    """Biases a hundred times larger than the rest take no code away from float32 rows."""
    size = replace(SMALL, head_dim=dim, bits=bits, largest_bias=200.0)
    call = own(make_code_rows_call(size, torch.float32, device))
    before = own(call)
    kernels.dequantize_rows(call)
    for rows in rows_in_use(call):
        for codes in rows:
            codes.zero_()
    assert not kernels.quantize_rows(call).any()
    assert torch.equal(call.k_codes, before.k_codes)
    assert torch.equal(call.v_codes, before.v_codes)
    assert float(call.k[5, 0, :, :40].abs().max()) > 200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_codes_are_those_of_an_appended_row(
    kernels: KernelLibrary, device: torch.device, dim: int, bits: int, dtype: torch.dtype
) -> None:
    size = CodeRowsSize((40,), 40, 40, bits, kv_heads=2, head_dim=dim, largest_bias=200.0)
    call = make_code_rows_call(size, dtype, device)
    # An infinite number makes a row a wrong one, but has a code.
    call.k[0, 0, 1, 3, 5], call.v[0, 0, 0, 4, 6] = torch.inf, -torch.inf
    kernels.quantize_rows(call)
    # Every row is appended to an empty cache of its own.
    keys, values = (cache[0, 0].transpose(0, 1).reshape(40, 1, -1) for cache in (call.k, call.v))
    empty = torch.zeros(40, 2, 1, dim * bits // 8, dtype=call.k_codes.dtype, device=device)
    appended = QuantizedAttentionCall(
        q=torch.ones(40, 1, 2 * dim, dtype=dtype, device=device),
        k=keys,
        v=values,
        past_k=empty,
        past_v=empty.clone(),
        kv_len=torch.zeros(40, dtype=torch.int32, device=device),
        positions=call.positions[0, call.slot, :, None].contiguous(),
        k_scale=call.k_scale[0],
        v_scale=call.v_scale[0],
        k_bias=call.k_bias[0],
        v_bias=call.v_bias[0],
        cos_table=call.cos_table,
        sin_table=call.sin_table,
        mrope_section=call.mrope_section,
    )
    _, present_k, present_v = kernels.quantized_attention(appended)
    (codes,) = rows_in_use(call)
    assert torch.equal(codes[0], present_k[:, :, 0].transpose(0, 1))
    assert torch.equal(codes[1], present_v[:, :, 0].transpose(0, 1))
    assert codes[0].unique().numel() > 100


@pytest.mark.parametrize("bits", BITS)
def test_codes_at_ties_and_limits(kernels: KernelLibrary, device: torch.device, bits: int) -> None:
    """Halfway between two codes and beyond the last one; without a bias numbers are as written."""
    size = CodeRowsSize((1,), 1, 1, bits, kv_heads=1, head_dim=64)
    call = make_code_rows_call(size, torch.float32, device)
    numbers = [0.5, 1.5, -0.5, -1.5, 2.5, 6.5, 7.5, -7.5, -8.5, 126.5, 127.5, -127.5, -128.5, 300.0]
    call.k[0, 0, 0, 0, : len(numbers)] = torch.tensor(numbers)
    call.v[0, 0, 0, 0, -len(numbers) :] = torch.tensor(numbers)
    ones = torch.ones_like(call.k_scale)
    call = replace(call, k_scale=ones, v_scale=ones, k_bias=0 * ones, v_bias=0 * ones)
    codes = check_quantized(kernels, call).k_codes[0, call.slot, 0, 0]
    expected = {
        8: [0, 2, 0, -2, 2, 6, 8, -8, -8, 126, 127, -128, -128, 127],
        # 8 is added to each, and the even column is in the lower half.
        4: [8 | 10 << 4, 8 | 6 << 4, 10 | 14 << 4, 15 | 0 << 4, 0 | 15 << 4, 15 | 0 << 4, 0 | 15 << 4],
    }[bits]
    assert codes[: len(expected)].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_rows_that_are_not_finite_are_counted(
    kernels: KernelLibrary, device: torch.device, bits: int, dtype: torch.dtype
) -> None:
    """Once each, however much of a row is wrong and whichever of a block's threads see it."""
    call = make_code_rows_call(replace(SMALL, bits=bits), dtype, device)
    call.k[5, 0, 0, 2, 0], call.k[5, 0, 1, 2, 63], call.v[5, 0, 1, 2, 9] = torch.nan, torch.inf, torch.nan
    call.v[5, 0, 0, 15] = torch.nan
    call.k[5, 0, 1, 16, 40], call.v[5, 0, 1, 39, 63] = -torch.inf, torch.inf
    call.v[1, 0, 0, 0, 0] = torch.nan
    result = check_quantized(kernels, call)
    assert kernels.quantize_rows(result).tolist() == [0, 1, 0, 0, 0, 4]


@pytest.mark.parametrize("component", [0, 1, 2])
@pytest.mark.parametrize("position", [-1, 600, 2**31 - 1])
def test_rows_without_a_place_in_the_tables(
    kernels: KernelLibrary, device: torch.device, component: int, position: int
) -> None:
    """They are counted and left alone; the way back makes their keys NaN."""
    call = make_code_rows_call(SMALL, torch.float32, device)
    call.positions[5, 1, [3, 20], component] = position
    call.k[5, 0, 0, 20, 0] = torch.nan
    call.positions[0, 1, 0, component] = position
    result = check_quantized(kernels, call)
    assert kernels.quantize_rows(result).tolist() == [0, 0, 0, 0, 0, 2]
    assert torch.equal(result.v_codes[5, 1, :, 3], call.v_codes[5, 1, :, 3])
    back = check_dequantized(kernels, call)
    assert back.k[5, 0, :, [3, 20]].isnan().all()
    assert not back.k[5, 0, :, :3].isnan().any()
    assert not back.v[5, 0, :, :40].isnan().any()


@pytest.mark.parametrize("length", [-1, -(2**31), 41, 44, 2**31 - 1])
@pytest.mark.parametrize(("capacity", "slot_capacity"), [(40, 43), (43, 40)])
def test_a_length_that_makes_no_sense(
    kernels: KernelLibrary, device: torch.device, capacity: int, slot_capacity: int, length: int
) -> None:
    """More rows than either of both caches has, or fewer than none: nothing of that layer is touched."""
    size = replace(SMALL, lengths=(17, 40, 5), capacity=capacity, slot_capacity=slot_capacity)
    call = make_code_rows_call(size, torch.bfloat16, device)
    call.lengths[1] = length
    result = check_quantized(kernels, call)
    assert kernels.quantize_rows(result).tolist() == [0, -1, 0]
    assert torch.equal(result.k_codes[1], call.k_codes[1])
    assert not torch.equal(result.k_codes[2], call.k_codes[2])
    check_dequantized(kernels, call)


def test_counts_do_not_add_up_over_calls(kernels: KernelLibrary, device: torch.device) -> None:
    call = make_code_rows_call(SMALL, torch.float32, device)
    call.v[4, 0, 1, 16, 3] = torch.nan
    wrong_rows = torch.full_like(call.lengths, 77)
    for _ in range(2):
        kernels.abi.quantize_rows(code_rows_shape(call), code_rows_buffers(call, wrong_rows))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert wrong_rows.tolist() == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("schedule", ["reverse", "shuffle"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kv_heads", [2, 16])
def test_the_order_of_threads_changes_nothing(
    kernels: KernelLibrary,
    device: torch.device,
    kv_heads: int,
    bits: int,
    schedule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU device, which is told to run threads in another order: a missing barrier would show."""
    size = CodeRowsSize((0, 40, 23), 40, 40, bits, kv_heads, head_dim=80)
    call = make_code_rows_call(size, torch.float16, device)
    call.k[1, 0, 1, 3:19, 7] = torch.nan
    call.positions[2, 1, 17, 1] = -5
    monkeypatch.setenv("STARKV_CPU_SCHEDULE", schedule)
    check_quantized(kernels, call)
    check_dequantized(kernels, call)
