# SPDX-License-Identifier: Apache-2.0
"""The text decoder with a mask of its own, and looks inside for the auxiliary losses."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from attention import attend
from elementwise import rms_norm, rotate
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

TAPPED_LAYER = 1
"""Layer after which visual tokens have to know what they show."""
GUIDED_FROM_LAST = 2
"""The layer of which one head is told where to look is the last but one: the last writes what was found."""
FINDING_FROM_LAST = 3
"""The layer of which one head is told where the question's own words lie, such as what a target is left of:
one layer before the target itself is looked at."""
FOLLOWING_FROM_LAST, COPYING_FROM_LAST = 3, 2
"""Layers of which another head reads lists. In the first, each item of an instruction looks at the item
before; in the second, an answer that says what comes next looks at the item that it copies."""
READING_HEAD = 2
"""The first of the second group; all others that are told where to look are the first."""
LOOKING_BACK_LAYER = 2
"""The layer of which one head is told to look at the same place of the frame before. Visual tokens know there
what they show, and behind it they can tell what was not there before. No head had found that out by itself:
tokens took every element for new with the same probability."""
COMPARED_FROM_LAST = 3
"""Layer after which visual tokens have to know what changed since the frame before."""

NEVER = -1e9
"""Added to scores of what may not be seen."""


class Hidden(NamedTuple):
    """What a forward pass of the decoder gives."""

    packed: Tensor
    """``[B, T, hidden]``: final states of the packed part."""
    tapped: Tensor
    """``[B, visual tokens, hidden]`` after layer ``TAPPED_LAYER``."""
    compared: Tensor
    """The same, further up."""
    attended_log: Tensor
    """``[B, T, visual tokens]``: log-probabilities with which the guided head's packed rows attend."""
    finding_log: Tensor
    """The same of the head that is told where the question's own words lie."""
    looking_back_log: Tensor
    """``[B, visual tokens of all frames but the first]``: log-probability with which each attends to the same
    place of the frame before."""
    following_log: Tensor
    """``[B, T, T]``: log-probabilities with which packed rows attend to each other, of the head by which
    items of a list know the one before."""
    copying_log: Tensor
    """The same of the head by which answers copy an item."""


def decoder_hidden(
    model: Qwen2_5_VLForConditionalGeneration,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    prefix: int,
    image_slots: Tensor,
    frames: int,
) -> Hidden:
    """Run all layers.

    Args:
        model: its parameters are read at every call.
        x: input embeddings ``[B, S, hidden]``.
        cos, sin: rotary tables ``[B, 1, S, head_dim]``.
        mask: ``[B, 1, S, S]``, true where a row may look.
        prefix: rows before the packed part.
        image_slots: rows of the visual tokens.
        frames: screenshots that they belong to.
    """
    decoder = model.model.language_model
    config = decoder.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    batch, length, _ = x.shape
    tapped = compared = attended_log = finding_log = looking_back_log = following_log = copying_log = x
    bias = torch.where(mask, 0.0, NEVER)
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        h = rms_norm(x, layer.input_layernorm)
        q = attention.q_proj(h).view(batch, length, heads, -1).transpose(1, 2)
        k = attention.k_proj(h).view(batch, length, kv_heads, -1).transpose(1, 2)
        v = attention.v_proj(h).view(batch, length, kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        if index == LOOKING_BACK_LAYER:
            looking_back_log = _looking_back_log(q, k, image_slots, frames)
        if index == config.num_hidden_layers - GUIDED_FROM_LAST:
            attended_log = _head_log(q, k, 0, mask, prefix)[:, :, image_slots]
        if index == config.num_hidden_layers - FINDING_FROM_LAST:
            finding_log = _head_log(q, k, 0, mask, prefix)[:, :, image_slots]
        if index == config.num_hidden_layers - FOLLOWING_FROM_LAST:
            following_log = _head_log(q, k, READING_HEAD, mask, prefix)[:, :, prefix:]
        if index == config.num_hidden_layers - COPYING_FROM_LAST:
            copying_log = _head_log(q, k, READING_HEAD, mask, prefix)[:, :, prefix:]
        bias = bias.to(q.dtype)
        # Rows of the prefix never see what is packed behind it.
        before, behind = (t[:, :, :prefix] for t in (q, k, v)), (q[:, :, prefix:], k, v)
        attended = torch.cat(
            [attend(*before, bias[:, :, :prefix, :prefix]), attend(*behind, bias[:, :, prefix:])], 2
        )
        x = x + attention.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        h = rms_norm(x, layer.post_attention_layernorm)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
        if index == TAPPED_LAYER:
            tapped = x[:, image_slots]
        if index == config.num_hidden_layers - COMPARED_FROM_LAST:
            compared = x[:, image_slots]
    final = rms_norm(x, decoder.norm)[:, prefix:]
    return Hidden(
        final, tapped, compared, attended_log, finding_log, looking_back_log, following_log, copying_log
    )


def _head_log(q: Tensor, k: Tensor, head: int, mask: Tensor, prefix: int) -> Tensor:
    """Log-probabilities with which a head's packed rows attend to all rows."""
    scores = q[:, head, prefix:].float() @ k[:, head].float().transpose(1, 2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask[:, 0, prefix:], float("-inf")).log_softmax(-1)


def _looking_back_log(q: Tensor, k: Tensor, image_slots: Tensor, frames: int) -> Tensor:
    """Log-probability with which each visual token's first head attends to its place one frame before."""
    each = len(image_slots) // frames
    rows, before = image_slots[each:], image_slots[: len(image_slots) - each]
    scores = q[:, 0, rows].float() @ k[:, 0].float().transpose(1, 2) / q.shape[-1] ** 0.5
    unseen = torch.arange(k.shape[2], device=k.device) > rows[:, None]
    logs = scores.masked_fill(unseen, float("-inf")).log_softmax(-1)
    return logs.gather(-1, before[None, :, None].expand(len(q), -1, 1))[..., 0]
