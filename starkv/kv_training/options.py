# SPDX-License-Identifier: Apache-2.0
"""What a training of factors is asked for."""

from dataclasses import dataclass

from starkv.errors import UsageError
from starkv.kv_packing.options import PackingOptions
from starkv.kv_packing.retarget import LATENTS
from starkv.lowrank.latent_format import LatentFormat


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of both phases.

    Raises:
        UsageError: no rank is asked for, or a number is out of range.
    """

    packing: PackingOptions
    """The rank gives the budget of bytes, the quantization what the second phase trains for."""
    steps: int = 1200
    """Of both phases; the first plans with ``rank_steps`` of them."""
    batch: int = 8
    """Sequences per step."""
    factor_rate: float = 1e-3
    """Adam's step for factors relative to their entries, in the second phase falling to zero along half a
    cosine."""
    gain_rate: float = 1e-3
    """Adam's step for gains, which are about 1."""
    seed: int = 0
    save_every: int = 50
    """Steps between two saved states."""

    def __post_init__(self) -> None:
        if self.packing.rank is None:
            raise UsageError("a training of factors needs a share of ranks to keep: --kv-rank 0.5")
        if self.steps < 8 or self.batch < 1:
            raise UsageError(
                f"a training takes at least 8 steps of at least 1 sequence, not {self.steps} of {self.batch}"
            )

    @property
    def rank(self) -> float:
        """Share of the cache's elements that latents may have."""
        assert self.packing.rank is not None
        return self.packing.rank

    @property
    def latent(self) -> LatentFormat:
        """How latents are stored at run time."""
        return LATENTS[self.packing.quant]

    @property
    def rank_steps(self) -> int:
        """Steps after which thresholds should meet the budget."""
        return self.steps // 4
