# SPDX-License-Identifier: Apache-2.0
"""Random numbers for the weights of a large model, as fast as a disk takes them.

Drawing 8e9 normal numbers takes minutes. Here one block is drawn; every tensor is cut out of it from a place
of its own on, around the end and again. The block's length is a prime, so the rows of a tensor differ.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from starkv.errors import UsageError

RandomDtype = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[RandomDtype, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}

_BLOCK_LENGTH = 4_194_301
"""The largest prime below 2**22."""
_NORM_SPREAD, _BIAS_SPREAD = 0.1, 0.02


def parse_random_dtype(name: str) -> RandomDtype:
    """Check a dtype's name.

    Raises:
        UsageError: no such dtype.
    """
    known: RandomDtype | None = next((dtype for dtype in get_args(RandomDtype) if dtype == name), None)
    if known is not None:
        return known
    raise UsageError(f"unknown dtype {name!r} for random weights; known: {', '.join(DTYPES)}")


class RandomValues:
    """Values of tensors by name; the same seed, name, shape and dtype give the same values.

    Args:
        seed: of the one block that is drawn.
        dtype: of the values.
    """

    def __init__(self, seed: int, dtype: RandomDtype) -> None:
        self._seed, self._dtype = seed, DTYPES[dtype]
        self._normal = np.random.default_rng(seed).standard_normal(_BLOCK_LENGTH, np.float32)
        self._blocks: dict[tuple[float, float], npt.NDArray[np.uint8]] = {}

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint8]]:
        """Bytes of the tensor ``name`` in row-major order, 16 MiB at most at a time.

        Matrices are normal with the standard deviation ``fan_in ** -0.5``, so that a layer's output is about
        as large as its input; norms lie around 1 and biases around 0.
        """
        block, size = self._block(*_centre_and_spread(name, shape)), self._dtype.itemsize
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % _BLOCK_LENGTH
        left = math.prod(shape)
        while left:
            count = min(left, _BLOCK_LENGTH - start)
            yield block[start * size : (start + count) * size]
            left, start = left - count, 0

    def _block(self, centre: float, spread: float) -> npt.NDArray[np.uint8]:
        """The block at this scale, as bytes; a model has few scales, so all are kept."""
        found = self._blocks.get((centre, spread))
        if found is None:
            found = (centre + spread * self._normal).astype(self._dtype).view(np.uint8)
            self._blocks[centre, spread] = found
        return found


def _centre_and_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith(".bias"):
        return 0.0, _BIAS_SPREAD
    if len(shape) == 1:
        return 1.0, _NORM_SPREAD
    return 0.0, math.prod(shape[1:]) ** -0.5
