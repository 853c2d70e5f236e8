# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding in numpy: tables by stored positions, rotation and its inverse.

Pairs are (i, i + D/2), as in Qwen2 and Llama ("rotate half"). With M-RoPE a token has three positions (t, h,
w) and every pair reads one of them (docs/models.md).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rotary:
    """How positions turn into angles.

    Raises:
        ValueError: the sections don't cover the pairs.
    """

    inverse_frequencies: NDArray[np.float64]
    """``[D/2]``."""
    sections: tuple[int, ...]
    """How many pairs read each component of a position, in the order of the pairs: (16, 24, 24) for
    Qwen2.5-VL, (D/2,) for a model with one position per token."""

    def __post_init__(self) -> None:
        if sum(self.sections) != len(self.inverse_frequencies):
            raise ValueError(f"sections {self.sections} don't cover {len(self.inverse_frequencies)} pairs")

    @property
    def component_of_pair(self) -> NDArray[np.intp]:
        """``[D/2]``: which component of a position each pair reads."""
        return np.repeat(np.arange(len(self.sections)), self.sections)

    def tables(self, positions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cosines and sines ``[..., D/2]`` of positions ``[..., components]``."""
        angles = np.asarray(positions, np.float64)[..., self.component_of_pair] * self.inverse_frequencies
        return np.cos(angles), np.sin(angles)


def rotate(vectors: NDArray[Any], cosines: NDArray[Any], sines: NDArray[Any]) -> NDArray[Any]:
    """Turn every pair of ``vectors [..., D]`` by the angle whose cosine and sine are given ``[..., D/2]``."""
    first, second = np.split(vectors, 2, axis=-1)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


def unrotate(vectors: NDArray[Any], cosines: NDArray[Any], sines: NDArray[Any]) -> NDArray[Any]:
    """Inverse of ``rotate``: back from a cached key to the projection's output."""
    return rotate(vectors, cosines, -sines)
