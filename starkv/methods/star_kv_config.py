# SPDX-License-Identifier: Apache-2.0
"""Configuration of STaR-KV (arXiv 2606.01790). Needs no PyTorch: the runtime reads it as well."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from starkv.errors import UsageError
from starkv.methods.budget import window_rows

Pooling = Literal["avgpool", "maxpool"]
Mode = Literal["native", "official"]


@dataclass(frozen=True)
class StarKVConfig:
    """Hyper-parameters of STaR-KV and the changes that native mode makes, each behind its own field.

    The defaults are native mode. :meth:`official` is the paper's code with the values of its reproduction
    script, quirks included (docs/spec/star-kv.md §1-7).
    """

    window: int = 8
    """Rows at the end of the prompt whose attention scores the others; always kept."""
    window_share: float = 0.25
    """Of the kept rows, the window has no more than this: half of a tiny budget would go to a template's last
    marks."""
    kernel: int = 5
    """Width of the pooling over neighbouring tokens, odd."""
    pooling: Pooling = "avgpool"
    boost: float = 2.0
    """Mass that the hidden-norm boost spreads over the newest screenshot (``alpha``); 0 turns it off."""
    boost_temperature: float = 3.5

    mi: bool = True
    """Weigh groups of heads by the spatial information in their scores."""
    mi_weight: float = 0.5
    """Weight of that prior when fully on (``lambda``)."""
    mi_profile_steps: int = 0
    """Prefills that only profile before the prior begins to count; the paper's scripts use 5."""
    mi_ramp_steps: int = 1
    """Prefills over which the weight then grows to its full value; the paper's scripts use 10."""
    mi_decay: float = 0.9
    mi_tau: float = 0.1
    """Temperature of the softmax that turns information into weights of groups."""

    temporal: bool = True
    temporal_delta: float = 0.1
    temporal_rho: float = 0.9
    temporal_eps: float = 0.0
    temporal_floor: float = 0.0
    """No discount goes below this (``discount_min``)."""
    temporal_warmup: int = 0

    entropy: bool = True
    entropy_min: float = 0.75
    entropy_max: float = 1.25
    entropy_smooth: float = 0.0

    grid: Literal["true", "square"] = "true"
    """``square``: the official code takes every screenshot for a square, so rows of its 39 x 69 tokens slide
    by 17 columns. ``true``: the grid that the image processor made."""
    mi_estimator: Literal["adjusted", "plug_in"] = "adjusted"
    """``plug_in`` is biased (0.47 nats of pure noise at 1080p) and saturates up to 144 tokens; then min-max
    stretching blows any difference up to a factor e^(1/tau). ``adjusted``: 0 for chance, 1 for the most there
    can be, not stretched, so noise weighs all groups alike."""
    skip_idle_mi: bool = True
    """Don't work information out where it can't count: a weight of zero, or a screenshot so small that chance
    alone reaches all the information there can be."""
    temporal_reference: Literal["earlier", "updated"] = "earlier"
    """What the pattern of attention is compared with. ``updated`` contains the pattern itself: the first
    comparison always says "perfectly stable", and history is discounted for no reason. ``earlier``: only what
    was seen before; nothing seen, nothing discounted."""
    entropy_acts_on: Literal["layer_budget", "temperature"] = "layer_budget"
    """``temperature``: scores are raised to 1/T at the very end, which changes no order and no kept set.
    ``layer_budget``: layers whose scores are spread out get rows from those whose scores are concentrated,
    the total staying the same."""
    protect_rows: bool = True
    """Keep attention sinks, instruction and system prompt, within half of the budget."""
    score_dtype: Literal["float32", "model"] = "float32"
    """``model`` rounds every stage to the cache's dtype, as the official code does: in bf16 hundreds of
    tokens tie at the cut."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"window must be at least 1, not {self.window}")
        if not 0.0 < self.window_share <= 1.0:
            raise UsageError(f"window_share must lie in (0, 1], not {self.window_share}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"kernel must be odd (an even one has no centre), not {self.kernel}")
        if self.boost and self.boost_temperature <= 0:
            raise UsageError(f"boost_temperature must be above 0, not {self.boost_temperature}")
        if not 0.0 <= self.mi_weight <= 1.0:
            raise UsageError(f"mi_weight must lie in [0, 1], not {self.mi_weight}")
        if self.entropy and not 0.0 < self.entropy_min <= self.entropy_max:
            raise UsageError(
                f"entropy_min and entropy_max must be positive and in order, "
                f"not {self.entropy_min} and {self.entropy_max}"
            )

    def window_for(self, kept_rows: int) -> int:
        """Rows of the window where so many are kept."""
        return min(window_rows(self.window, kept_rows), max(1, int(kept_rows * self.window_share)))

    @classmethod
    def of_mode(cls, mode: str) -> "StarKVConfig":
        """The configuration called ``native`` or ``official``.

        Raises:
            UsageError: no such mode.
        """
        if mode == "native":
            return cls()
        if mode == "official":
            return cls.official()
        raise UsageError(f"unknown STaR-KV mode {mode!r}; known: native, official")

    @classmethod
    def official(cls, **changes: Any) -> "StarKVConfig":
        """The official code's behaviour with the values of its ``repro_ssp_kv.sh``."""
        paper = cls(
            window_share=1.0,
            mi_profile_steps=5,
            mi_ramp_steps=10,
            mi_tau=1.0,
            grid="square",
            mi_estimator="plug_in",
            skip_idle_mi=False,
            temporal_reference="updated",
            entropy_acts_on="temperature",
            protect_rows=False,
            score_dtype="model",
        )
        return replace(paper, **changes)

    @property
    def is_official(self) -> bool:
        """Whether a batch shares one state, as in the official code, and spans are clamped instead of
        refused."""
        return self.grid == "square"


def official_flags(flags: Mapping[str, Any], pooling: str = "avgpool", kernel: int = 5) -> StarKVConfig:
    """Official mode from the flags of the official command line, with its way of reading zeros.

    There ``lambda`` 0 means 0.5, ``decay`` 0 means 0.9, ``tau`` 0 means 1, ``ramp`` 0 means the profile
    steps, and a temperature of 0 means 1 (docs/spec/star-kv.md §4, "falsy" quirks).

    Args:
        flags: names as in the official parsers, such as ``kv_group_soft_prior_lambda`` and ``alpha``.
        pooling: ``avgpool`` or ``maxpool``.
        kernel: pooling width.
    """
    steps = max(0, int(flags["kv_group_online_profile_steps"] or 0))

    def clip(value: float, most: float = 1.0) -> float:
        return min(most, max(0.0, float(value)))

    entropy = bool(flags["kv_entropy_budget_enable"])
    return StarKVConfig.official(
        window=int(flags["window_size"]),
        kernel=kernel,
        pooling=pooling,
        boost=max(0.0, float(flags["alpha"] or 0.0)),
        boost_temperature=float(flags["temperature"] or 1.0),
        mi=steps > 0,
        mi_weight=clip(flags["kv_group_soft_prior_lambda"] or 0.5),
        mi_profile_steps=steps,
        mi_ramp_steps=max(1, int(flags["kv_group_online_profile_lambda_ramp_steps"] or steps)),
        mi_decay=clip(flags["kv_group_online_profile_decay"] or 0.9, 0.9999),
        mi_tau=max(float(flags["kv_group_online_profile_tau"] or 1.0), 1e-6),
        temporal=bool(flags["kv_group_temporal_enable"]),
        temporal_delta=float(flags["kv_group_temporal_delta"]),
        temporal_rho=clip(flags["kv_group_temporal_rho"], 0.9999),
        temporal_eps=clip(flags["kv_group_temporal_eps"]),
        temporal_floor=clip(flags["kv_group_temporal_discount_min"]),
        temporal_warmup=int(flags["kv_group_temporal_warmup_steps"] or 0),
        entropy=entropy,
        entropy_min=float(flags["kv_entropy_budget_min_scale"]) if entropy else 1.0,
        entropy_max=float(flags["kv_entropy_budget_max_scale"]) if entropy else 1.0,
        entropy_smooth=float(flags["kv_entropy_budget_smooth"] or 0.0) if entropy else 0.0,
    )
