# SPDX-License-Identifier: Apache-2.0
"""Which parts of STaR-KV had a say in one compression.

All but one follow from the plan, which the engine works out from the same counters before it looks at any
score. Whether entropy moved rows between layers is seen from what the layers hold afterwards.
"""

from collections.abc import Sequence

from starkv.methods.names import STAR_KV
from starkv.methods.rows import PromptRows
from starkv.methods.star_kv_plan import StarKVPlan, StarKVProgress
from starkv.methods.star_kv_request import StarKVRequest, request_star_kv
from starkv.runtime.kv.policy import KvPolicy

BOOST, PRIOR, DISCOUNT, ENTROPY = "boost", "prior", "discount", "entropy"
COMPONENTS = (PRIOR, DISCOUNT, ENTROPY, BOOST)
LABELS = {
    PRIOR: "spatial prior",
    DISCOUNT: "temporal discount",
    ENTROPY: "entropy moved rows between layers",
    BOOST: "hidden-norm boost",
}


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


def components_acted(request: StarKVRequest, layer_rows: Sequence[int]) -> tuple[str, ...]:
    """Parts that had a say, as names of ``COMPONENTS``.

    Args:
        request: of the compression.
        layer_rows: rows that each layer holds after it.
    """
    plan = request.plan
    even = request.window + request.limits.mean
    found = {
        PRIOR: plan.mi_weight > 0 and plan.mi_usable,
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
