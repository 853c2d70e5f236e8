# SPDX-License-Identifier: Apache-2.0
"""Which parts of STaR-KV had a say in one compression.

Whether a part counts follows from the plan, which the engine works out from the same counters before it looks
at any score. Two things are seen only afterwards: whether entropy moved rows between layers, from what the
layers hold, and whether the spatial prior told groups apart, from the scores. It may count and weigh all of
them alike: official mode's estimate is the same for every group up to 144 tokens, native's may find nothing
but chance.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from starkv.methods.names import STAR_KV
from starkv.methods.rows import PromptRows
from starkv.methods.star_kv_plan import StarKVPlan, StarKVProgress
from starkv.methods.star_kv_request import StarKVRequest, request_star_kv
from starkv.runtime.kv.policy import KvPolicy

BOOST, PRIOR, UNEVEN = "boost", "prior", "uneven_prior"
DISCOUNT, ENTROPY = "discount", "entropy"
COMPONENTS = (PRIOR, UNEVEN, DISCOUNT, ENTROPY, BOOST)
LABELS = {
    PRIOR: "spatial prior",
    UNEVEN: "of these telling groups apart",
    DISCOUNT: "temporal discount",
    ENTROPY: "entropy moved rows between layers",
    BOOST: "hidden-norm boost",
}
_BOOSTED, _WEIGHED = 1, 2
"""Stages of the scores before and after the prior."""
_ROUNDING = 1e-5
"""Relative; a prior that weighs all groups alike multiplies with one, give or take a rounding error."""


def request_of(
    policy: KvPolicy, prompt: PromptRows, progress: StarKVProgress, observation_window: int
) -> StarKVRequest | None:
    """What a compression by STaR-KV is going to do; None where nothing is compressed, or by another method.

    Args:
        policy: method and budget.
        prompt: the prompt's rows.
        progress: the trajectory's counters before it.
        observation_window: most queries that the decoder puts out.
    """
    if policy.method != STAR_KV or policy.keeps_all(prompt.length):
        return None
    kept = policy.kept_rows(prompt.length)
    return request_star_kv(policy.star_kv, prompt, kept, progress, observation_window)


def components_acted(
    request: StarKVRequest, layer_rows: Sequence[int], stages: NDArray[np.float32]
) -> tuple[str, ...]:
    """Parts that had a say, as names of ``COMPONENTS``.

    Args:
        request: of the compression.
        layer_rows: rows that each layer holds after it.
        stages: ``[L, 4, S]`` scores after each stage, see ``Compressed.stages``.
    """
    plan = request.plan
    even = request.window + request.limits.mean
    prior = plan.mi_weight > 0 and plan.mi_usable
    before, after = stages[:, _BOOSTED], stages[:, _WEIGHED]
    found = {
        PRIOR: prior,
        UNEVEN: prior and bool((np.abs(after - before) > _ROUNDING * np.abs(before)).any()),
        DISCOUNT: _discounts(plan),
        ENTROPY: plan.layer_budget and any(rows != even for rows in layer_rows),
        BOOST: plan.boost > 0,
    }
    return tuple(name for name in COMPONENTS if found[name])


def _discounts(plan: StarKVPlan) -> bool:
    """Whether older screenshots count less in this call."""
    if not plan.temporal_apply:
        return False
    # Compared with earlier patterns where there are none, every group counts as unstable: a factor of one.
    nothing_to_compare = plan.temporal_earlier and not plan.pattern_usable
    return not nothing_to_compare or plan.temporal_eps > 0
