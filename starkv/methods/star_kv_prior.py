# SPDX-License-Identifier: Apache-2.0
"""The two stages of STaR-KV that remember: spatial prior and temporal discount."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starkv.methods import star_kv_stages as stages
from starkv.methods.prefill import Prefill
from starkv.methods.star_kv_plan import StarKVPlan
from starkv.methods.star_kv_state import StarKVState


@dataclass(frozen=True)
class Prior:
    """Results of the stages that have a state."""

    information: Tensor | None
    weights: Tensor
    after_mi: Tensor
    stability: Tensor | None
    distance: Tensor | None
    discount: Tensor | None
    after_temporal: Tensor

    @classmethod
    def joined(cls, parts: "list[Prior]") -> "Prior":
        """One after another along the batch."""

        def cat(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors, 1)

        return cls(**{name: cat(name) for name in cls.__dataclass_fields__})


def prior_and_discount(
    prefill: Prefill,
    grouped: Tensor,
    base: Tensor,
    sequences: slice,
    state: StarKVState,
    plan: StarKVPlan,
) -> tuple[Prior, StarKVState]:
    """Spatial prior and temporal discount of some sequences, with their state."""
    frame, count = prefill.frame, grouped.shape[2]
    start, is_past = prefill.frame_start[:, sequences], prefill.is_past[:, sequences]
    leading = grouped.argmax(2)
    inside = stages.frame_values(grouped, start, frame.cells)

    information, mi_ema = None, state.mi_ema
    if plan.mi_enabled:
        plug_in = stages.spatial_information(inside, frame.grid_rows, frame.grid_columns)
        information = ((plug_in - plan.mi_chance).clamp(min=0) * plan.mi_scale).to(grouped.dtype)
        mi_ema = plan.mi_decay * mi_ema + (1.0 - plan.mi_decay) * information
    if plan.mi_usable:
        weights = stages.group_weights(mi_ema, plan.mi_tau, plan.mi_stretch)
    else:
        weights = torch.full_like(mi_ema, 1.0 / count)
    after_mi = stages.weigh_groups(base, leading, weights, plan.mi_weight)

    stability = distance = discount = None
    after_temporal, pattern_ema = after_mi, state.pattern_ema
    if plan.temporal_update:
        pattern = stages.attention_pattern(inside.float())
        updated = pattern
        if plan.pattern_usable:
            updated = plan.temporal_rho * pattern_ema + (1.0 - plan.temporal_rho) * pattern
        if not plan.temporal_earlier:
            stability = stages.pattern_stability(pattern, updated)
        elif plan.pattern_usable:
            stability = stages.pattern_stability(pattern, pattern_ema)
        else:
            stability = torch.zeros_like(pattern[..., 0])
        pattern_ema = updated
        distance = stages.frame_distance(prefill.row_frame[:, sequences], is_past, frame)
        discount = stages.temporal_discount(
            distance,
            stability.gather(-1, leading),
            plan.temporal_delta,
            plan.temporal_eps,
            plan.temporal_floor,
        )
        if plan.temporal_apply:
            after_temporal = after_mi * discount.to(after_mi.dtype)
    prior = Prior(information, weights, after_mi, stability, distance, discount, after_temporal)
    return prior, replace(state, mi_ema=mi_ema, pattern_ema=pattern_ema)
