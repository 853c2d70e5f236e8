# SPDX-License-Identifier: Apache-2.0
"""Latents as a packed cache gives them back, differentiable by passing gradients straight through."""

import torch
from torch import Tensor

from starkv.lowrank.latent_format import LatentFormat, outliers
from starkv.lowrank.pack import LEAST_MAGNITUDE


def fake_quantize(latents: Tensor, latent: LatentFormat) -> Tensor:
    """Latents ``[..., rank]`` after packing and unpacking; the gradient is that of doing nothing.

    Each token's outliers and inliers have one scale each, as in ``starkv.lowrank.pack``.
    """
    if not latent.quantized:
        return latents
    first = outliers(latents.shape[-1])
    with torch.no_grad():
        blocks = ((latents[..., :first], latent.outlier_bits), (latents[..., first:], latent.inlier_bits))
        rounded = torch.cat([_rounded(block, bits) for block, bits in blocks], dim=-1)
    return latents + (rounded - latents).detach()


def _rounded(block: Tensor, bits: int) -> Tensor:
    if block.shape[-1] == 0:
        return block
    largest = 2 ** (bits - 1) - 1
    scale = block.abs().amax(dim=-1, keepdim=True).clamp(min=float(LEAST_MAGNITUDE)) / largest
    codes = (block / scale).round().clamp(-largest - 1, largest)
    # Codes are worked out by the exact scale; what is stored of it is a bfloat16.
    return codes * scale.bfloat16().float()
