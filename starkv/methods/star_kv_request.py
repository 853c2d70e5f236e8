# SPDX-License-Identifier: Apache-2.0
"""A prompt's compression by STaR-KV, settled on the host before the device is asked for anything."""

from dataclasses import dataclass

from starkv.errors import UsageError
from starkv.methods.rows import Frame, PromptRows, official_rows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_plan import LayerLimits, StarKVPlan, StarKVProgress, layer_limits, plan_step
from starkv.methods.stream_rows import CacheRows


@dataclass(frozen=True)
class StarKVRequest:
    """Everything about one compression that does not depend on keys and queries."""

    prompt: CacheRows
    """Rows as the mode sees them: in official mode with clamped spans and square grids."""
    window: int
    protected: tuple[int, ...]
    """Rows that may not be evicted; of a stream their tokens."""
    frame: Frame
    plan: StarKVPlan
    progress: StarKVProgress
    """Counters after this compression."""
    limits: LayerLimits

    @property
    def most_rows(self) -> int:
        """Most rows that any layer can keep."""
        return self.window + self.limits.ceiling


def request_star_kv(
    config: StarKVConfig,
    prompt: CacheRows,
    kept_rows: int,
    progress: StarKVProgress,
    observation_window: int,
) -> StarKVRequest:
    """Settle a compression.

    Args:
        config: hyper-parameters.
        prompt: the rows of a prompt or of a stream.
        kept_rows: rows to keep per layer on average, the window included.
        progress: the trajectory's counters so far.
        observation_window: most queries that the decoder puts out.

    Raises:
        UsageError: the window is longer than that, or leaves nothing of the prompt to compete; or official
            mode is asked for a stream.
    """
    if config.window > observation_window:
        raise UsageError(
            f"a window of {config.window} rows is asked for, but the engine was exported with an observation "
            f"window of {observation_window}; use a smaller one or export again"
        )
    window = min(config.window_for(kept_rows), prompt.newest_rows)
    if config.is_official:
        if not isinstance(prompt, PromptRows):
            raise UsageError(
                "official mode is the papers' protocol, which prefills the whole history at every step; use "
                "native mode to go on with a compacted one"
            )
        prompt = official_rows(prompt.length, prompt.spans, window)
    protected = prompt.protected(kept_rows, window) if config.protect_rows else ()
    frame = prompt.newest_frame(window)
    plan, after = plan_step(config, progress, frame)
    limits = layer_limits(plan, kept_rows, window, prompt.shortest - window, len(protected))
    return StarKVRequest(prompt, window, protected, frame, plan, after, limits)
