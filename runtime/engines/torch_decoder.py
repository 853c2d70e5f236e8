# SPDX-License-Identifier: Apache-2.0
"""The text decoder of Qwen2.5-VL in PyTorch: short enough to read, and what faster engines are compared with.

Symbols: L layers, B sequences, S new rows, C rows of cache capacity, H query heads, G KV heads, D head dim. A
cache stores M = G heads, or M = H where every query head kept rows of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starkv.errors import CheckpointError
from starkv.manifest import TextShape

QUERY_CHUNK = 256
"""Queries at a time whose attention weights are in memory."""

# Those of transformers today, of OpenCUA, and of the older files on the Hub.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_HEAD, _EMBEDDING, _NORM = "lm_head.weight", "embed_tokens.weight", "norm.weight"


def decoder_name(name: str) -> str:
    """A checkpoint's name of a tensor without the prefix, which files spell differently."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def decoder_weights(shape: TextShape) -> dict[str, tuple[int, ...]]:
    """Names, without prefix, and shapes of all weights that the decoder needs."""
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "input_layernorm.weight": (shape.hidden,),
        "self_attn.q_proj.weight": (width, shape.hidden),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (kv_width, shape.hidden),
        "self_attn.k_proj.bias": (kv_width,),
        "self_attn.v_proj.weight": (kv_width, shape.hidden),
        "self_attn.v_proj.bias": (kv_width,),
        "self_attn.o_proj.weight": (shape.hidden, width),
        "post_attention_layernorm.weight": (shape.hidden,),
        "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
    }
    head = _EMBEDDING if shape.tied_embedding else _HEAD
    needed: dict[str, tuple[int, ...]] = {_NORM: (shape.hidden,), head: (shape.vocab, shape.hidden)}
    for index in range(shape.layers):
        needed |= {f"layers.{index}.{name}": size for name, size in layer.items()}
    return needed


@dataclass(frozen=True)
class TorchCache:
    """Keys and values of B sequences; the decoder writes into them."""

    keys: Tensor
    """``[L, B, M, C, D]`` after rotation."""
    values: Tensor
    """``[L, B, M, C, D]``."""
    lengths: Tensor
    """``[L, B]`` int32: valid rows; layers may differ after compaction."""

    @classmethod
    def allocate(cls, shape: TextShape, batch: int, rows: int, dtype: torch.dtype) -> "TorchCache":
        """Zeroed room for ``rows`` rows of ``batch`` sequences, for the KV heads."""
        size = (shape.layers, batch, shape.kv_heads, rows, shape.head_dim)
        lengths = torch.zeros(shape.layers, batch, dtype=torch.int32)
        return cls(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype), lengths)


@dataclass(frozen=True)
class DecoderStep:
    """What a step leaves beside the rows it appended."""

    logits: Tensor
    """``[B, vocab]`` f32 of each sequence's last row."""
    queries: Tensor
    """``[L, B, H, S, D]`` after rotation."""
    hidden_norm: Tensor
    """``[L, B, S]`` f32: L2 norm of each row's attention input, behind ``input_layernorm``."""


class TorchDecoder:
    """Steps the decoder over a cache: S rows are a prefill, one is a decode step, as in the graph."""

    def __init__(
        self,
        shape: TextShape,
        norm_epsilon: float,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take the weights by their Hugging Face names; tensors that the decoder doesn't need are ignored.

        Args:
            shape: sizes.
            norm_epsilon: epsilon of the RMSNorm.
            weights: with or without the prefixes ``model.language_model.`` and ``model.``.
            dtype: of weights, activations and cache.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        self.shape, self._epsilon, self.dtype = shape, norm_epsilon, dtype
        needed = decoder_weights(shape)
        self._weights = {
            short: tensor.to(dtype)
            for name, tensor in weights.items()
            if (short := decoder_name(name)) in needed
        }
        for name, size in needed.items():
            if name not in self._weights:
                raise CheckpointError(f"the checkpoint holds no unquantized tensor {name}")
            if (found := tuple(self._weights[name].shape)) != size:
                raise CheckpointError(f"tensor {name} is {found}, but the model's sizes say {size}")

    def step(self, embeds: Tensor, cos: Tensor, sin: Tensor, cache: TorchCache) -> DecoderStep:
        """Append S rows to every sequence of the cache, in place, each row seeing those before it.

        Args:
            embeds: ``[B, S, hidden]``.
            cos: ``[B, S, D / 2]`` f32, one entry per rotary pair.
            sin: likewise.
            cache: with room for S more rows.
        """
        queries, norms = [], []
        with torch.no_grad():
            x = embeds.to(self.dtype)
            for layer in range(self.shape.layers):
                h = self.rms_norm(x, f"layers.{layer}.input_layernorm")
                norms.append(h.float().norm(dim=-1))
                attended, q = self._attention(h, cos, sin, layer, cache)
                queries.append(q)
                x = x + attended
                x = x + self.mlp(self.rms_norm(x, f"layers.{layer}.post_attention_layernorm"), layer)
            cache.lengths.add_(embeds.shape[1])
            logits = self.logits(x[:, -1])
        return DecoderStep(logits, torch.stack(queries), torch.stack(norms))

    def weight(self, name: str) -> Tensor:
        """A weight by its short name, such as ``layers.0.self_attn.k_proj.bias``."""
        return self._weights[name]

    def logits(self, x: Tensor) -> Tensor:
        """``[..., vocab]`` f32 of what the last layer puts out, ``[..., hidden]``."""
        head = _EMBEDDING if self.shape.tied_embedding else _HEAD
        return F.linear(self.rms_norm(x, "norm"), self._weights[head]).float()

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Projection ``name``, with its bias if it has one."""
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        """Normalisation ``name`` along the last axis."""
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + self._epsilon).rsqrt()
        return self._weights[f"{name}.weight"] * (wide * scale).to(x.dtype)

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        """Feed-forward part of a layer."""
        name = f"layers.{layer}.mlp"
        gate = F.silu(self.linear(x, f"{name}.gate_proj"))
        return self.linear(gate * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def _attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: TorchCache
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, S, hidden]`` and rotated queries ``[B, H, S, D]``."""
        name, new = f"layers.{layer}.self_attn", x.shape[1]

        def heads(projection: str) -> Tensor:
            return (
                self.linear(x, f"{name}.{projection}")
                .unflatten(-1, (-1, self.shape.head_dim))
                .transpose(1, 2)
            )

        q, k, v = rotate(heads("q_proj"), cos, sin), rotate(heads("k_proj"), cos, sin), heads("v_proj")
        keys, values, starts = cache.keys[layer], cache.values[layer], cache.lengths[layer].tolist()
        # Query heads that share a KV head have the same new row, also where their older rows differ.
        copies = keys.shape[1] // self.shape.kv_heads
        for sequence, start in enumerate(starts):
            rows = slice(start, start + new)
            keys[sequence, :, rows] = k[sequence].repeat_interleave(copies, 0)
            values[sequence, :, rows] = v[sequence].repeat_interleave(copies, 0)
        used = max(starts) + new
        last_seen = torch.tensor(starts)[:, None] + torch.arange(new)
        visible = torch.arange(used) <= last_seen[:, None, :, None]
        attended = F.scaled_dot_product_attention(
            q, keys[:, :, :used], values[:, :, :used], attn_mask=visible, enable_gqa=True
        )
        return self.linear(attended.transpose(1, 2).flatten(2), f"{name}.o_proj"), q


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of ``[B, heads, S, D]`` by angles ``[B, S, D / 2]``, in float32."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None].float(), sin[:, None].float()
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x.dtype)


def attention_sums(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention that each row got from all queries of a prefill, for H2O.

    Args:
        queries: ``[L, B, H, S, D]``, of every row.
        keys: ``[L, B, G, S, D]``.

    Returns:
        ``[L, B, H, S]`` f32: column sums of the causal attention weights.
    """
    copies, rows = queries.shape[2] // keys.shape[2], queries.shape[3]
    sums = torch.zeros(queries.shape[:4], device=queries.device)
    # One layer and a few queries at a time: the weights of all together would be L x H x S x S.
    for layer in range(len(queries)):
        for start in range(0, rows, QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, rows)
            seen = keys[layer, :, :, :end].float().repeat_interleave(copies, 1)
            scores = queries[layer, :, :, start:end].float() @ seen.mT / math.sqrt(queries.shape[-1])
            query, row = (torch.arange(first, end, device=queries.device) for first in (start, 0))
            weights = scores.masked_fill_(row > query[:, None], -torch.inf).softmax(-1)
            sums[layer, :, :, :end] += weights.sum(-2)
    return sums
