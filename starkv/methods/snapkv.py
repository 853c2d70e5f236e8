# SPDX-License-Identifier: Apache-2.0
"""SnapKV (arXiv 2404.14469): keep what the prompt's last queries attend to (docs/spec/baselines.md,
SnapKV)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.method import Heads, IndexSets, KvMethod, check_heads, index_sets_of, per_index_set
from starkv.methods.prefill import Prefill
from starkv.methods.star_kv_config import Pooling
from starkv.methods.window import pool_scores, window_scores


@dataclass(frozen=True)
class SnapKV(KvMethod):
    """Attention mass of the window's queries, pooled over neighbouring rows; the same budget in every layer.

    Raises:
        UsageError: a field makes no sense.
    """

    name: ClassVar[str] = "snapkv"
    window: int = 8
    kernel: int = 5
    """Width of the pooling, odd."""
    pooling: Pooling = "avgpool"
    heads: Heads = "kv"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"window must be at least 1, not {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"kernel must be odd (an even one has no centre), not {self.kernel}")
        if self.pooling not in ("avgpool", "maxpool"):
            raise UsageError(f"pooling must be avgpool or maxpool, not {self.pooling!r}")
        check_heads(self.heads)

    @property
    def index_sets(self) -> IndexSets:
        return index_sets_of(self.heads)

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        mass = window_scores(prefill.window_queries.float(), prefill.keys.float(), prefill.kv_len)
        pooled = pool_scores(mass, prefill.is_past, self.kernel, self.pooling)
        return per_index_set(pooled, self.heads, prefill.keys.shape[2])
