# SPDX-License-Identifier: Apache-2.0
"""Rotary angles in the arithmetic of the models' training code: float32 at every step."""

import numpy as np
from numpy.typing import NDArray


def inverse_frequencies(dim: int, theta: float) -> NDArray[np.float32]:
    """Angle per unit of position for each rotary pair.

    Rounded to float32 like the original: a position of 30,000 carries the last bit of a frequency near 1 into
    the third decimal of its cosine. The power itself is taken in float64 and rounded once; PyTorch's is not
    correctly rounded and differs from it in the last bit of a few frequencies, here and between machines.

    Args:
        dim: number of channels that the frequencies cover, two per pair.
        theta: base of the geometric series.

    Returns:
        ``[dim / 2]`` float32, falling from 1.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power: NDArray[np.float32] = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    frequencies: NDArray[np.float32] = np.float32(1.0) / power
    return frequencies
