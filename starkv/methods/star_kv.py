# SPDX-License-Identifier: Apache-2.0
"""STaR-KV (arXiv 2606.01790): keep the visual tokens that matter. The PyTorch reference.

``score`` and ``compress`` are pure: a trajectory's state goes in and comes out. The stages lie in
``star_kv_stages.py`` and ``window.py``; the numbers that depend on counters alone come from
``star_kv_plan.py``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starkv.methods import star_kv_stages as stages
from starkv.methods.prefill import Prefill
from starkv.methods.select import Kept, compact, select_rows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_plan import (
    LayerLimits,
    layer_limits,
    plan_step,
    skipped_call,
)
from starkv.methods.star_kv_prior import Prior, prior_and_discount
from starkv.methods.star_kv_state import StarKVState
from starkv.methods.window import hidden_norm_boost, pool_scores, window_scores


@dataclass(frozen=True)
class StarKVScores:
    """Final scores and every stage on the way, for tests and for people who want to see what happens.

    All ``[L, B, …]``; rows outside the past hold 0 or nothing meaningful, ``priorities`` excepted.
    """

    pooled: Tensor
    """``[L, B, H, C]``: pooled attention of the window."""
    boost: Tensor
    """``[L, B, C]``."""
    groups: Tensor
    """``[L, B, G, C]``: boosted scores per KV head."""
    information: Tensor | None
    """``[L, B, G]``: spatial information of this prompt, if it was worked out."""
    weights: Tensor
    """``[L, B, G]``: weights of the groups, sum 1."""
    mi_weight: float
    """How strongly they counted."""
    after_mi: Tensor
    """``[L, B, C]``."""
    stability: Tensor | None
    """``[L, B, G]``, if there are older screenshots."""
    distance: Tensor | None
    """``[L, B, C]``."""
    discount: Tensor | None
    """``[L, B, C]``; not applied during warm-up."""
    after_temporal: Tensor
    """``[L, B, C]``."""
    entropy: Tensor
    """``[L, B]``: normalized entropy of the boosted scores."""
    temperature: Tensor
    """``[L, B]``."""
    final: Tensor
    """``[L, B, C]``."""
    priorities: Tensor
    """``[L, B, 1, C]`` f32, see :meth:`Prefill.priorities`."""


def score(prefill: Prefill, state: StarKVState, config: StarKVConfig) -> tuple[StarKVScores, StarKVState]:
    """Score every row of a prefilled cache.

    In official mode a batch shares one state, sequence after sequence, and one temperature, as in the
    official code; its state has B = 1. In native mode every sequence has its own.

    Returns:
        the scores and the state after this prompt.
    """
    groups = prefill.keys.shape[2]
    dtype = torch.float32 if config.score_dtype == "float32" else prefill.keys.dtype
    plan, progress = plan_step(config, state.progress, prefill.frame)

    mass = window_scores(prefill.window_queries.to(dtype), prefill.keys.to(dtype), prefill.kv_len)
    pooled = pool_scores(mass, prefill.is_past, config.kernel, config.pooling)
    if prefill.hidden_norm is not None and plan.boost > 0:
        norm = prefill.hidden_norm.to(dtype)
        boost = hidden_norm_boost(norm, prefill.in_frame, plan.boost, plan.boost_temperature).to(dtype)
    else:
        boost = torch.zeros_like(pooled[:, :, 0])
    boosted = pooled + boost[:, :, None]
    grouped = stages.group_scores(boosted, groups)
    base = boosted.mean(2)

    entropy = stages.normalized_entropy(base, prefill.past)
    temperature = stages.entropy_temperature(entropy, plan.entropy_min, plan.entropy_max)
    if plan.entropy_smooth:
        temperature = plan.entropy_smooth * state.temperature + (1.0 - plan.entropy_smooth) * temperature
    shared = config.is_official
    if shared:
        temperature = temperature.mean(1, keepdim=True)

    if shared and len(grouped[0]) > 1:
        parts, after = [], replace(state, progress=progress)
        for sequence in range(len(grouped[0])):
            if sequence:
                plan_of, progress = plan_step(
                    config, after.progress, prefill.frame, count_temporal_step=False
                )
            else:
                plan_of = plan
            one = slice(sequence, sequence + 1)
            part, after = prior_and_discount(
                prefill, grouped[:, one], base[:, one], one, replace(after, progress=progress), plan_of
            )
            parts.append(part)
        prior = Prior.joined(parts)
    else:
        prior, after = prior_and_discount(
            prefill, grouped, base, slice(None), replace(state, progress=progress), plan
        )

    final = prior.after_temporal
    if plan.entropy_power:
        final = stages.sharpen(final, temperature.expand_as(entropy))
    scores = StarKVScores(
        pooled=pooled,
        boost=boost,
        groups=grouped,
        information=prior.information,
        weights=prior.weights,
        mi_weight=plan.mi_weight,
        after_mi=prior.after_mi,
        stability=prior.stability,
        distance=prior.distance,
        discount=prior.discount,
        after_temporal=prior.after_temporal,
        entropy=entropy,
        temperature=temperature.expand_as(entropy),
        final=final,
        priorities=prefill.priorities(final[:, :, None]),
    )
    return scores, replace(after, temperature=temperature)


def compress(
    prefill: Prefill,
    state: StarKVState,
    config: StarKVConfig,
    rows: int,
    length: int,
    protected: int = 0,
) -> tuple[Kept | None, StarKVScores | None, StarKVState]:
    """Score and compact a prompt's cache.

    Args:
        prefill: the cache of sequences of equal length.
        state: the trajectory's state.
        config: hyper-parameters.
        rows: rows per layer to keep on average, the window included (the official ``capacity``).
        length: rows of the prompt, ``kv_len`` as the host knows it.
        protected: how many rows of ``row_meta`` may not be evicted.

    Returns:
        the compacted cache, the scores and the new state; the first two are None where the prompt is shorter
        than ``rows`` and stays as it is.

    Raises:
        UsageError: the window leaves nothing to compete, or ``rows`` is too small for the protected rows.
    """
    if length < rows:
        return None, None, replace(state, progress=skipped_call(config, state.progress))
    plan, _ = plan_step(config, state.progress, prefill.frame)
    limits = layer_limits(plan, rows, prefill.window, length - prefill.window, protected)
    scores, after = score(prefill, state, config)
    return keep_best(prefill, scores, limits), scores, after


def kept_per_layer(entropy: Tensor, past: Tensor, window: int, limits: LayerLimits) -> Tensor:
    """Rows that each layer keeps, its window included: ``[L, B]`` int64.

    Args:
        entropy: ``[L, B]`` of all layers, normalized.
        past: ``[L, B]`` rows that compete.
        window: W.
        limits: of a layer's rows.
    """
    needed = stages.effective_rows(entropy, past)
    return window + stages.layer_rows(needed, limits.mean, limits.floor, limits.ceiling)


def keep_best(prefill: Prefill, scores: StarKVScores, limits: LayerLimits) -> Kept:
    """Give every layer its budget and keep the best rows."""
    keep = kept_per_layer(scores.entropy, prefill.past, prefill.window, limits)
    chosen = select_rows(scores.priorities, keep, prefill.window + limits.ceiling)
    return compact(prefill, chosen, keep)
