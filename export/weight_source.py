# SPDX-License-Identifier: Apache-2.0
"""What a graph's weights come from, and what they are once they are stored."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from starkv.export.quantize.columns import PackedWeight


class WeightSource(Protocol):
    """Where weights come from; a :class:`~starkv.export.checkpoint.Checkpoint` is one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; [N, K] of a linear layer's weight, however it is stored."""

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start … stop-1`` of a tensor."""

    def packed(self, name: str) -> PackedWeight | None:
        """The weight as integers, if the checkpoint stores it so."""

    def input_divisors(self, norm: str) -> npt.NDArray[np.float32] | None:
        """[K]: what calibration has divided the outputs of the weight ``norm`` by; None if nothing."""


@dataclass(frozen=True)
class LinearWeight:
    """A stored weight [K,N]: float32, or integer codes with scales [K/block_size,N]."""

    values: ir.ExternalTensor
    scales: ir.ExternalTensor | None = None
    zero_points: ir.ExternalTensor | None = None
    block_size: int | None = None
    input_order: ir.ExternalTensor | None = None
    """[K] int64: row k belongs to this input; None where they are in order."""


@dataclass(frozen=True)
class Padding:
    """Sizes up to which a weight is filled with zeros; None leaves a side as it is."""

    outputs: int | None = None
    """Of each of the layers that are fused."""
    inputs: int | None = None


NO_PADDING = Padding()
