# SPDX-License-Identifier: Apache-2.0
"""Latents into packed rows and back (STAR-KV, arXiv 2606.08382).

A block of a token is quantized symmetrically: ``scale = max(max |x|, 1e-5) / largest code`` in float32,
``code = clip(rint(x / scale))``. The scale is stored as bfloat16, after the codes are worked out. Codes of 4
bits are stored with 8 added, codes of 8 bits as signed bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from starkv.lowrank.latent_format import (
    KeyLanes,
    LatentFormat,
    outliers,
    value_code_bytes,
)

LEAST_MAGNITUDE = np.float32(1e-5)
"""A block of zeros has the scale of this magnitude, so that no scale is zero."""
NIBBLE_OFFSET = 8
"""What a stored code of 4 bits has added: 8 stands for zero."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of keys or of values."""

    codes: NDArray[Any]
    """``[..., bytes]``: uint8 with two codes in each, or int8."""
    scales: NDArray[Any]
    """bfloat16: ``[..., groups, 2]`` for keys, ``[..., 2]`` for values; outliers first."""

    @property
    def bytes_per_row(self) -> int:
        """Memory of one token."""
        rows = math.prod(self.codes.shape[:-1])
        return int(self.codes.nbytes + self.scales.nbytes) // rows


def quantize_block(block: NDArray[Any], bits: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Signed codes ``[..., n]`` of a block ``[..., n]`` and its float32 scale ``[...]``; 1 where n is 0.

    Raises:
        ValueError: the block holds values that are not finite.
    """
    exact = np.asarray(block, np.float32)
    if not np.isfinite(exact).all():
        raise ValueError("latents that are not finite numbers can't be packed")
    if exact.shape[-1] == 0:
        return exact.astype(np.int8), np.ones(exact.shape[:-1], np.float32)
    largest = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(exact).max(axis=-1), LEAST_MAGNITUDE) / np.float32(largest)
    codes = np.clip(np.rint(exact / scale[..., None]), -largest - 1, largest)
    return codes.astype(np.int8), scale


def pack_keys(latents: Sequence[NDArray[Any]], latent: LatentFormat) -> PackedRows:
    """Pack the groups' key latents, each ``[..., rank]`` with its own rank.

    Raises:
        ValueError: a latent is not finite, or the format is not one of codes.
    """
    lanes = KeyLanes(tuple(values.shape[-1] for values in latents))
    parts, scales = zip(*(_quantize(values, latent) for values in latents), strict=True)
    return PackedRows(_store(lanes.join(parts), latent), _stored_scales(np.stack(scales, axis=-2)))


def unpack_keys(rows: PackedRows, lanes: KeyLanes, latent: LatentFormat) -> list[NDArray[np.float32]]:
    """Latents ``[..., rank]`` of each group, float32."""
    codes = _load(rows.codes, latent, lanes.lanes)
    scales = rows.scales.astype(np.float32)
    flat = scales.reshape(*scales.shape[:-2], -1)
    return lanes.split(codes * flat[..., lanes.scale_of_lane])


def pack_values(values: NDArray[Any], latent: LatentFormat) -> PackedRows:
    """Pack the value latents ``[..., rank]``.

    Raises:
        ValueError: a latent is not finite, or the format is not one of codes.
    """
    codes, scales = _quantize(values, latent)
    first = outliers(values.shape[-1])
    stored = np.concatenate([_store(codes[..., :first], latent), _store(codes[..., first:], latent)], axis=-1)
    missing = value_code_bytes(values.shape[-1], latent) - stored.shape[-1]
    padding = _store(np.zeros((*codes.shape[:-1], missing * 8 // latent.lane_bits), np.int8), latent)
    return PackedRows(np.concatenate([stored, padding], axis=-1), _stored_scales(scales))


def unpack_values(rows: PackedRows, rank: int, latent: LatentFormat) -> NDArray[np.float32]:
    """Value latents ``[..., rank]``, float32."""
    first = outliers(rank)
    outlier_bytes = -(-first * latent.lane_bits // 8)
    scales = rows.scales.astype(np.float32)
    parts = (
        _load(rows.codes[..., :outlier_bytes], latent, first) * scales[..., :1],
        _load(rows.codes[..., outlier_bytes:], latent, rank - first) * scales[..., 1:],
    )
    return np.concatenate(parts, axis=-1)


def pack_nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Signed codes ``[..., n]`` of 4 bits as ``[..., ⌈n/2⌉]`` bytes; an odd last one is filled up by 0."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    stored = (codes + NIBBLE_OFFSET).astype(np.uint8)
    packed: NDArray[np.uint8] = stored[..., 0::2] | (stored[..., 1::2] << np.uint8(4))
    return packed


def unpack_nibbles(stored: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    """The first ``count`` signed codes of bytes ``[..., at least ⌈count/2⌉]``."""
    halves = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8)
    flat = halves.reshape(*stored.shape[:-1], 2 * stored.shape[-1])
    codes: NDArray[np.int8] = flat[..., :count] - np.int8(NIBBLE_OFFSET)
    return codes


def _quantize(latents: NDArray[Any], latent: LatentFormat) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes ``[..., rank]`` and scales ``[..., 2]`` of both blocks."""
    if not latent.quantized:
        raise ValueError(
            f"latents of the format {latent.name} are stored as they are: there is nothing to pack"
        )
    first = outliers(latents.shape[-1])
    outlier_codes, outlier_scale = quantize_block(latents[..., :first], latent.outlier_bits)
    inlier_codes, inlier_scale = quantize_block(latents[..., first:], latent.inlier_bits)
    codes = np.concatenate([outlier_codes, inlier_codes], axis=-1)
    return codes, np.stack([outlier_scale, inlier_scale], axis=-1)


def _store(codes: NDArray[np.int8], latent: LatentFormat) -> NDArray[Any]:
    return pack_nibbles(codes) if latent.lane_bits == 4 else codes


def _load(stored: NDArray[Any], latent: LatentFormat, count: int) -> NDArray[np.int8]:
    return unpack_nibbles(stored, count) if latent.lane_bits == 4 else stored[..., :count]


def _stored_scales(scales: NDArray[np.float32]) -> NDArray[Any]:
    return scales.astype(ml_dtypes.bfloat16)
