# SPDX-License-Identifier: Apache-2.0
"""Activation-aware weight quantization (AWQ, arXiv 2306.00978): scales of one group of linear layers.

Inputs with large activations are multiplied up in the weights, where rounding then costs them less, and
divided by as much before. How strongly is a power of their mean magnitude; the exponent is searched on a grid
by the error of the rounded layers' outputs. Needs PyTorch.

Symbols: K inputs, N outputs, T rows of activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starkv.export.quantize.awq_plan import GroupResult
from starkv.export.quantize.columns import Bits

EXPONENTS = tuple(step / 10 for step in range(10))
"""Tried first, then what lies halfway to the neighbours of the best. The first is plain rounding: on the rows
searched with, no result is worse than it."""
SMALLEST_SHARE = 1e-3
"""Of the mean magnitude: a channel that was hardly ever seen is not scaled down without limit."""
CHUNK_WEIGHTS = 1 << 20
"""Weights at a time: what is computed from them stays in the processor's cache."""


@dataclass(frozen=True)
class Rounding:
    """How weights will be stored."""

    bits: Bits
    block_size: int
    """Inputs that share a scale."""


def in_blocks(weight: Tensor, block_size: int) -> Tensor:
    """[N,K] → [N,B,block_size], the last block filled up with zeros."""
    missing = -weight.shape[1] % block_size
    return (F.pad(weight, (0, missing)) if missing else weight).unflatten(-1, (-1, block_size))


def rounding_error(weight: Tensor, rounding: Rounding) -> Tensor:
    """What ``blockwise.quantize_rows`` adds to a weight [N,K] float32: [N,K]."""
    blocks = in_blocks(weight, rounding.block_size)
    largest_code = 2 ** (rounding.bits - 1) - 1
    steps = blocks.abs().amax(-1, keepdim=True) / largest_code
    steps = torch.where(steps < torch.finfo(torch.float32).tiny, 1.0, steps)
    codes = (blocks / steps).round_().clamp_(-largest_code - 1, largest_code)
    return codes.mul_(steps).sub_(blocks).flatten(-2)[:, : weight.shape[1]]


def candidate_scales(magnitudes: Tensor, exponent: float) -> Tensor:
    """Scales for an exponent, centred on 1: their largest and smallest are each other's inverse.

    Args:
        magnitudes: [K] mean absolute activations.
        exponent: 0 gives ones.
    """
    floor = SMALLEST_SHARE * magnitudes.mean()
    scales = magnitudes.clamp_min(floor).clamp_min(torch.finfo(torch.float32).tiny) ** exponent
    return scales / (scales.max() * scales.min()).sqrt()


@dataclass(frozen=True)
class JudgedWeights:
    """Weights of several layers of one input, and what an error of each of their outputs counts."""

    weights: Tensor
    """[N,K] float32: the layers' outputs one behind the other; biases cancel out."""
    importance: Tensor
    """[N] float32: inverse of the squared length of the layer's outputs, so that all layers count alike."""
    rows: Tensor
    """[T,K] activations, in the dtype to multiply in."""

    @classmethod
    def of(cls, layers: Sequence[Tensor], rows: Tensor) -> "JudgedWeights":
        """Take the layers [N,K] float32 and the activations [T,K]."""
        energies = [squared_outputs(weight, rows).sum() for weight in layers]
        importance = [
            torch.full((len(weight),), 1 / (len(layers) * float(energy)) if energy > 0 else 0.0)
            for weight, energy in zip(layers, energies, strict=True)
        ]
        return cls(torch.cat(list(layers)), torch.cat(importance).to(rows.device), rows)

    def error(self, scales: Tensor, rounding: Rounding) -> float:
        """Squared error of the outputs of scaled [K], rounded layers relative to the exact ones, mean over
        layers."""
        total = 0.0
        rows = (self.rows.float() / scales).to(self.rows.dtype)
        step = max(1, CHUNK_WEIGHTS // self.weights.shape[1])
        for chunk, importance in zip(self.weights.split(step), self.importance.split(step), strict=True):
            total += float(squared_outputs(rounding_error(chunk * scales, rounding), rows) @ importance)
        return total


def squared_outputs(weight: Tensor, rows: Tensor) -> Tensor:
    """[N] float32: squared length over all rows of each output of a weight [N,K] float32."""
    squares = [
        torch.linalg.vector_norm(F.linear(rows, chunk.to(rows.dtype)), dim=0, dtype=torch.float32).square()
        for chunk in weight.split(max(1, CHUNK_WEIGHTS // weight.shape[1]))
    ]
    return torch.cat(squares)


def search_group(
    weights: Sequence[Tensor],
    rows: Tensor,
    magnitudes: Tensor,
    origins: Tensor,
    rounding: Rounding,
) -> tuple[Tensor, GroupResult]:
    """Scales of the layers that share an input.

    Args:
        weights: [N,K] each, float32.
        rows: [T,K] activations to judge by.
        magnitudes: [K] mean absolute activations.
        origins: [K] int64: inputs with the same number share a scale, because they come from one output.
        rounding: how the weights will be rounded.

    Returns:
        Scales float32, one for each number in ``origins``, and what they are worth.
    """
    count = int(origins.max()) + 1
    shared = torch.zeros(count, device=magnitudes.device).scatter_reduce(
        0, origins, magnitudes, "mean", include_self=False
    )
    judged = JudgedWeights.of(weights, rows)
    errors: dict[float, float] = {}

    def judge(exponent: float) -> float:
        if exponent not in errors:
            errors[exponent] = judged.error(candidate_scales(shared, exponent)[origins], rounding)
        return errors[exponent]

    coarse = min(EXPONENTS, key=judge)
    step = EXPONENTS[1] / 2
    best = min((coarse, max(0.0, coarse - step), coarse + step), key=judge)
    return candidate_scales(shared, best), GroupResult(best, errors[best], errors[EXPONENTS[0]])
