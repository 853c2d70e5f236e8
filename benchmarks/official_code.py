# SPDX-License-Identifier: Apache-2.0
"""The official STaR-KV code, from the reader's checkout: its licence (CC BY-NC) does not let us ship it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starkv.methods.star_kv_config import StarKVConfig


def official_clusters(
    checkout: Path, layers: int, spans: Sequence[tuple[int, int]], window: int, kept_rows: int
) -> list[Any]:
    """A ``STARKVGroupCluster`` with its own state for each layer, set up as the reproduction script does.

    Args:
        checkout: of github.com/kawhiiiileo/STaR-KV.
        layers: how many.
        spans: first row and end of each screenshot.
        window: observation window.
        kept_rows: rows of a layer, the window included.
    """
    sys.path.insert(0, str(checkout / "starkv"))
    from starkv_group_cluster import STARKVGroupCluster  # type: ignore[import-not-found]

    config, clusters = StarKVConfig.official(), []
    for _ in range(layers):
        cluster = STARKVGroupCluster(
            window_size=window,
            max_capacity_prompt=kept_rows,
            kernel_size=config.kernel,
            pooling=config.pooling,
        )
        cluster.attn_parent = SimpleNamespace(
            config=SimpleNamespace(alpha=config.boost, temperature=config.boost_temperature),
            vision_start_idx=[start for start, _ in spans],
            vision_end_idx=[end for _, end in spans],
            kv_group_online_profile_steps=config.mi_profile_steps,
            kv_group_soft_prior_lambda=config.mi_weight,
            kv_group_online_profile_decay=config.mi_decay,
            kv_group_online_profile_tau=config.mi_tau,
            kv_group_online_profile_lambda_ramp_steps=config.mi_ramp_steps,
            kv_group_temporal_enable=True,
            kv_group_temporal_rho=config.temporal_rho,
            kv_group_temporal_discount_min=config.temporal_floor,
            kv_group_temporal_delta=config.temporal_delta,
            kv_group_temporal_eps=config.temporal_eps,
            kv_group_temporal_warmup_steps=config.temporal_warmup,
            kv_entropy_budget_enable=True,
            kv_entropy_budget_min_scale=config.entropy_min,
            kv_entropy_budget_max_scale=config.entropy_max,
            kv_entropy_budget_smooth=config.entropy_smooth,
        )
        clusters.append(cluster)
    return clusters
