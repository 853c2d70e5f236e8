# SPDX-License-Identifier: Apache-2.0
"""Rows that become codes on a device, and the reverse, against the numpy that does it on the processor."""

import numpy as np
import pytest
import torch

from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.cuda_library import KernelLibrary
from starkv.validation.code_rows_calls import CodeRowsSize, make_code_rows_call
from starkv.validation.quantized_calls import THETA

by_numpy = pytest.importorskip("code_rows_numpy", exc_type=ImportError, reason="needs pydantic and ml_dtypes")

dims = pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
bits_of_codes = pytest.mark.parametrize("bits", [8, 4])
LENGTHS = (40, 0, 17)


def call_of(device: torch.device, dim: int, bits: int) -> CodeRowsCall:
    size = CodeRowsSize(LENGTHS, 40, 45, bits, kv_heads=2, head_dim=dim, largest_bias=200.0)
    return make_code_rows_call(size, torch.float32, device)


@dims
@bits_of_codes
def test_codes_are_those_of_float32(
    kernels: KernelLibrary, device: torch.device, dim: int, bits: int
) -> None:
    call = call_of(device, dim, bits)
    assert not kernels.quantize_rows(call).any()
    for layer in range(len(LENGTHS)):
        expected = by_numpy.quantized_rows(
            call, layer, by_numpy.TableRotary(call), by_numpy.quantization(call, layer)
        )
        result = by_numpy.codes_of(call, layer)
        np.testing.assert_array_equal(result.keys, expected.keys)
        np.testing.assert_array_equal(result.values, expected.values)


@dims
@bits_of_codes
def test_rows_are_those_of_float32(kernels: KernelLibrary, device: torch.device, dim: int, bits: int) -> None:
    call = call_of(device, dim, bits)
    expected = by_numpy.unpacked(call)
    kernels.dequantize_rows(call)
    for layer, rows in enumerate(LENGTHS):
        keys, values = (cache[layer, 0, :, :rows].cpu().numpy() for cache in (call.k, call.v))
        np.testing.assert_array_equal(keys, expected.keys[layer])
        np.testing.assert_array_equal(values, expected.values[layer])


@bits_of_codes
def test_codes_are_nearly_those_of_float64(kernels: KernelLibrary, device: torch.device, bits: int) -> None:
    """The runtime subtracts biases in float64. Where a number lies at the border of two codes, that may give
    the other one."""
    call = call_of(device, 128, bits)
    kernels.quantize_rows(call)
    exact = by_numpy.quantization(call, 0, np.float64)
    expected = by_numpy.quantized_rows(call, 0, by_numpy.exact_rotary(call, THETA), exact)
    result = by_numpy.codes_of(call, 0)
    key_steps = (exact.stored_keys(result) - exact.stored_keys(expected)) / exact.key_scales
    value_steps = (exact.stored_values(result) - exact.stored_values(expected)) / exact.value_scales
    steps = np.abs(np.rint(np.concatenate([key_steps, value_steps])))
    assert steps.max() <= 1
    assert steps.mean() < 3e-4
