# SPDX-License-Identifier: Apache-2.0
"""Low-rank decode attention in PyTorch and float32: what the kernels are compared with."""

import torch
from torch import Tensor

from starkv.kernels.cached_positions import rotate
from starkv.kernels.low_rank_call import DecodeResult, LowRankCall
from starkv.kernels.low_rank_factors import CODE_OFFSET, LatentForm, value_lanes


def lanes_of(rows: Tensor, form: LatentForm) -> Tensor:
    """``[..., lanes]`` f32 of cached rows: codes are numbers around 0, not yet scaled."""
    if form != "int4":
        return rows.float()
    return torch.stack((rows & 15, rows >> 4), -1).flatten(-2).float() - CODE_OFFSET


def key_latents(call: LowRankCall) -> list[Tensor]:
    """``[B, C, rank]`` f32 of each key factor."""
    lanes = lanes_of(call.keys, call.factors.form)
    latents = []
    for factor, rank in enumerate(call.factors.key_ranks):
        first, _, outliers = call.factors.lanes[factor].tolist()
        latent = lanes[..., first : first + rank]
        if call.key_scales is not None:
            latent = scaled(latent, call.key_scales[:, :, factor], outliers)
        latents.append(latent)
    return latents


def value_latents(call: LowRankCall) -> Tensor:
    """``[B, C, rank]`` f32."""
    factors = call.factors
    lanes = value_lanes(factors.form, factors.value_rank)
    latent = lanes_of(call.values, factors.form)[..., lanes.to(call.values.device)]
    return latent if call.value_scales is None else scaled(latent, call.value_scales, factors.value_outliers)


def scaled(codes: Tensor, scales: Tensor, outliers: int) -> Tensor:
    """Codes ``[..., rank]`` times the scale of their block; scales ``[..., 2]``."""
    blocks = codes.split((outliers, codes.shape[-1] - outliers), -1)
    return torch.cat([block * scales[..., at, None].float() for at, block in enumerate(blocks)], -1)


def lifted_keys(call: LowRankCall, sequence: int) -> Tensor:
    """``[G, C, D]`` f32 of a sequence: lifted, with bias, rotated by stored positions."""
    factors = call.factors
    heads = factors.up_k.shape[0]
    keys = []
    for factor, latent in enumerate(key_latents(call)):
        first, rank = int(factors.lanes[factor, 0]), factors.key_ranks[factor]
        keys += [latent[sequence] @ factors.up_k[head, first : first + rank].float() for head in range(heads)]
    return rotate(torch.stack(keys) + factors.key_bias[:, None], *call.where.angles(sequence))


def reference_low_rank_attention(call: LowRankCall) -> DecodeResult:
    """The same as :func:`starkv.kernels.triton_low_rank.low_rank_attention`, in float32."""
    batch, heads, dim = call.q.shape
    factors, capacity = call.factors, call.keys.shape[1]
    lanes = value_lanes(factors.form, factors.value_rank).to(call.q.device)
    latents = value_latents(call)
    result = DecodeResult(
        out=torch.zeros(batch, heads, dim, device=call.q.device),
        largest=torch.full((batch, heads), -torch.inf, device=call.q.device),
        total=torch.zeros(batch, heads, device=call.q.device),
    )
    for sequence, rows in enumerate(call.n_valid.tolist()):
        tail_rows = 0 if call.tail is None else int(call.tail.n_valid[sequence])
        tail_capacity = 0 if call.tail is None else call.tail.k.shape[2]
        if not (0 <= rows <= capacity and 0 <= tail_rows <= tail_capacity and rows + tail_rows):
            continue
        keys = lifted_keys(call, sequence)[:, :rows]
        values = latents[sequence, :rows] @ factors.up_v[:, lanes].float() + factors.value_bias[:, None]
        if call.tail is not None:
            bias = 0.0 if call.tail.values_have_bias else factors.value_bias[:, None]
            keys = torch.cat((keys, call.tail.k[sequence, :, :tail_rows].float()), 1)
            values = torch.cat((values, call.tail.v[sequence, :, :tail_rows].float() + bias), 1)
        attend(call.q[sequence], keys, values, sequence, result)
    return result


def attend(q: Tensor, keys: Tensor, values: Tensor, sequence: int, result: DecodeResult) -> None:
    """Fill in a sequence's result. ``q [H, D]``, keys and values ``[G, rows, D]`` f32."""
    queries = q.float().unflatten(0, (len(keys), -1))
    logits = queries @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
    largest = logits.amax(-1)
    mass = (logits - largest[..., None]).exp()
    result.largest[sequence], result.total[sequence] = largest.flatten(), mass.sum(-1).flatten()
    result.out[sequence] = (mass @ values / mass.sum(-1, keepdim=True)).flatten(0, 1)
