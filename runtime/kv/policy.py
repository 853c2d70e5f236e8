# SPDX-License-Identifier: Apache-2.0
"""What the user asked for: which rows to keep of a prompt's cache, and how many."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.methods.budget import LEAST_ROWS, Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.methods.rows import PromptRows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_plan import StarKVProgress
from starkv.methods.stream_rows import CacheRows, StreamRows


@dataclass(frozen=True)
class KvPolicy:
    """A compression method with its budget."""

    method: str = FULL
    budget: Budget = field(default_factory=Budget)
    star_kv: StarKVConfig = field(default_factory=StarKVConfig)
    """Hyper-parameters of the method ``star_kv``."""
    seed: int = 0
    """Of the method ``random``."""
    packed: bool | None = None
    """Whether kept rows are packed; None: where the engine and the method can."""

    def kept_rows(self, prompt_rows: int) -> int:
        """Rows to keep per layer on average."""
        return prompt_rows if self.method == FULL else self.budget.rows(prompt_rows)

    def keeps_all(self, prompt_rows: int) -> bool:
        """Whether there is nothing to choose: the method keeps everything, or the prompt is shorter than its
        capacity, or as short as a cache can be."""
        return self.method == FULL or self.budget.spares(prompt_rows) or prompt_rows <= LEAST_ROWS

    def kept_of(self, rows: CacheRows) -> int:
        """Rows to keep per layer on average, of a prompt or of a stream."""
        return self.kept_rows(rows.full_rows)

    def keeps_all_of(self, rows: CacheRows) -> bool:
        """Whether there is nothing to choose; a stream is left alone as long as it fits its budget."""
        if isinstance(rows, StreamRows):
            return self.method == FULL or rows.mean_rows <= self.kept_of(rows)
        return self.keeps_all(rows.length)


@dataclass
class StarKVMemory:
    """What STaR-KV remembers of a trajectory, in host memory."""

    progress: StarKVProgress
    mi_ema: NDArray[np.float32]
    """``[L, 1, G]``."""
    pattern_ema: NDArray[np.float32]
    """``[L, 1, G, N]`` for N tokens of the last screenshot."""
    temperature: NDArray[np.float32]
    """``[L, 1]``."""

    @classmethod
    def initial(cls, layers: int, kv_heads: int) -> "StarKVMemory":
        """Before the first prompt."""
        return cls(
            StarKVProgress(),
            np.zeros((layers, 1, kv_heads), np.float32),
            np.zeros((layers, 1, kv_heads, 1), np.float32),
            np.ones((layers, 1), np.float32),
        )


@dataclass(frozen=True)
class Compressed:
    """Outcome of a compression."""

    rows: NDArray[np.int64]
    """``[L, N, K]``: row that each kept row had in the prompt, ascending, −1 behind the last. N is 1, or the
    number of heads where each kept rows of its own."""
    scores: NDArray[np.float32] | None = None
    """``[L, N, S]`` for the prompt's S rows: final scores, where the method has any."""
    stages: NDArray[np.float32] | None = None
    """``[L, 4, S]``: STaR-KV's score after each stage: window attention, hidden-norm boost, spatial prior,
    temporal discount; all as means over heads."""
    memory: StarKVMemory | None = None
    """What to hand to the trajectory's next compression."""


def whole_prompt(rows: CacheRows, policy: KvPolicy) -> PromptRows:
    """The rows, which must be those of a prompt.

    Raises:
        UsageError: they are a stream's, for a method that can't go on with one.
    """
    if not isinstance(rows, PromptRows):
        raise UsageError(
            f"{policy.method} compresses whole prompts only; to go on with a compacted history use "
            f"{STAR_KV} or {FULL}"
        )
    return rows
