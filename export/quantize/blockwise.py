# SPDX-License-Identifier: Apache-2.0
"""Symmetric blockwise weight quantization: the arithmetic of ``DequantizeLinear`` with a block size."""

import numpy as np
import numpy.typing as npt

from starkv.errors import UsageError
from starkv.export.quantize.columns import Bits

BLOCK_SIZES = (128, 64, 32)
"""Block sizes in the order in which they are tried; runtimes have fast kernels for these."""


def choose_block_size(features: int, preferred: int, name: str) -> int:
    """Return the largest block size up to ``preferred`` that divides the ``features`` of layer ``name``.

    Raises:
        UsageError: none does.
    """
    for size in BLOCK_SIZES:
        if size <= preferred and features % size == 0:
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
    rows, columns = weight.shape
    blocks = weight.reshape(rows // block_size, block_size, columns)
    largest_code = 2 ** (bits - 1) - 1
    scales = (np.abs(blocks).max(axis=1) / np.float32(largest_code)).astype(np.float32)
    # A block of zeros, or one so small that its scale underflows, has codes of zero whatever the scale.
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    codes = np.rint(blocks / scales[:, None]).clip(-largest_code - 1, largest_code)
    return codes.astype(np.int8).reshape(rows, columns), scales


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
