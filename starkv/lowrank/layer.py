# SPDX-License-Identifier: Apache-2.0
"""One layer's factors and biases, and the way from exact cached rows to latents and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.lowrank.factor import Factor
from starkv.lowrank.rotary import rotate, unrotate


@dataclass(frozen=True)
class LowRankLayer:
    """Factors act on what a projection puts out without its bias; the biases stay exact.

    Raises:
        ValueError: shapes don't belong together.
    """

    keys: tuple[Factor, ...]
    """One per group of consecutive KV heads; width = heads per group · D."""
    values: Factor
    """Width = KV heads · D."""
    key_bias: NDArray[np.float64]
    """``[KV heads, D]``, zeros for a model without."""
    value_bias: NDArray[np.float64]
    """``[KV heads, D]``."""

    def __post_init__(self) -> None:
        channels = self.key_bias.size
        if self.key_bias.shape != self.value_bias.shape or self.key_bias.ndim != 2:
            raise ValueError(
                f"biases of {self.key_bias.shape} and {self.value_bias.shape}, not [KV heads, D] twice"
            )
        if self.values.width != channels or sum(factor.width for factor in self.keys) != channels:
            raise ValueError(f"factors don't cover the {channels} channels of a layer's keys and values")

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.key_bias.shape[1])

    def key_latents(
        self, keys: NDArray[Any], cosines: NDArray[Any], sines: NDArray[Any]
    ) -> list[NDArray[np.float64]]:
        """Latents ``[rows, rank]`` of each group, of exact cached keys.

        Args:
            keys: ``[rows, KV heads, D]``, rotated, with bias.
            cosines: ``[rows, D/2]`` of the rows' positions; ``sines`` likewise.
        """
        outputs = unrotate(keys, cosines[:, None], sines[:, None]) - self.key_bias
        flat = outputs.reshape(len(keys), self.key_bias.size)
        ends = np.cumsum([factor.width for factor in self.keys])[:-1]
        parts = np.split(flat, ends, axis=-1)
        return [factor.compress(part) for factor, part in zip(self.keys, parts, strict=True)]

    def value_latents(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Latents ``[rows, rank]`` of exact cached values ``[rows, KV heads, D]``, which have their bias."""
        return self.values.compress((values - self.value_bias).reshape(len(values), self.value_bias.size))

    def lifted_keys(
        self, latents: list[NDArray[Any]], cosines: NDArray[Any], sines: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Keys ``[rows, KV heads, D]`` rebuilt from latents: lifted, bias added, rotated, in this order."""
        lifted = np.concatenate(
            [factor.lift(latent) for factor, latent in zip(self.keys, latents, strict=True)], axis=-1
        )
        keys = lifted.reshape(len(lifted), *self.key_bias.shape) + self.key_bias
        rotated: NDArray[np.float64] = rotate(keys, cosines[:, None], sines[:, None])
        return rotated
