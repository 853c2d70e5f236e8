# SPDX-License-Identifier: Apache-2.0
"""One compression's numbers, worked out on the host: which parts of STaR-KV act, and how strongly.

What depends only on counters (how many prefills there were, whether an average exists yet) is decided here,
once, for the PyTorch reference and every engine alike. What depends on scores stays on the device.
"""

from dataclasses import astuple, dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.methods.expected_information import chance_and_span
from starkv.methods.rows import Frame
from starkv.methods.star_kv_config import StarKVConfig


@dataclass(frozen=True)
class StarKVProgress:
    """The part of a trajectory's state that the host knows: counters, and what the tensors hold so far."""

    profile_step: int = 0
    temporal_step: int = 0
    mi_known: bool = False
    """``mi_ema`` holds an average."""
    pattern_cells: int = 0
    """Tokens of the screenshot whose pattern ``pattern_ema`` holds; 0: none."""
    temperature_known: bool = False

    def next_sample(self) -> "StarKVProgress":
        """Start a new trajectory as the official drivers do: the temperature's average survives, since their
        reset clears it in a place where it never is (docs/spec/star-kv.md §8)."""
        return StarKVProgress(temperature_known=self.temperature_known)


@dataclass(frozen=True)
class StarKVPlan:
    """Numbers of one compression, in the order of the operators' ``parameters [P] f32``.

    Averages that do not exist yet are planned with a decay of 0, so that they start as the new value.
    """

    boost: float
    boost_temperature: float
    mi_enabled: bool
    """Information is worked out and averaged in this call."""
    mi_weight: float
    """The prior's weight in this call (``lambda_eff``)."""
    mi_tau: float
    mi_decay: float
    mi_chance: float
    """Information that chance shows, nats; 0 for the plug-in estimator."""
    mi_scale: float
    """What remaining information is multiplied with."""
    mi_stretch: bool
    """Stretch the groups' information to 0 … 1 before the softmax."""
    mi_usable: bool
    """An average exists after this call; otherwise groups weigh the same."""
    temporal_update: bool
    temporal_apply: bool
    temporal_delta: float
    temporal_rho: float
    temporal_eps: float
    temporal_floor: float
    temporal_earlier: bool
    """Compare with the earlier average rather than the updated one."""
    pattern_usable: bool
    """The earlier average is of a screenshot of the same size."""
    entropy_power: bool
    """Raise scores to 1 / temperature."""
    entropy_min: float
    entropy_max: float
    entropy_smooth: float
    layer_budget: bool
    """Entropy moves rows between layers."""

    def as_array(self) -> NDArray[np.float32]:
        """``parameters [P] f32`` of the ONNX operators."""
        return np.array(astuple(self), np.float32)


@dataclass(frozen=True)
class LayerLimits:
    """Rows that a layer keeps beside its window."""

    mean: int
    """On average."""
    floor: int
    ceiling: int

    def as_array(self) -> NDArray[np.int64]:
        """``limits [3] i64`` of the ONNX operators."""
        return np.array(astuple(self), np.int64)


def layer_limits(plan: StarKVPlan, kept_rows: int, window: int, past: int, protected: int) -> LayerLimits:
    """Between how many rows a layer's budget may lie.

    Args:
        plan: whether entropy moves rows at all, and within which multiples of the average.
        kept_rows: rows per layer on average, the window included.
        window: W.
        past: rows that compete in each layer.
        protected: rows of them that may not be evicted.

    Raises:
        UsageError: the window leaves nothing to compete, or the budget is too small for the protected rows.
    """
    if past < 1:
        raise UsageError(f"the observation window of {window} rows leaves nothing of the prompt to compete")
    # One competing row stays even where the window alone fills the budget.
    mean = max(1, min(kept_rows - window, past))
    if protected > mean:
        raise UsageError(f"{protected} protected rows exceed the {mean} that a layer keeps beside its window")
    if not plan.layer_budget:
        return LayerLimits(mean, mean, mean)
    floor = max(1, protected, ceil(plan.entropy_min * mean))
    ceiling = min(past, int(plan.entropy_max * mean))
    return LayerLimits(mean, min(mean, floor), max(mean, ceiling))


def skipped_call(config: StarKVConfig, progress: StarKVProgress) -> StarKVProgress:
    """Progress after a prompt that was shorter than its budget, so that nothing was compressed.

    The official code counts it as a temporal step and touches nothing else (docs/spec/star-kv.md §1, step 0).
    """
    return replace(progress, temporal_step=progress.temporal_step + int(config.temporal))


def plan_step(
    config: StarKVConfig, progress: StarKVProgress, frame: Frame, *, count_temporal_step: bool = True
) -> tuple[StarKVPlan, StarKVProgress]:
    """Plan one compression and count it.

    Args:
        config: hyper-parameters.
        progress: counters before the call.
        frame: the newest screenshot.
        count_temporal_step: False for every sequence of a batch but the first, in official mode: there a
            batch shares one state and advances the temporal step once, but the profile step for every
            sequence.
    """
    if count_temporal_step:
        progress = skipped_call(config, progress)
    chance, span = 0.0, 1.0
    if config.mi_estimator == "adjusted":
        chance, span = chance_and_span(frame.cells, frame.grid_rows, frame.grid_columns)
    step = progress.profile_step + int(config.mi)
    weight = config.mi_weight
    if config.mi:
        grown = (step - config.mi_profile_steps) / config.mi_ramp_steps
        weight *= min(1.0, max(0.0, grown))
    idle = config.skip_idle_mi and (config.mi_weight == 0.0 or span == 0.0)
    mi_enabled = config.mi and frame.cells > 0 and not idle
    mi_usable = config.mi and (mi_enabled or progress.mi_known)

    temporal = config.temporal and frame.frames_in_view > 1
    same_size = progress.pattern_cells == frame.cells
    # An average of another size starts anew, as in the official code.
    rho = config.temporal_rho if same_size else 0.0
    powers = config.entropy and config.entropy_acts_on == "temperature"
    plan = StarKVPlan(
        boost=config.boost if frame.cells else 0.0,
        boost_temperature=config.boost_temperature,
        mi_enabled=mi_enabled,
        mi_weight=weight,
        mi_tau=config.mi_tau,
        mi_decay=config.mi_decay if progress.mi_known else 0.0,
        mi_chance=chance,
        mi_scale=1.0 / span if span else 0.0,
        mi_stretch=config.mi_estimator == "plug_in",
        mi_usable=mi_usable,
        temporal_update=temporal,
        temporal_apply=temporal and progress.temporal_step > config.temporal_warmup,
        temporal_delta=config.temporal_delta,
        temporal_rho=rho,
        temporal_eps=config.temporal_eps,
        temporal_floor=config.temporal_floor,
        temporal_earlier=config.temporal_reference == "earlier",
        pattern_usable=same_size,
        entropy_power=powers,
        entropy_min=config.entropy_min,
        entropy_max=config.entropy_max,
        entropy_smooth=config.entropy_smooth if powers and progress.temperature_known else 0.0,
        layer_budget=config.entropy and config.entropy_acts_on == "layer_budget",
    )
    return plan, StarKVProgress(
        profile_step=step,
        temporal_step=progress.temporal_step,
        mi_known=mi_usable or progress.mi_known,
        pattern_cells=frame.cells if temporal else progress.pattern_cells,
        temperature_known=powers,
    )
