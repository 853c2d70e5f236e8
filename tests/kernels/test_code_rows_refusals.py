# SPDX-License-Identifier: Apache-2.0
"""Calls to quantize or dequantize rows that are refused before anything is launched."""

from dataclasses import replace

import pytest
import torch

from starkv.errors import UsageError
from starkv.kernels.c_abi import KernelError
from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.cuda_library import KernelLibrary
from starkv.kernels.cuda_structures import code_rows_buffers, code_rows_shape
from starkv.validation.code_rows_calls import CodeRowsSize, make_code_rows_call

SMALL = CodeRowsSize((0, 1, 15, 16, 17, 40), capacity=40, slot_capacity=43, kv_heads=2, head_dim=64)


def statuses_of(
    kernels: KernelLibrary, call: CodeRowsCall, changes: dict[str, object] | None = None
) -> list[str]:
    """Names of the statuses of quantizing and of dequantizing with changed numbers."""
    wrong_rows = torch.zeros_like(call.lengths)
    shape, buffers = code_rows_shape(call), code_rows_buffers(call, wrong_rows)
    for name, value in (changes or {}).items():
        setattr(shape if hasattr(shape, name) else buffers, name, value)
    found = []
    for launch in (kernels.abi.quantize_rows, kernels.abi.dequantize_rows):
        try:
            launch(shape, buffers)
            found.append("OK")
        except KernelError as error:
            name = error.status.name if error.status else str(error)
            found.append(name.removeprefix("STARKV_ERROR_"))
    return found


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "OK"),
        *(({name: 0}, "NULL_POINTER") for name in ("k", "v", "lengths", "positions", "k_codes", "v_codes")),
        *(({name: 0}, "NULL_POINTER") for name in ("k_scale", "v_bias", "cos_table", "sin_table")),
        ({"dtype": 3}, "DTYPE"),
        ({"dtype": -1}, "DTYPE"),
        ({"head_dim": 72}, "HEAD_DIM"),
        ({"kv_heads": 0}, "HEADS"),
        ({"kv_heads": 65}, "HEADS"),
        ({"layers": 0}, "SHAPE"),
        ({"layers": 1 << 16}, "SHAPE"),
        ({"capacity": 0}, "SHAPE"),
        ({"capacity": (1 << 24) + 1}, "SHAPE"),
        ({"slots": 0}, "SHAPE"),
        ({"slot_capacity": 0}, "SHAPE"),
        ({"slot_capacity": (1 << 24) + 1}, "SHAPE"),
        ({"table_rows": 0}, "SHAPE"),
        ({"table_rows": (1 << 20) + 1}, "SHAPE"),
        ({"slot": -1}, "ARGUMENT"),
        ({"slot": 3}, "ARGUMENT"),
        ({"bits": 5}, "ARGUMENT"),
        ({"mrope_section": (16, 24, 24)}, "ARGUMENT"),
        ({"mrope_section": (-1, 32, 1)}, "ARGUMENT"),
    ],
)
def test_refused_with_a_name(
    changes: dict[str, object], name: str, kernels: KernelLibrary, device: torch.device
) -> None:
    call = make_code_rows_call(SMALL, torch.float32, device)
    assert statuses_of(kernels, call, changes) == [name, name]


def test_refused_for_its_memory(kernels: KernelLibrary, device: torch.device) -> None:
    call = make_code_rows_call(SMALL, torch.float32, device)
    for field in ("k", "lengths", "positions", "sin_table", "v_codes"):
        shifted = getattr(call, field).data_ptr() + 4
        assert statuses_of(kernels, call, {field: shifted}) == ["MISALIGNED"] * 2
    # Only quantizing counts wrong rows.
    assert statuses_of(kernels, call, {"wrong_rows": 0}) == ["NULL_POINTER", "OK"]
    assert statuses_of(kernels, call, {"wrong_rows": call.lengths.data_ptr()}) == ["OVERLAP", "OK"]
    assert statuses_of(kernels, call, {"v_codes": call.k_codes.data_ptr()}) == ["OVERLAP", "OK"]
    assert statuses_of(kernels, call, {"v": call.k.data_ptr()}) == ["OK", "OVERLAP"]
    for codes in ("k_codes", "v_codes"):
        assert statuses_of(kernels, call, {codes: call.v.data_ptr() + 64}) == ["OVERLAP"] * 2


def test_refused_in_python(kernels: KernelLibrary, device: torch.device) -> None:
    call = make_code_rows_call(SMALL, torch.float32, device)

    def refuse(message: str, **changes: object) -> None:
        for launch in (kernels.quantize_rows, kernels.dequantize_rows):
            with pytest.raises(UsageError, match=message):
                launch(replace(call, **changes))

    refuse(r"lengths must be torch\.int32 of \[6\]", lengths=call.lengths.long())
    refuse(r"k must be \[L, 1, G, C, D\]", k=call.k[:, 0])
    refuse("k must be float32, float16 or bfloat16", k=call.k.double(), v=call.v.double())
    refuse("k_codes must be int8", k_codes=call.k_codes.int())
    refuse(r"v_codes must be torch\.int8", v_codes=call.v_codes.to(torch.uint8))
    refuse("v_bias must be contiguous", v_bias=call.v_bias.T.contiguous().T)
    refuse("mrope_section must be 3 numbers that add up to 32", mrope_section=(16, 24, 24))
