# SPDX-License-Identifier: Apache-2.0
"""Attention out of matrix products.

PyTorch's fused attention on CPUs has a backward pass that takes two to eight times as long for heads this
small, so training spent half of its time there.
"""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: ``[..., Q, D]``.
        k, v: ``[..., K, D]``.
        bias: added to the scores, ``[..., Q, K]``; large and negative where nothing may be seen.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    return torch.matmul(scores.softmax(-1), v)
