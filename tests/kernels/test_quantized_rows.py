# SPDX-License-Identifier: Apache-2.0
"""Decode attention over quantized rows: the PyTorch reference against numpy, Triton against the reference."""

from dataclasses import replace

import pytest
import torch
from decode_checks import assert_agree, assert_close, assert_is_numpys, log_sum

from starkv.errors import UsageError
from starkv.kernels import triton_decode
from starkv.kernels.cached_positions import rotate
from starkv.kernels.low_rank_factors import LatentForm
from starkv.kernels.quantized_rows_call import quantize_rows, reference_quantized_rows
from starkv.kernels.triton_bias_logits import bias_logits
from starkv.kernels.triton_quantized_rows import quantized_rows_attention
from starkv.validation.low_rank_cases import DecodeShape, quantized_case

FORMS: tuple[LatentForm, ...] = ("int8", "int4")
SMALL = DecodeShape(
    heads=14, kv_heads=2, dim=64, capacity=100, rows=(100, 61, 0), sections=(8, 12, 12), frame=(3, 5)
)
FEW = replace(SMALL, heads=4, capacity=70, rows=(70, 3))
SHAPES = {
    "seven_heads_of_128": DecodeShape(capacity=70, rows=(70,)),
    "many_heads": replace(FEW, heads=6, kv_heads=6),
    "dim_80": replace(FEW, dim=80, sections=(10, 15, 15)),
    "dim_96": replace(FEW, dim=96, sections=(12, 18, 18)),
    "text": replace(FEW, sections=(32, 0, 0), frame=(1, 1)),
    "seventeen_sharers": replace(FEW, heads=34),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_numpy_reference(form: LatentForm, device: torch.device) -> None:
    decode_numpy = pytest.importorskip("decode_numpy", exc_type=ImportError, reason="needs ml_dtypes")
    call = quantized_case(replace(SMALL, heads=4, rows=(9, 20), capacity=20), form, torch.float32, device)
    assert_is_numpys(reference_quantized_rows(call), [decode_numpy.quantized(call, at) for at in range(2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_types(form: LatentForm, dtype: torch.dtype, device: torch.device) -> None:
    call = quantized_case(SMALL, form, dtype, device)
    assert_agree(quantized_rows_attention(call), reference_quantized_rows(call), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, form: LatentForm, device: torch.device) -> None:
    call = quantized_case(SHAPES[name], form, torch.float32, device)
    assert_agree(quantized_rows_attention(call), reference_quantized_rows(call), torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_programs_that_take_several_tiles(
    form: LatentForm, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_decode, "MAX_SPLITS", 2)
    call = quantized_case(replace(SMALL, heads=2, capacity=300, rows=(300, 130)), form, torch.float32, device)
    assert_agree(quantized_rows_attention(call), reference_quantized_rows(call), torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_without_biases(form: LatentForm, device: torch.device) -> None:
    call = replace(quantized_case(FEW, form, torch.float32, device), key_bias=None, value_bias=None)
    assert_agree(quantized_rows_attention(call), reference_quantized_rows(call), torch.float32)


def test_three_tables_are_a_rotation(device: torch.device) -> None:
    """q · R(t, h, w) b is a sum of three functions of one component each."""
    call = quantized_case(SMALL, "int8", torch.float32, device)
    assert call.key_bias is not None
    where, bias = call.key_bias.where, call.key_bias.bias
    tables = bias_logits(call.q, bias, where)
    positions = where.positions[0].long()
    looked_up = sum(tables[0, component, positions[:, component]] for component in range(3))
    rotated = rotate(bias[:, None], *where.angles(0)).repeat_interleave(7, 0)
    expected = (rotated @ call.q[0, :, :, None])[..., 0].T
    assert_close(looked_up, expected, 1e-5 * float(expected.abs().max()))


def test_a_bias_far_larger_than_the_keys_costs_no_accuracy(device: torch.device) -> None:
    """As Qwen2.5's is; its logits never pass through the queries' type."""
    call = quantized_case(SMALL, "int8", torch.bfloat16, device)
    assert call.key_bias is not None
    call.key_bias.bias.mul_(100)
    result, expected = quantized_rows_attention(call), reference_quantized_rows(call)
    assert_close(log_sum(result), log_sum(expected), 4e-2)


@pytest.mark.parametrize("form", FORMS)
def test_codes_of_rows(form: LatentForm) -> None:
    """Rounded to the nearest step, clipped at both ends, the even channel in the low half of a byte."""
    rows = torch.tensor([-300.0, -1.4, 0.6, 300.0]).expand(2, 3, 4).contiguous()
    codes = quantize_rows(rows, torch.ones(2, 4), form)
    expected = {"int8": [-128, -1, 1, 127], "int4": [0 | 7 << 4, 9 | 15 << 4]}[form]
    assert codes[1, 2].tolist() == expected


@pytest.mark.parametrize("form", FORMS)
def test_quantized_rows_give_nearly_what_exact_ones_give(form: LatentForm, device: torch.device) -> None:
    """Rows are quantized without their biases, and compared with attention over exact ones."""
    call = quantized_case(replace(SMALL, rows=(100,)), form, torch.float32, device)
    assert call.key_bias is not None
    assert call.value_bias is not None
    exact = torch.randn(2, 1, 2, 100, 64, device=device)
    scales = exact.abs().amax(dim=(1, 3)) / {"int8": 127, "int4": 7}[form]
    call.k.copy_(quantize_rows(exact[0], scales[0], form))
    call.v.copy_(quantize_rows(exact[1], scales[1], form))
    call = replace(call, k_scales=scales[0].contiguous(), v_scales=scales[1].contiguous())
    assert call.key_bias is not None
    assert call.value_bias is not None
    bias = rotate(call.key_bias.bias[:, None], *call.key_bias.where.angles(0))
    keys = (exact[0, 0] + bias).repeat_interleave(7, 0)
    values = (exact[1, 0] + call.value_bias[:, None]).repeat_interleave(7, 0)
    weights = (keys @ call.q[0, :, :, None] / 8)[..., 0].softmax(-1)
    expected = (weights[:, None] @ values)[:, 0]
    out = quantized_rows_attention(call).out[0]
    error = float((out - expected).norm() / (expected - call.value_bias.repeat_interleave(7, 0)).norm())
    assert error < {"int8": 0.02, "int4": 0.3}[form]


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_a_sequence_does_not_hold_are_never_read(form: LatentForm, device: torch.device) -> None:
    call = quantized_case(SMALL, form, torch.float32, device)
    expected = quantized_rows_attention(call)
    assert call.key_bias is not None
    for sequence, rows in enumerate(SMALL.rows):
        call.k[sequence, :, rows:], call.v[sequence, :, rows:] = 3, 3
        call.key_bias.where.positions[sequence, rows:] = 10**6
    assert torch.equal(quantized_rows_attention(call).out, expected.out)


@pytest.mark.parametrize("rows", [-1, 101, -(2**31)])
def test_numbers_of_rows_that_make_no_sense_come_out_as_zero(rows: int, device: torch.device) -> None:
    call = quantized_case(SMALL, "int4", torch.float32, device)
    call.n_valid.fill_(rows)
    result = quantized_rows_attention(call)
    assert not result.out.any()
    assert not result.total.any()


@pytest.mark.parametrize("position", [-1, 10**6])
def test_a_position_that_the_tables_do_not_know_shows(position: int, device: torch.device) -> None:
    call = quantized_case(SMALL, "int4", torch.float32, device)
    assert call.key_bias is not None
    call.key_bias.where.positions[1, 3, 0] = position
    out = quantized_rows_attention(call).out
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 2, 100, 64)}, "k must be int8"),
        ({"v": torch.zeros(3, 2, 100, 64, dtype=torch.int8)}, r"v must be torch.uint8 of \[3, 2, 100, 32\]"),
        ({"k_scales": torch.ones(2)}, "k_scales must be"),
        ({"value_bias": torch.ones(2)}, "value_bias must be"),
        ({"q": torch.zeros(3, 15, 64)}, "15 query heads can't share 2"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    call = quantized_case(SMALL, "int4", torch.float32, torch.device("cpu"))
    with pytest.raises(UsageError, match=message):
        quantized_rows_attention(replace(call, **change))
