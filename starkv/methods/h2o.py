# SPDX-License-Identifier: Apache-2.0
"""H2O (arXiv 2306.14048) in its prefill form: keep the rows that all queries together attend to most.

Needs the column sums of the full attention, which a decoder with fused attention doesn't put out.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.method import Heads, IndexSets, KvMethod, check_heads, index_sets_of, per_index_set
from starkv.methods.prefill import Prefill


@dataclass(frozen=True)
class H2O(KvMethod):
    """Heavy hitters and a window of recent rows.

    Raises:
        UsageError: a field makes no sense.
    """

    name: ClassVar[str] = "h2o"
    window: int = 8
    heads: Heads = "kv"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"window must be at least 1, not {self.window}")
        check_heads(self.heads)

    @property
    def index_sets(self) -> IndexSets:
        return index_sets_of(self.heads)

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        sums = prefill.attention_sums
        if sums is None:
            raise UsageError(
                "h2o needs the attention that each row got from all queries, which this prefill lacks; "
                "use the PyTorch reference engine, or snapkv"
            )
        layers, batch, heads = prefill.queries.shape[:3]
        groups, capacity = prefill.keys.shape[2], prefill.keys.shape[3]
        if sums.shape != (layers, batch, heads, capacity):
            expected = (layers, batch, heads, capacity)
            raise UsageError(f"attention_sums must be {expected}, not {tuple(sums.shape)}")
        return per_index_set(sums.float(), self.heads, groups)
