# SPDX-License-Identifier: Apache-2.0
"""The differentiable threshold that lets training choose ranks (STAR-KV, arXiv 2606.08382). Needs PyTorch.

With t = tanh(sharpness · (x − threshold)):

    value        x · t   where x > threshold, else −leak · t
    d/dx         t + sharpness · x · (1 − t²)   where kept, else −leak · sharpness · (1 − t²)
    d/dthreshold −sharpness · x · (1 − t²)   where kept, else leak · sharpness · (1 − t²)

A strength well above the threshold passes unchanged: this is a smoothed hard cut, no shrinkage.
"""

from typing import Any

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.lowrank.factor import THRESHOLD_SHARPNESS


def soft_threshold(
    values: Tensor, threshold: Tensor, sharpness: float = THRESHOLD_SHARPNESS, leak: float = 0.0
) -> Tensor:
    """Cut ``values`` off at ``threshold``.

    Args:
        values: strengths, any shape, such as ``[groups, rank]``. They stay a vector per group; a diagonal
            matrix of them would cost rank² for the same result.
        threshold: float32 or float64, of a shape that broadcasts against ``values``, such as ``[groups, 1]``.
        sharpness: slope at the threshold.
        leak: what a cut strength turns into; 0 as published.

    Returns:
        As ``values`` in shape and dtype.

    Raises:
        UsageError: the threshold is of 16 bits, where steps of training are lost in rounding.
    """
    if threshold.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"a soft threshold must be float32, not {threshold.dtype}: 16 bits round a step of 0.01 away"
        )
    result: Tensor = _SoftThreshold.apply(values, threshold, sharpness, leak)
    return result


class _SoftThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, sharpness: float, leak: float) -> Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.sharpness, ctx.leak = sharpness, leak
        exact = values.to(threshold.dtype)
        bend = torch.tanh(sharpness * (exact - threshold))
        return torch.where(exact > threshold, exact * bend, -leak * bend).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, threshold = ctx.saved_tensors
        exact, upstream = values.to(threshold.dtype), gradients[0].to(threshold.dtype)
        bend = torch.tanh(ctx.sharpness * (exact - threshold))
        slope = ctx.sharpness * (1 - bend * bend)
        kept = exact > threshold
        by_value = torch.where(kept, bend + exact * slope, -ctx.leak * slope) * upstream
        by_threshold = torch.where(kept, -exact * slope, ctx.leak * slope) * upstream
        return by_value.to(values.dtype), by_threshold.sum_to_size(threshold.shape), None, None
