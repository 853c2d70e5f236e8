# SPDX-License-Identifier: Apache-2.0
"""The clipping of activation-aware quantization: the largest weights of a block are cut to round the others
better.

A block of a row contributes a part of an output. Its ratio is the one by which the rounded block errs least
in that part, over the calibration prompts (AWQ, arXiv 2306.00978, as in its authors' code). Needs PyTorch.

Symbols: K inputs in B blocks of b, N outputs, T rows of activations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from starkv.export.quantize.awq_plan import CLIP_RATIOS
from starkv.export.quantize.awq_scales import Rounding, round_blockwise

_CHUNK_WEIGHTS = 1 << 22


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
    products = block_products(rows.float() / scales, rounding.block_size).to(rows.dtype)
    step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    return torch.cat(
        [best_ratios(chunk.float() * scales, products, rounding) for chunk in weight.split(step)]
    )


def block_products(rows: Tensor, block_size: int) -> Tensor:
    """[B,b,b] mean products of the activations [T,K] within each block."""
    padded = F.pad(rows, (0, -rows.shape[1] % block_size))
    blocks = padded.unflatten(-1, (-1, block_size)).transpose(0, 1)
    return blocks.mT @ blocks / len(rows)


def best_ratios(weight: Tensor, products: Tensor, rounding: Rounding) -> Tensor:
    """uint8 [N,B] for a scaled weight [N,K] float32 and :func:`block_products` [B,b,b]."""
    weight = F.pad(weight, (0, -weight.shape[1] % rounding.block_size))
    blocks = weight.unflatten(-1, (-1, rounding.block_size))
    largest = blocks.abs().amax(-1, keepdim=True)
    errors = []
    for ratio in CLIP_RATIOS:
        limit = largest * ratio
        clipped = torch.minimum(torch.maximum(blocks, -limit), limit).flatten(-2)
        wrong = (round_blockwise(clipped, rounding) - weight).unflatten(-1, (-1, rounding.block_size))
        wrong = wrong.transpose(0, 1).to(products.dtype)
        errors.append(((wrong @ products).float() * wrong).sum(-1))
    return torch.stack(errors).argmin(0).T.to(torch.uint8)
