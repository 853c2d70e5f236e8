# SPDX-License-Identifier: Apache-2.0
"""One call of the operator ``FullAttention`` as tensors, and its reference in PyTorch.

The meaning is that of the ONNX definition (``starkv/onnx_ops.py``). Symbols: B sequences, N tokens, H heads,
D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.attention_call import ATTENTION_DTYPES
from starkv.kernels.tensor_checks import check_tensors


@dataclass
class FullAttentionCall:
    """Inputs of ``FullAttention``, all contiguous and on one device."""

    q: Tensor
    """``[B, N, H·D]`` float16 or bfloat16, after rotation."""
    k: Tensor
    """``[B, N, H·D]``, after rotation."""
    v: Tensor
    """``[B, N, H·D]``."""
    heads: int
    """H."""

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.q.shape[2]) // self.heads

    def check(self) -> None:
        """Refuse tensors that don't fit each other.

        Raises:
            UsageError: names the tensor and what it should be.
        """
        if self.q.dim() != 3 or self.heads < 1 or self.q.shape[2] % self.heads:
            raise UsageError(f"q must be [B, N, H*D] with H = {self.heads}, not {list(self.q.shape)}")
        if self.q.dtype not in ATTENTION_DTYPES:
            raise UsageError(f"q must be float16 or bfloat16, not {self.q.dtype}")
        shape = tuple(self.q.shape)
        check_tensors(self, dict.fromkeys(("q", "k", "v"), (self.q.dtype, shape)))


def reference_full_attention(call: FullAttentionCall) -> Tensor:
    """``FullAttention`` in float32: ``[B, N, H·D]``."""
    q, k, v = (
        tensor.float().unflatten(-1, (call.heads, -1)).transpose(1, 2) for tensor in (call.q, call.k, call.v)
    )
    scores = q @ k.transpose(-1, -2) / call.head_dim**0.5
    attended: Tensor = (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(-2)
    return attended
