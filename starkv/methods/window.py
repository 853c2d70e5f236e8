# SPDX-License-Identifier: Apache-2.0
"""Scores from the attention of a prompt's last queries: the common ground of SnapKV and its descendants."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from starkv.methods.star_kv_config import Pooling


def window_scores(queries: Tensor, keys: Tensor, kv_len: Tensor) -> Tensor:
    """Attention mass that the window's queries give to each row before the window.

    Softmax runs over all rows that a query sees, its own part of the window included, in float32; every other
    step is in the keys' dtype, rounded where the official code rounds (docs/spec/star-kv.md §1, step 2).

    Args:
        queries: ``[L, B, H, W, D]``, the last W queries.
        keys: ``[L, B, G, C, D]``; KV heads are read in place, not repeated.
        kv_len: ``[L, B]``.

    Returns:
        ``[L, B, H, C]`` in the keys' dtype; 0 in the window and behind the valid rows.
    """
    layers, batch, heads, window, dim = queries.shape
    groups, capacity = keys.shape[2], keys.shape[3]
    grouped = queries.reshape(layers, batch, groups, -1, dim).to(keys.dtype)
    row = torch.arange(capacity, device=keys.device)
    query = torch.arange(window, device=keys.device)[:, None]
    past = (kv_len - window)[..., None, None]
    hidden = (row > past + query)[:, :, None]
    if keys.dtype == torch.float32:
        # The softmax in place and its sum as a product: every further tensor or pass of this size costs as
        # much as the arithmetic.
        scores = torch.matmul(grouped / math.sqrt(dim), keys.transpose(-1, -2))
        scores = scores.view(layers, batch, heads, window, capacity).masked_fill_(hidden, -torch.inf)
        scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        share = scores.sum(-1).reciprocal_()
        mass = torch.matmul(share[..., None, :], scores).squeeze(-2)
    else:
        scores = torch.matmul(grouped, keys.transpose(-1, -2)).div_(math.sqrt(dim))
        scores = scores.view(layers, batch, heads, window, capacity).masked_fill_(hidden, -torch.inf)
        mass = scores.softmax(-1, dtype=torch.float32).to(keys.dtype).sum(-2)
    return mass.masked_fill_((row >= past[..., 0, :])[:, :, None], 0.0)


def pool_scores(scores: Tensor, is_past: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """Pool along the rows, stride 1, so that neighbours of an attended row count as well.

    Average pooling counts the zeros of its padding, so rows at both ends lose (docs/spec/star-kv.md §1, step
    3).

    Args:
        scores: ``[L, B, H, C]``, 0 outside the past.
        is_past: ``[L, B, C]`` bool.
        kernel: width, odd.
        pooling: ``avgpool`` or ``maxpool``.

    Returns:
        ``[L, B, H, C]``, 0 outside the past.
    """
    flat = scores.flatten(0, 1)
    if pooling == "avgpool":
        pooled = F.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    else:
        # Scores are at least 0, so the zeros outside the past are no better than no row at all.
        pooled = F.max_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    return pooled.view_as(scores).masked_fill_(~is_past[:, :, None], 0.0)


def hidden_norm_boost(hidden_norm: Tensor, in_frame: Tensor, alpha: float, temperature: float) -> Tensor:
    """Extra score for the newest screenshot's tokens with large hidden states, ``alpha`` in total.

    Softmax of the standardised norms (GUI-KV; docs/spec/star-kv.md §1, step 4). A screenshot of one token has
    no
    deviation: all of ``alpha`` goes to it.

    Args:
        hidden_norm: ``[L, B, C]``.
        in_frame: ``[L, B, C]`` bool.
        alpha: mass to spread.
        temperature: of the softmax.

    Returns:
        ``[L, B, C]`` f32, 0 outside the screenshot.
    """
    norm = hidden_norm.float()
    count = in_frame.sum(-1, keepdim=True).float()
    mean = torch.where(in_frame, norm, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(in_frame, norm - mean, 0.0)
    variance = deviation.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    z = deviation / (variance.sqrt() + 1e-8)
    logits = torch.where(in_frame, z / temperature, -torch.inf)
    # Without a screenshot every logit is −inf and the softmax is not a number anywhere.
    return torch.where(in_frame, alpha * logits.softmax(-1), 0.0)
