# SPDX-License-Identifier: Apache-2.0
"""The clipping of activation-aware quantization: the largest weights of a block are cut to round the others
better.

A block of a row contributes a part of an output. Its ratio is the one by which the rounded block errs least
in that part, over the calibration prompts (AWQ, arXiv 2306.00978, as in its authors' code). Needs PyTorch.

Symbols: K inputs in B blocks of b, N outputs, T rows of activations.
"""

import torch
from torch import Tensor

from starkv.export.quantize.awq_plan import CLIP_RATIOS
from starkv.export.quantize.awq_scales import CHUNK_WEIGHTS, Rounding, in_blocks

_DAMPING = 1e-3
"""Of the mean square of a block's activations: keeps the factors defined where prompts show too little."""


def search_clips(weight: Tensor, scales: Tensor, rows: Tensor, rounding: Rounding) -> Tensor:
    """Ratios of all blocks of a weight.

    Args:
        weight: [N,K] as it is in the checkpoint.
        scales: [K] float32 factors of its inputs.
        rows: [T,K] activations, in the dtype to multiply in.
        rounding: how the scaled weight will be rounded.

    Returns:
        uint8 [N,B]: which of ``CLIP_RATIOS`` is best.
    """
    factors = block_factors(rows.float() / scales, rounding.block_size).to(rows.dtype)
    step = max(1, CHUNK_WEIGHTS // weight.shape[1])
    return torch.cat([best_ratios(chunk.float() * scales, factors, rounding) for chunk in weight.split(step)])


def block_factors(rows: Tensor, block_size: int) -> Tensor:
    """[B,b,b] lower factors F of activations [T,K]: a difference d [b] of a block's weights changes outputs
    by |d F|² in the mean square."""
    blocks = in_blocks(rows, block_size).transpose(0, 1)
    products = blocks.mT @ blocks / len(rows)
    mean_square = products.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
    damping = _DAMPING * mean_square[:, None, None] * torch.eye(block_size, device=rows.device)
    return torch.linalg.cholesky(products + damping)


def best_ratios(weight: Tensor, factors: Tensor, rounding: Rounding) -> Tensor:
    """uint8 [N,B] for a scaled weight [N,K] float32 and :func:`block_factors` [B,b,b]."""
    blocks = in_blocks(weight, rounding.block_size)
    largest_code = 2 ** (rounding.bits - 1) - 1
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    errors = []
    for ratio in CLIP_RATIOS:
        steps = largest * (ratio / largest_code)
        # Clipping and then rounding is rounding to the same codes and no larger ones.
        wrong = (blocks / steps).round_().clamp_(-largest_code, largest_code).mul_(steps).sub_(blocks)
        outputs = wrong.transpose(0, 1).to(factors.dtype) @ factors
        errors.append(torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32))
    return torch.stack(errors).argmin(0).T.to(torch.uint8)
