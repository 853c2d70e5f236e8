# SPDX-License-Identifier: Apache-2.0
"""One decoder layer of Qwen2.5-VL in PyTorch, run over calibration prompts while its inputs are watched.

Half a layer at a time is in memory: attention, then the MLP. Needs PyTorch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from starkv.export.quantize.awq_source import Rows

_CHUNK_WEIGHTS = 1 << 23

Weights = dict[str, Tensor]
Watch = Callable[[Tensor], None]
"""Sees activations [S,K]."""


@dataclass(frozen=True)
class Place:
    """Where layers are computed, and in what."""

    device: torch.device
    dtype: torch.dtype
    """Of weights and of what they are multiplied with; hidden states are float32."""

    @classmethod
    def best(cls) -> "Place":
        """A GPU if there is one; bfloat16 where the processor multiplies it faster than float32."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), torch.bfloat16)
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return cls(torch.device("cpu"), torch.bfloat16 if fast else torch.float32)


@dataclass(frozen=True)
class Rope:
    """Rotary tables of one sequence, [S, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32], device: torch.device) -> "Rope":
        """Tables on a device."""
        return cls(torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device))


def read_weights(source: Rows, layer: str, names: Sequence[str], place: Place) -> Weights:
    """Tensors ``{layer}.{name}`` by name; matrices in the place's dtype, vectors in float32."""
    found: Weights = {}
    for name in names:
        shape = source.shape(f"{layer}.{name}")
        matrix = len(shape) > 1
        weight = torch.empty(shape, dtype=place.dtype if matrix else torch.float32, device=place.device)
        step = max(1, _CHUNK_WEIGHTS // shape[1]) if matrix else shape[0]
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            weight[start:stop] = torch.from_numpy(source.rows(f"{layer}.{name}", start, stop))
        found[name] = weight
    return found


ATTENTION_WEIGHTS = (
    "input_layernorm.weight",
    *(f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")),
    "self_attn.o_proj.weight",
)
MLP_WEIGHTS = (
    "post_attention_layernorm.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)


def attention_block(
    x: Tensor, weights: Weights, head_dim: int, epsilon: float, rope: Rope, seen: tuple[Watch, Watch]
) -> Tensor:
    """x [S, hidden] float32 → x behind the attention; ``seen`` gets the inputs of q, k, v and of o."""
    name, dtype = "self_attn", weights["self_attn.q_proj.weight"].dtype
    h = rms_norm(x, weights["input_layernorm.weight"], epsilon)
    seen[0](h)

    def heads(projection: str) -> Tensor:
        weight, bias = (weights[f"{name}.{projection}_proj.{kind}"] for kind in ("weight", "bias"))
        out = F.linear(h.to(dtype), weight).float() + bias
        return out.unflatten(-1, (-1, head_dim)).transpose(0, 1)

    q, k, v = rotate(heads("q"), rope), rotate(heads("k"), rope), heads("v")
    attended = F.scaled_dot_product_attention(
        q[None].to(dtype), k[None].to(dtype), v[None].to(dtype), is_causal=True, enable_gqa=True
    )
    attended = attended[0].transpose(0, 1).flatten(1)
    seen[1](attended.float())
    return x + F.linear(attended, weights[f"{name}.o_proj.weight"]).float()


def mlp_block(x: Tensor, weights: Weights, epsilon: float, seen: tuple[Watch, Watch]) -> Tensor:
    """x [S, hidden] float32 → x behind the MLP; ``seen`` gets the inputs of gate, up and of down."""
    dtype = weights["mlp.gate_proj.weight"].dtype
    h = rms_norm(x, weights["post_attention_layernorm.weight"], epsilon)
    seen[0](h)
    gate, up = (F.linear(h.to(dtype), weights[f"mlp.{name}_proj.weight"]).float() for name in ("gate", "up"))
    gated = F.silu(gate) * up
    seen[1](gated)
    return x + F.linear(gated.to(dtype), weights["mlp.down_proj.weight"]).float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm of the last axis, in float32."""
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of [heads, S, D]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin], -1)
