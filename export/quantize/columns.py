# SPDX-License-Identifier: Apache-2.0
"""Quantized weights on their way from a checkpoint, or from a quantizer, into an engine."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Bits = Literal[4, 8]


@dataclass(frozen=True)
class ImportedQuantization:
    """How a checkpoint was quantized by somebody else."""

    method: str
    """``awq``, ``gptq`` or ``compressed-tensors``."""
    bits: Bits
    group_size: int
    """Inputs that share a scale; −1 for all."""


@dataclass(frozen=True)
class QuantizedColumns:
    """Some columns of a weight [K,N], K inputs, N outputs: ``(codes − zero_points) · scales`` by blocks."""

    codes: npt.NDArray[np.int8]
    """[K,n]: −8…7 with 4 bits, −128…127 with 8."""
    scales: npt.NDArray[np.float32]
    """[K/block_size, n]."""
    zero_points: npt.NDArray[np.int8] | None = None
    """[K/block_size, n] in the range of the codes, or None where all are 0."""


class PackedWeight(Protocol):
    """A linear layer's weight that a checkpoint stores quantized."""

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K], as ``torch.nn.Linear`` has it: outputs, inputs."""

    @property
    def bits(self) -> Bits: ...

    @property
    def block_size(self) -> int:
        """Inputs that share a scale; 16 or more, a power of two, and a divisor of K."""

    @property
    def has_zero_points(self) -> bool:
        """Whether any zero point differs from 0."""

    @property
    def input_order(self) -> npt.NDArray[np.int64] | None:
        """[K]: row k of the codes belongs to input ``input_order[k]``; None where rows are in order."""

    def columns(self, start: int, stop: int) -> QuantizedColumns:
        """Outputs ``start … stop-1``."""
