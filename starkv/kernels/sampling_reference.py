# SPDX-License-Identifier: Apache-2.0
"""Argmax and nucleus sampling in PyTorch, the same to the bit as the kernels.

Weights of tokens are integers: sums are exact in any order, so every device chooses the same token.
"""

import torch
from torch import Tensor

WEIGHT_BITS = 40
"""The largest weight is ``2**WEIGHT_BITS``."""

_FARTHEST = 29.0
"""e^-29 is below half a unit of a weight."""
_LOG2_E = 1549082005
"""log2(e) in units of 2^-30."""
_POWERS = (2147483648, 1488522224, 515881616, 119183792, 20609765, 2774099, 246920)
"""2^-x for x in [0, 1] as a polynomial with coefficients in units of 2^-31, whose signs alternate."""
_FRACTION_BITS = 31


def token_weights(logits: Tensor, temperature: float) -> Tensor:
    """``exp((logit - largest) / temperature)`` of ``logits [V]`` f32 in units of 2^-40: ``[V]`` i64."""
    numbers = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    greatest = numbers.max()
    distance = (greatest - logits) / torch.tensor(temperature, dtype=torch.float32)
    # Infinite ones have no distance from each other.
    distance = torch.where(logits == greatest, torch.zeros_like(distance), distance)
    near = distance < _FARTHEST
    units = torch.where(near, distance * 2.0**26, torch.zeros_like(distance)).round().long()
    exponent = units * _LOG2_E
    fraction = exponent >> (56 - _FRACTION_BITS) & ((1 << _FRACTION_BITS) - 1)
    power = torch.full_like(units, _POWERS[-1])
    for coefficient in _POWERS[-2::-1]:
        power = coefficient - (power * fraction >> _FRACTION_BITS)
    halvings = exponent >> 56
    weight = power << (WEIGHT_BITS - _FRACTION_BITS)
    rounded = (weight + ((torch.ones_like(weight) << halvings) >> 1)) >> halvings
    return torch.where(near, rounded, torch.zeros_like(rounded))


def argmax_token(logits: Tensor) -> int:
    """Id of the largest of ``logits [V]``, the lowest of equal ones; NaN never wins, and 0 if nothing else is
    there."""
    numbers = ~logits.isnan()
    if not numbers.any():
        return 0
    greatest = logits[numbers].max()
    return int((logits == greatest).nonzero()[0])


def kept_tokens(weights: Tensor, top_p: float) -> Tensor:
    """Ids of the nucleus in ascending order: the shortest beginning of the weights, the largest first and of
    equal ones the lower id, whose sum reaches ``top_p`` of all."""
    total = int(weights.sum())
    order = weights.sort(descending=True, stable=True).indices
    # Products are those of float64, as the kernels take them.
    target = max(1, min(total, -int(-(_float32(top_p) * float(total)) // 1)))
    sums = weights[order].cumsum(0)
    count = int((sums < target).sum()) + 1
    return order[:count].sort().values


def sample_token(logits: Tensor, temperature: float, top_p: float, uniform: float) -> int:
    """The token that ``uniform`` in [0, 1) chooses from the nucleus of ``logits [V]`` f32; argmax where
    ``temperature`` is 0 or less."""
    if not _float32(temperature) > 0:
        return argmax_token(logits)
    weights = token_weights(logits, temperature)
    if not weights.any():
        return argmax_token(logits)
    kept = kept_tokens(weights, top_p)
    sums = weights[kept].cumsum(0)
    total = int(sums[-1])
    passed = min(total - 1, int(_float32(uniform) * float(total)))
    return int(kept[(sums <= passed).sum()])


def _float32(number: float) -> float:
    """The number as the kernels get it."""
    return float(torch.tensor(number, dtype=torch.float32))
