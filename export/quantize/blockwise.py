# SPDX-License-Identifier: Apache-2.0
"""Symmetric blockwise weight quantization: the arithmetic of ``DequantizeLinear`` with a block size."""

import numpy as np
import numpy.typing as npt

from starkv.errors import UsageError
from starkv.export.quantize.columns import Bits

BLOCK_SIZES = (128, 64, 32)
"""Block sizes in the order in which they are tried; runtimes have fast kernels for these."""


def fitting_block_size(features: int, preferred: int) -> int | None:
    """Largest block size up to ``preferred`` that divides ``features``, or None."""
    return next((size for size in BLOCK_SIZES if size <= preferred and features % size == 0), None)


def choose_block_size(features: int, preferred: int, name: str) -> int:
    """Return the largest block size up to ``preferred`` that divides the ``features`` of layer ``name``.

    Raises:
        UsageError: none does.
    """
    size = fitting_block_size(features, preferred)
    if size is not None:
        return size
    raise UsageError(
        f"{name} has {features} input features, which no block size of {BLOCK_SIZES} divides; export as fp32"
    )


def quantize_blockwise(
    weight: npt.NDArray[np.float32], bits: Bits, block_size: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a weight [K,N] to integer codes with one scale for ``block_size`` rows of a column.

    Returns:
        Codes int8 [K,N] in −8…7 for 4 bits or −128…127 for 8, and scales float32 [K/block_size,N];
        ``codes * scales`` is at most half a scale from the weight.
    """
    codes, scales = quantize_rows(np.ascontiguousarray(weight.T), bits, block_size)
    return np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T)


def quantize_rows(
    weight: npt.NDArray[np.float32], bits: Bits, block_size: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """:func:`quantize_blockwise` of a weight that is stored as PyTorch does it.

    Args:
        weight: contiguous [N,K].
        bits: of a code.
        block_size: inputs that share a scale.

    Returns:
        Codes int8 [N,K] and scales float32 [N,K/block_size]. Where a weight is not finite, so is its scale.
    """
    rows, features = weight.shape
    blocks = weight.reshape(rows, features // block_size, block_size)
    largest_code = 2 ** (bits - 1) - 1
    # Without the temporary of np.abs: this is bound by memory.
    largest = np.maximum(blocks.max(axis=2), -blocks.min(axis=2))
    scales = (largest / np.float32(largest_code)).astype(np.float32)
    # A block of zeros, or one so small that its scale underflows, has codes of zero whatever the scale.
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    with np.errstate(invalid="ignore"):
        scaled = blocks / scales[:, :, None]
        np.rint(scaled, out=scaled)
        np.clip(scaled, -largest_code - 1, largest_code, out=scaled)
        codes = scaled.astype(np.int8)
    return codes.reshape(rows, features), scales


def dequantize_blockwise(
    codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Undo :func:`quantize_blockwise`: codes [K,N] and scales [K/block,N] → weight float32 [K,N]."""
    block_size = codes.shape[0] // scales.shape[0]
    return codes.astype(np.float32) * np.repeat(scales, block_size, axis=0)


def pack_int4(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Put two neighbouring 4-bit codes [K,N], N even, into one byte [K,N/2], the first in the low half."""
    low, high = codes[:, 0::2].view(np.uint8), codes[:, 1::2].view(np.uint8)
    packed: npt.NDArray[np.uint8] = (low & np.uint8(0x0F)) | (high << np.uint8(4))
    return packed
