# SPDX-License-Identifier: Apache-2.0
"""Calls of decode attention as the numpy reference of ``starkv.lowrank`` takes them. Needs ml_dtypes."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from starkv.kernels.cached_positions import CachedPositions
from starkv.kernels.low_rank_call import LowRankCall
from starkv.kernels.low_rank_factors import value_lanes
from starkv.kernels.quantized_rows_call import QuantizedRowsCall
from starkv.lowrank.attend import Attended, LatentRows, Tail, attend_low_rank, attend_quantized
from starkv.lowrank.factor import Factor
from starkv.lowrank.latent_format import INT8, NIBBLES, KeyLanes
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.pack import PackedRows, unpack_keys, unpack_values
from starkv.lowrank.quantized_rows import QuantizedRows, RowQuantization
from starkv.lowrank.rotary import Rotary

Array = NDArray[Any]
_CODES = {"int8": INT8, "int4": NIBBLES}


def plain(tensor: Tensor) -> Array:
    """In float64."""
    values: Array = tensor.detach().cpu().double().numpy()
    return values


def factor(up: Array) -> Factor:
    """A factor that only lifts."""
    return Factor(up, up.T)


def layer_of(call: LowRankCall) -> LowRankLayer:
    """The factors as they were before they were laid out in lanes."""
    factors, lanes = call.factors, KeyLanes(call.factors.key_ranks)
    up_k = plain(factors.up_k)
    keys = [
        up_k[:, first : first + rank].transpose(0, 2, 1).reshape(-1, rank)
        for first, rank in zip(lanes.offsets, lanes.ranks, strict=True)
    ]
    up_v = plain(factors.up_v)[:, value_lanes(factors.form, factors.value_rank).numpy()]
    return LowRankLayer(
        keys=tuple(map(factor, keys)),
        values=factor(up_v.transpose(0, 2, 1).reshape(-1, factors.value_rank)),
        key_bias=plain(factors.key_bias),
        value_bias=plain(factors.value_bias),
    )


def packed(codes: Tensor, scales: Tensor) -> PackedRows:
    return PackedRows(codes.cpu().numpy(), plain(scales).astype(ml_dtypes.bfloat16))


def rows_of(call: LowRankCall, sequence: int) -> LatentRows:
    """A sequence's latents, unpacked."""
    factors, lanes = call.factors, KeyLanes(call.factors.key_ranks)
    positions = call.where.positions[sequence].cpu().numpy()
    valid = int(call.n_valid[sequence])
    keys, values = call.keys[sequence], call.values[sequence]
    if call.key_scales is None or call.value_scales is None:
        return LatentRows(lanes.split(plain(keys)), plain(values), positions, valid)
    codes = _CODES[factors.form]
    return LatentRows(
        unpack_keys(packed(keys, call.key_scales[sequence]), lanes, codes),
        unpack_values(packed(values, call.value_scales[sequence]), factors.value_rank, codes),
        positions,
        valid,
    )


def rotary_of(where: CachedPositions) -> Rotary:
    """The frequencies are the angles of position 1."""
    return Rotary(np.arctan2(plain(where.sines[1]), plain(where.cosines[1])), where.sections)


def low_rank(call: LowRankCall, sequence: int) -> Attended:
    """One sequence of a call."""
    heads, dim = call.factors.kv_heads, call.factors.head_dim
    tail = Tail(np.zeros((0, heads, dim)), np.zeros((0, heads, dim)))
    if call.tail is not None:
        held = int(call.tail.n_valid[sequence])
        keys, values = (plain(rows[sequence, :, :held]).swapaxes(0, 1) for rows in (call.tail.k, call.tail.v))
        missing = 0.0 if call.tail.values_have_bias else plain(call.factors.value_bias)
        tail = Tail(keys, values + missing)
    return attend_low_rank(
        plain(call.q[sequence]), rows_of(call, sequence), tail, layer_of(call), rotary_of(call.where)
    )


def quantized(call: QuantizedRowsCall, sequence: int) -> Attended:
    """One sequence of a call, whose keys' scales are the same for both channels of a pair."""
    assert call.key_bias is not None
    assert call.value_bias is not None
    quantization = RowQuantization(
        bits=8 if call.k.shape[-1] == call.q.shape[-1] else 4,
        key_scales=call.k_scales.cpu().numpy(),
        value_scales=call.v_scales.cpu().numpy(),
        key_bias=plain(call.key_bias.bias),
        value_bias=plain(call.value_bias),
    )
    where = call.key_bias.where
    k, v = (cache[sequence].transpose(0, 1).cpu().numpy() for cache in (call.k, call.v))
    rows = QuantizedRows(k, v, where.positions[sequence].cpu().numpy())
    nothing = np.zeros((0, *call.key_bias.bias.shape))
    return attend_quantized(
        plain(call.q[sequence]),
        rows,
        Tail(nothing, nothing),
        quantization,
        rotary_of(where),
        int(call.n_valid[sequence]),
    )
