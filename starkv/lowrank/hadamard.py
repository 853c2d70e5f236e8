# SPDX-License-Identifier: Apache-2.0
"""Rotation of latents that spreads large channels over their block, folded into the factors.

A latent's outlier and inlier blocks are rotated by a Hadamard matrix each, so that one scale per block suits
all of its channels (STAR-KV, arXiv 2606.08382). Folded into both factors it costs nothing at run time and
changes ``up · down`` by rounding only.
"""

import numpy as np
from numpy.typing import NDArray

from starkv.lowrank.factor import Factor
from starkv.lowrank.latent_format import outliers

DEFAULT_SEED = 1234


def hadamard(size: int) -> NDArray[np.float64]:
    """Orthogonal Hadamard matrix ``[size, size]`` of a power of two, every entry ±1/√size."""
    matrix: NDArray[np.float64] = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: NDArray[np.float64] = matrix * size**-0.5
    return scaled


def rotated_parts(rank: int) -> list[tuple[int, int]]:
    """(first channel, size) of what is rotated in a latent: of each block its largest leading power of two.

    A block of one channel is left alone, as is the rest behind a power of two.
    """
    first = outliers(rank)
    blocks = ((0, first), (first, rank - first))
    return [(start, 1 << (size.bit_length() - 1)) for start, size in blocks if size > 1]


def block_rotation(rank: int, signs: NDArray[np.float64]) -> NDArray[np.float64]:
    """``T [rank, rank]``, orthogonal: ``signs`` times Hadamard on the rotated parts, identity elsewhere.

    Args:
        signs: ±1 for each rotated row, the outliers' first: ``[sum of the parts' sizes]``.
    """
    rotation = np.eye(rank)
    used = 0
    for start, size in rotated_parts(rank):
        block = slice(start, start + size)
        rotation[block, block] = signs[used : used + size, None] * hadamard(size)
        used += size
    return rotation


def random_rotation(rank: int, seed: int = DEFAULT_SEED) -> NDArray[np.float64]:
    """A block rotation with random row signs, the same for the same seed and rank."""
    count = sum(size for _, size in rotated_parts(rank))
    return block_rotation(rank, np.random.default_rng(seed).choice((-1.0, 1.0), count))


def fold(factor: Factor, rotation: NDArray[np.float64]) -> Factor:
    """Factor whose latents are ``Tᵀ`` times the given one's; ``up · down`` stays."""
    return Factor(factor.up @ rotation, rotation.T @ factor.down)
