# SPDX-License-Identifier: Apache-2.0
"""The reference of ``QuantizedKVAttention`` in PyTorch.

Codes are worked out in float32, every operation rounded on its own, so that any device can reproduce them to
the bit; attention in float64.
"""

import torch
from torch import Tensor

from starkv.kernels.quantized_attention_call import QuantizedAttentionCall


def encode(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of float32 ``[..., D]``: int8 ``[..., D]``, or for 4 bits uint8 ``[..., D/2]``.

    A code is the nearest integer to value / scale, ties to even, within what its bits hold. Of 4 bits it is
    stored plus 8, the even column in the lower half of a byte.
    """
    half = 1 << (bits - 1)
    codes = (values / scale).round().clamp(-half, half - 1).to(torch.int32)
    if bits == 8:
        return codes.to(torch.int8)
    codes = codes + half
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """The integers that codes stand for, f64 ``[..., D]``; the type says how many bits they have."""
    if codes.dtype == torch.int8:
        return codes.double()
    both = torch.stack((codes & 15, codes >> 4), -1)
    return both.flatten(-2).double() - 8


def rotated_bias(call: QuantizedAttentionCall, positions: Tensor) -> Tensor:
    """The keys' bias rotated to positions ``[..., 3]`` (t, h, w): f32 ``[..., G, D]``."""
    bias = call.k_bias.view(-1, call.head_dim)
    return rotated_to(bias, positions, call.cos_table, call.sin_table, call.mrope_section)


def rotated_to(
    bias: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    mrope_section: tuple[int, int, int],
) -> Tensor:
    """A bias f32 ``[G, D]`` rotated to positions ``[..., 3]`` (t, h, w), every operation rounded on its own.

    Args:
        cos_table: f32 ``[P, D/2]``; ``sin_table`` likewise.
        mrope_section: pairs of columns that rotate by t, h and w.

    Returns:
        f32 ``[..., G, D]``.
    """
    half = bias.shape[-1] // 2
    component = torch.repeat_interleave(
        torch.arange(3, device=positions.device), torch.tensor(mrope_section, device=positions.device)
    )
    rows, pairs = positions[..., component].long(), torch.arange(half, device=positions.device)
    cosine, sine = (table[rows, pairs].unsqueeze(-2) for table in (cos_table, sin_table))
    first, second = bias[:, :half], bias[:, half:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def reference_quantized_attention(call: QuantizedAttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """``QuantizedKVAttention``: ``out [B, 1, H·D]`` f64, ``present_k`` and ``present_v``.

    Rows behind ``kv_len`` are never read. A sequence that its cache can't hold, or whose new row has no place
    in the tables, is left alone, and its output is 0.
    """
    batch, groups, capacity, _ = call.past_k.shape
    dim, table_rows = call.head_dim, call.cos_table.shape[0]
    out = torch.zeros(batch, 1, call.heads * dim, dtype=torch.float64, device=call.q.device)
    present_k, present_v = call.past_k.clone(), call.past_v.clone()
    k_scale, v_scale, v_bias = (
        parameter.view(groups, dim) for parameter in (call.k_scale, call.v_scale, call.v_bias)
    )
    for b, held in enumerate(call.kv_len.tolist()):
        if held < 0 or held >= capacity:
            continue
        newest = call.positions[b, held]
        if int(newest.min()) < 0 or int(newest.max()) >= table_rows:
            continue
        key, value = (rows[b].float().view(groups, dim) for rows in (call.k, call.v))
        present_k[b, :, held] = encode(key - rotated_bias(call, newest), k_scale, call.bits)
        present_v[b, :, held] = encode(value - v_bias, v_scale, call.bits)
        bias = rotated_bias(call, call.positions[b, : held + 1]).transpose(0, 1).double()
        keys = decode(present_k[b, :, : held + 1]) * k_scale[:, None].double() + bias
        values = decode(present_v[b, :, : held + 1]) * v_scale[:, None].double()
        queries = call.q[b].double().view(groups, -1, dim)
        weights = (queries @ keys.transpose(-1, -2) / dim**0.5).softmax(-1)
        out[b] = (weights @ values + v_bias[:, None].double()).view(1, -1)
    return out, present_k, present_v
