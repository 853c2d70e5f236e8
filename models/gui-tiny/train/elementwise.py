# SPDX-License-Identifier: Apache-2.0
"""Elementwise steps of the network, fused by ``torch.compile`` where training asks for it.

On a CPU they take a fifth of a training step otherwise. Compiling needs a C++ compiler and half a minute.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def _rms_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), EPSILON).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


_normed: Callable[[Tensor, Tensor, torch.dtype], Tensor] = _rms_norm
_rotated: Callable[[Tensor, Tensor, Tensor], Tensor] = _rotate


def fuse() -> None:
    """Compile what follows from here on."""
    global _normed, _rotated
    _normed = torch.compile(_rms_norm, dynamic=True)
    _rotated = torch.compile(_rotate, dynamic=True)


def rms_norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """Computed in fp32; the result is what autocast would make of it for the product that follows."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return _normed(x, norm.weight, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, in fp32, returned in x's dtype."""
    return _rotated(x, cos, sin)
