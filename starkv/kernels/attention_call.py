# SPDX-License-Identifier: Apache-2.0
"""One call of the operator ``KVAttention`` as tensors, and its reference in PyTorch.

The meaning is that of the ONNX definition (``starkv/onnx_ops.py``). Symbols: B sequences, S new tokens, H
query heads, G KV heads, C rows of capacity, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.tensor_checks import Wanted, check_tensors

ATTENTION_DTYPES = (torch.float16, torch.bfloat16)


@dataclass
class AttentionCall:
    """Inputs of ``KVAttention``, all contiguous and on one device."""

    q: Tensor
    """``[B, S, H·D]`` float16 or bfloat16, after rotation."""
    k: Tensor
    """``[B, S, G·D]``, after rotation."""
    v: Tensor
    """``[B, S, G·D]``."""
    past_k: Tensor
    """``[B, G, C, D]``; sequence b holds ``kv_len[b]`` rows."""
    past_v: Tensor
    """``[B, G, C, D]``."""
    kv_len: Tensor
    """``[B]`` i32."""

    @property
    def heads(self) -> int:
        """H."""
        return int(self.q.shape[2]) // int(self.past_k.shape[3])

    def check(self) -> None:
        """Refuse tensors that don't fit each other.

        Raises:
            UsageError: names the tensor and what it should be.
        """
        if self.past_k.dim() != 4 or self.q.dim() != 3:
            raise UsageError("past_k must be [B, G, C, D] and q [B, S, H*D]")
        batch, groups, capacity, dim = self.past_k.shape
        tokens, heads = self.q.shape[1], self.heads
        if self.q.dtype not in ATTENTION_DTYPES:
            raise UsageError(f"q must be float16 or bfloat16, not {self.q.dtype}")
        if heads < 1 or heads % groups:
            raise UsageError(f"{heads} query heads can't share {groups} KV heads evenly")
        cache, i32 = self.q.dtype, torch.int32
        wanted: dict[str, Wanted] = {
            "q": (cache, (batch, tokens, heads * dim)),
            "k": (cache, (batch, tokens, groups * dim)),
            "v": (cache, (batch, tokens, groups * dim)),
            "past_k": (cache, (batch, groups, capacity, dim)),
            "past_v": (cache, (batch, groups, capacity, dim)),
            "kv_len": (i32, (batch,)),
        }
        check_tensors(self, wanted)


def reference_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """``KVAttention`` in float32: ``out [B, S, H·D]`` f32, ``present_k`` and ``present_v`` in the cache's
    dtype.

    Rows from ``kv_len + S`` on are never read. A sequence that its cache can't hold is left alone, and its
    output is 0.
    """
    batch, groups, capacity, dim = call.past_k.shape
    tokens = call.q.shape[1]
    out = torch.zeros(batch, tokens, call.heads * dim, device=call.q.device)
    present_k, present_v = call.past_k.clone(), call.past_v.clone()
    for b, held in enumerate(call.kv_len.tolist()):
        if held < 0 or held + tokens > capacity:
            continue
        end = held + tokens
        present_k[b, :, held:end] = call.k[b].view(tokens, groups, dim).transpose(0, 1)
        present_v[b, :, held:end] = call.v[b].view(tokens, groups, dim).transpose(0, 1)
        queries = call.q[b].view(tokens, groups, -1, dim).permute(1, 2, 0, 3).float()
        keys, values = (cache[b, :, None, :end].float() for cache in (present_k, present_v))
        scores = queries @ keys.transpose(-1, -2) / dim**0.5
        row = torch.arange(end, device=scores.device)
        query = torch.arange(tokens, device=scores.device)[:, None]
        scores = scores.masked_fill(row > held + query, -torch.inf)
        attended = scores.softmax(-1) @ values
        out[b] = attended.permute(2, 0, 1, 3).reshape(tokens, -1)
    return out, present_k, present_v
