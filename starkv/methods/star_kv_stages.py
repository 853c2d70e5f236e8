# SPDX-License-Identifier: Apache-2.0
"""The stages of STaR-KV's scoring (arXiv 2606.01790), each a pure function (docs/spec/star-kv.md §1-6).

All are vectorised over layers and sequences, loop over nothing and never wait for the device. Symbols: L
layers, B sequences, H query heads in G groups (one KV head each), C rows, N tokens of the newest screenshot.
"""

import torch
from torch import Tensor

from starkv.methods.expected_information import SPATIAL_BINS, VALUE_BINS
from starkv.methods.rows import Frame

_PLACES = SPATIAL_BINS * SPATIAL_BINS


def group_scores(scores: Tensor, groups: int) -> Tensor:
    """Mean over the query heads of each KV head: ``[L, B, H, C]`` → ``[L, B, G, C]`` (step 7)."""
    return scores.unflatten(2, (groups, -1)).mean(3)


def frame_values(per_row: Tensor, start: Tensor, cells: int) -> Tensor:
    """The newest screenshot's part of a score.

    Args:
        per_row: ``[L, B, G, C]``.
        start: ``[L, B]``, its first row.
        cells: N, its competing tokens.

    Returns:
        ``[L, B, G, N]``.
    """
    rows = start[..., None].long() + torch.arange(cells, device=per_row.device)
    return per_row.gather(-1, rows[:, :, None].expand(-1, -1, per_row.shape[2], -1))


def spatial_information(values: Tensor, grid_rows: int, grid_columns: int) -> Tensor:
    """Mutual information between where a token lies on the screen and how its score ranks (step 8, §4.2).

    The score's rank falls into 16 equally full bins, the place into 12 x 12 cells; plug-in estimate in
    float64. Equal scores rank by row. A screenshot without any score, or of one token, shows none.

    Args:
        values: ``[..., N]`` scores of the screenshot's tokens in reading order.
        grid_rows: rows of its grid.
        grid_columns: columns of its grid.

    Returns:
        ``[...]`` f32, nats, at least 0.
    """
    cells = values.shape[-1]
    if cells < 2:
        return values.new_zeros(values.shape[:-1], dtype=torch.float32)
    token = torch.arange(cells, device=values.device)
    row_bin = SPATIAL_BINS * (2 * (token // grid_columns) + 1) // (2 * grid_rows)
    column_bin = SPATIAL_BINS * (2 * (token % grid_columns) + 1) // (2 * grid_columns)
    limit = SPATIAL_BINS - 1
    place = row_bin.clamp(max=limit) * SPATIAL_BINS + column_bin.clamp(max=limit)
    positive = values.float().clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    order = positive.sort(dim=-1, stable=True).indices
    joint_bin = token * VALUE_BINS // cells * _PLACES + place[order]
    ones = torch.ones_like(joint_bin, dtype=torch.float64)
    counts = torch.zeros(*values.shape[:-1], VALUE_BINS * _PLACES, dtype=torch.float64, device=values.device)
    joint = counts.scatter_add_(-1, joint_bin, ones).unflatten(-1, (VALUE_BINS, _PLACES)) / cells
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    terms = joint * ((joint + 1e-12).log() - (independent + 1e-12).log())
    information = terms.sum((-2, -1)).clamp(min=0)
    return torch.where(total[..., 0] > 1e-12, information, 0.0).float()


def group_weights(information: Tensor, tau: float, stretch: bool) -> Tensor:
    """Weights of the groups, their sum 1: softmax of their information (step 8, §4.5).

    Args:
        information: ``[L, B, G]``.
        tau: temperature.
        stretch: first stretch the smallest and largest value to 0 and 1, whatever their distance.
    """
    if stretch:
        least = information.amin(-1, keepdim=True)
        width = information.amax(-1, keepdim=True) - least
        stretched = (information - least) / width.clamp(min=1e-12)
        information = torch.where(width < 1e-12, 0.5, stretched)
    return (information / tau).softmax(-1)


def weigh_groups(base: Tensor, leading: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Multiply each row's score with the weight of the group that attends to it most (step 9).

    Args:
        base: ``[L, B, C]``, mean score over all heads.
        leading: ``[L, B, C]``, that group.
        weights: ``[L, B, G]``, sum 1.
        strength: 0 leaves the scores, 1 applies the weights in full.
    """
    relative = weights.gather(-1, leading) * weights.shape[-1]
    return base * ((1.0 - strength) + strength * relative).to(base.dtype)


def attention_pattern(values: Tensor) -> Tensor:
    """Shape of each group's scores over the newest screenshot, their sum 1: ``[L, B, G, N]`` → the same."""
    positive = values.clamp(min=0)
    return positive / positive.sum(-1, keepdim=True).clamp(min=1e-8)


def pattern_stability(pattern: Tensor, reference: Tensor) -> Tensor:
    """Cosine between a group's pattern and a reference, clipped to [0, 1]: ``[L, B, G, N]`` twice → ``[L, B,
    G]``."""
    cosine = torch.cosine_similarity(pattern, reference, dim=-1, eps=1e-8)
    return cosine.clamp(0.0, 1.0)


def frame_distance(row_frame: Tensor, is_past: Tensor, frame: Frame) -> Tensor:
    """How many screenshots came after a row's own: ``[L, B, C]`` f32, 0 for text and the newest one (§6)."""
    older = is_past & (row_frame >= 0)
    return torch.where(older, frame.index - row_frame, 0).float()


def temporal_discount(distance: Tensor, stability: Tensor, delta: float, eps: float, floor: float) -> Tensor:
    """Discount of rows of older screenshots, the deeper the more stable their group's attention is (§6).

    ``floor + (1 − floor) · exp(−delta · distance · (eps + (1 − eps) · stability))``: entries of subspaces
    that keep looking at the same places are redundant ("suppresses redundant entries from persistently
    attended subspaces").

    Args:
        distance: ``[L, B, C]``.
        stability: ``[L, B, C]``, that of each row's leading group.
        delta: decay per screenshot.
        eps: least share of it that acts.
        floor: no discount is below this.
    """
    strength = eps + (1.0 - eps) * stability
    return floor + (1.0 - floor) * torch.exp(-delta * distance * strength)


def normalized_entropy(base: Tensor, past: Tensor) -> Tensor:
    """Entropy of a layer's scores, 1 where all rows score the same (§5).

    Args:
        base: ``[L, B, C]``, 0 outside the past.
        past: ``[L, B]`` rows that compete.

    Returns:
        ``[L, B]`` f32.
    """
    scores = base.float()
    share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-8)
    entropy = -(share * (share + 1e-8).log()).sum(-1)
    return entropy / (past.clamp(min=1).double().log() + 1e-8).float()


def entropy_temperature(normalized: Tensor, least: float, most: float) -> Tensor:
    """``least + (most − least) · entropy``: ``[L, B]`` → ``[L, B]`` (§5)."""
    return least + (most - least) * normalized


def sharpen(scores: Tensor, temperature: Tensor) -> Tensor:
    """``max(score, 0) ^ (1 / T)`` (step 11): a monotone map, so it changes no kept set.

    Args:
        scores: ``[L, B, C]``.
        temperature: ``[L, B]``.
    """
    return scores.clamp(min=0).pow(1.0 / temperature[..., None].to(scores.dtype))


def effective_rows(normalized: Tensor, past: Tensor) -> Tensor:
    """How many rows a layer's scores are spread over: the exponential of their entropy, 1 … past.

    Args:
        normalized: ``[L, B]``, entropy divided by that of equal scores.
        past: ``[L, B]`` rows that compete.
    """
    return torch.exp(normalized * past.clamp(min=1).double().log().float())


def layer_rows(needed: Tensor, mean: int, floor: int, ceiling: int) -> Tensor:
    """Competing rows that each layer keeps when entropy moves rows between layers, ``L · mean`` in total.

    Every layer gets ``clip(f · needed, floor, ceiling)`` for the one factor f that makes the total right. The
    total is piecewise linear in f with its knees where a layer meets a limit, so f lies on the line between
    two neighbouring knees. Rounding is cumulative (layer i gets what the running total grows by, rounded):
    the sum is exact, and no share is off by a whole row.

    Args:
        needed: ``[L, B]``, positive: what shares are in proportion to.
        mean: rows of a layer on average, its window not counted.
        floor: fewest rows of a layer.
        ceiling: most rows of a layer; equal to ``mean`` where nothing is to move.

    Returns:
        ``[L, B]`` int64.
    """
    # Scores that are not numbers say nothing of what a layer needs; rows must not become numbers at random.
    weights = needed.double().nan_to_num(nan=1.0)
    wanted = mean * len(weights)
    knees = torch.cat([floor / weights, ceiling / weights])
    totals = (knees[:, None] * weights).clamp(floor, ceiling).sum(1)
    # A knee's own total is only as exact as a division and a multiplication.
    below, above = totals <= wanted + 1e-6, totals >= wanted - 1e-6
    low = torch.where(below, knees, 0.0).amax(0)
    high = torch.where(above, knees, torch.inf).amin(0)
    low_total = torch.where(below, totals, 0.0).amax(0)
    high_total = torch.where(above, totals, torch.inf).amin(0)
    way = ((wanted - low_total) / (high_total - low_total).clamp(min=1e-9)).clamp(0.0, 1.0)
    shares = ((low + way * (high - low)) * weights).clamp(floor, ceiling)
    # A half and 2⁻²⁰, the same in every implementation: totals of exactly a half are common
    # where layers share a limit, and the last bit of a sum would give one of them a row above its ceiling.
    running = (shares.cumsum(0) + 0.50000095367431640625).floor()
    return torch.diff(running, dim=0, prepend=torch.zeros_like(running[:1])).long()
