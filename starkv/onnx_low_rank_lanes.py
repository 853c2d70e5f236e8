# SPDX-License-Identifier: Apache-2.0
"""How ``LowRankKVAttention`` reads the packed latents, see ``onnx_low_rank.py``.

Half bytes are not put back into the order of the channels, which would move single numbers about. All low
halves are followed by all high halves, and the rows of the constant factor take the same order instead.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from starkv.onnx_function_body import FunctionBody
from starkv.onnx_low_rank_shape import LowRankShape

_F32 = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Lanes:
    """Latents in the order in which they come out of storage."""

    values: str
    channels: npt.NDArray[np.int64]
    """Which channel each lane is; for padding any."""
    factors: npt.NDArray[np.float32]
    """What each lane must be multiplied by; the constant factor is multiplied instead."""


def _in_order(values: str, count: int) -> Lanes:
    return Lanes(values, np.arange(count), np.ones(count, np.float32))


def _half_bytes(body: FunctionBody, codes: str, channels: int) -> Lanes:
    """u8 [...,n] → float32 [...,2n]: codes without their offset of 8, low halves divided by 16.

    In floating point, because bytes are masked and shifted one by one in ONNX Runtime but numbers are not.
    """
    sixteenths = body.op("Mul", body.op("Cast", codes, to=_F32), body.scalar(1 / 16))
    high = body.op("Floor", sixteenths)
    low = body.op("Sub", body.op("Sub", sixteenths, high), body.scalar(8 / 16))
    values = body.concat([low, body.op("Sub", high, body.scalar(8))])
    count = -(-channels // 2)
    order = np.concatenate([np.arange(0, 2 * count, 2), np.arange(1, 2 * count, 2)])
    factors = np.repeat(np.array([16, 1], np.float32), count)
    padding = order >= channels
    return Lanes(values, np.where(padding, 0, order), np.where(padding, np.float32(0), factors))


def key_lanes(body: FunctionBody, shape: LowRankShape, codes: str, scales: str | None) -> list[Lanes]:
    """Latents of each group of KV heads.

    Args:
        codes: [B,n,...] as stored.
        scales: [B,n,G,2], None where latents are floating point.

    Returns:
        Per group lanes of [B*n, its width]; channels and factors count the group's lanes.
    """
    half = 2 if shape.storage == "int4" else 1
    layout = shape.key_lanes
    widths = layout.widths
    flat = body.reshape(codes, -1, sum(widths) // half)
    pieces = body.split(flat, tuple(width // half for width in widths))
    if scales is None:
        return [_in_order(piece, width) for piece, width in zip(pieces, widths, strict=True)]
    flat_scales = body.reshape(body.op("Cast", scales, to=_F32), -1, 2 * len(widths))
    lanes = []
    for piece, width, offset in zip(pieces, widths, layout.offsets, strict=True):
        if half == 2:
            group_lanes = _half_bytes(body, piece, width)
        else:
            group_lanes = _in_order(body.op("Cast", piece, to=_F32), width)
        scale_of_lane = layout.scale_of_lane[offset + group_lanes.channels]
        spread = np.zeros((2 * len(widths), width), np.float32)
        spread[scale_of_lane, np.arange(width)] = 1
        # A product with ones spreads the scales over their lanes much faster than Gather.
        lane_scales = body.op("MatMul", flat_scales, body.constant(spread))
        values = body.op("Mul", group_lanes.values, lane_scales)
        lanes.append(Lanes(values, group_lanes.channels, group_lanes.factors))
    return lanes


def value_latents(
    body: FunctionBody, shape: LowRankShape, weights: str, codes: str, scales: str | None
) -> Lanes:
    """Latents of the values, summed with the attention weights.

    Scales belong to rows, so the weights are multiplied by them instead of the latents.

    Args:
        weights: [B,Hq,n].
        codes: [B,n,...] as stored.
        scales: [B,n,2], None where latents are floating point.

    Returns:
        Lanes of [B,Hq,lanes].
    """
    if scales is None:
        return _in_order(body.op("MatMul", weights, codes), shape.value_rank)
    by_block = body.op("Transpose", body.op("Cast", scales, to=_F32), perm=[0, 2, 1])
    block_scales = body.split(by_block, (1, 1), axis=1)
    blocks: list[Lanes] = []
    start, first = 0, 0
    for channels, block_scale in zip(shape.value_blocks, block_scales, strict=True):
        if channels == 0:
            continue
        stored = -(-channels // 2) if shape.storage == "int4" else channels
        piece = body.op("Slice", codes, body.ints(start), body.ints(start + stored), body.ints(2))
        if shape.storage == "int4":
            lanes = _half_bytes(body, piece, channels)
        else:
            lanes = _in_order(body.op("Cast", piece, to=_F32), channels)
        scaled = body.op("Mul", weights, block_scale)
        values = body.op("MatMul", scaled, lanes.values)
        blocks.append(Lanes(values, lanes.channels + first, lanes.factors))
        start, first = start + stored, first + channels
    return Lanes(
        body.concat([block.values for block in blocks]),
        np.concatenate([block.channels for block in blocks]),
        np.concatenate([block.factors for block in blocks]),
    )
