# SPDX-License-Identifier: Apache-2.0
"""The shape of one layer's packed low-rank KV cache, which decides how its ONNX function looks."""

from dataclasses import dataclass
from typing import Literal

from starkv.errors import UsageError
from starkv.lowrank.latent_format import NIBBLES, KeyLanes, outliers, value_code_bytes

LaneStorage = Literal["int4", "int8", "float"]


@dataclass(frozen=True)
class LowRankShape:
    """Heads, ranks and storage of one layer.

    With W lanes of keys and R = ``value_rank``, a row of the packed cache is, by storage (see
    ``lowrank/latent_format.py``):

    ======= ========================== ==============================================================
    storage k_codes                    v_codes
    ======= ========================== ==============================================================
    int4    [B,C,W/2] u8               [B,C,:attr:`value_row`] u8: outlier bytes, inlier bytes, filler
    int8    [B,C,W] i8                 [B,C,R or more] i8
    float   [B,C,W] f32, ``k_latent``  [B,C,R] f32, ``v_latent``
    ======= ========================== ==============================================================

    int4 stores channel 2i in the low and 2i+1 in the high half of a byte, each plus 8. Blocks of the values
    with an odd number of channels end in a half byte of 8.

    Raises:
        UsageError: heads, ranks or sections that do not fit together.
    """

    heads: int
    kv_heads: int
    head_dim: int
    key_ranks: tuple[int, ...]
    """Of each group of neighbouring KV heads; their number divides ``kv_heads``."""
    value_rank: int
    """Of the layer: all heads share one factor."""
    mrope_section: tuple[int, ...]
    """Rotary pairs that turn with t, h and w; one entry, head_dim/2, where positions have one component."""
    storage: LaneStorage

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UsageError(f"heads is {self.heads}, which kv_heads, {self.kv_heads}, does not divide")
        if not self.key_ranks or self.kv_heads % len(self.key_ranks):
            raise UsageError(f"key_ranks has {len(self.key_ranks)} groups for {self.kv_heads} KV heads")
        if not all(1 <= rank <= self.group_heads * self.head_dim for rank in self.key_ranks):
            limit = self.group_heads * self.head_dim
            raise UsageError(f"key_ranks is {self.key_ranks}; each must be 1 to {limit}")
        if not 1 <= self.value_rank <= self.kv_heads * self.head_dim:
            limit = self.kv_heads * self.head_dim
            raise UsageError(f"value_rank is {self.value_rank}; it must be 1 to {limit}")
        if len(self.mrope_section) not in (1, 3) or 2 * sum(self.mrope_section) != self.head_dim:
            raise UsageError(
                f"mrope_section is {self.mrope_section}; it needs 1 or 3 numbers of sum {self.head_dim // 2}"
            )

    @property
    def group_heads(self) -> int:
        """KV heads that share a key factor."""
        return self.kv_heads // len(self.key_ranks)

    @property
    def key_lanes(self) -> KeyLanes:
        """Where each group's latents lie in a row."""
        return KeyLanes(self.key_ranks)

    @property
    def value_blocks(self) -> tuple[int, int]:
        """Outlier and inlier channels of the values."""
        first = outliers(self.value_rank)
        return first, self.value_rank - first

    @property
    def value_row(self) -> int:
        """Bytes of a row of ``v_codes`` in int4."""
        return value_code_bytes(self.value_rank, NIBBLES)

    @property
    def function_name(self) -> str:
        """Operator type in the domain ``ai.starkv``; equal shapes have equal names."""
        parts = (
            "LowRankKVAttention",
            self.storage,
            f"h{self.heads}_{self.kv_heads}x{self.head_dim}",
            "k" + "_".join(map(str, self.key_ranks)),
            f"v{self.value_rank}",
            "s" + "_".join(map(str, self.mrope_section)),
        )
        return "_".join(parts)
