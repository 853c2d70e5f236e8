# SPDX-License-Identifier: Apache-2.0
"""The vision tower for batches of images of one size: the same maths as Hugging Face's, without its Python
loop over windows."""

import numpy as np
import torch
import torch.nn.functional as F
from attention import attend
from elementwise import rms_norm, rotate
from model import MERGE, PATCH
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as reference

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def patchify(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → uint8 [B, patches, 588], in Qwen's merge order, one temporal slice."""
    batch, height, width, _ = images.shape
    rows, columns, side = height // PATCH, width // PATCH, PATCH * PATCH
    blocks = images.reshape(batch, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    return torch.from_numpy(blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, rows * columns, 3 * side))


class FastVision:
    """uint8 patches of :func:`patchify` → visual tokens ``[B, tokens, hidden]`` in raster order.

    Args:
        model: its parameters are read at every call.
        height, width: of all images in pixels, multiples of the vision window.

    Raises:
        ValueError: they are no multiples.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, height: int, width: int) -> None:
        self._tower = model.model.visual
        vision = model.config.vision_config
        grid = torch.tensor([[1, height // PATCH, width // PATCH]])
        window_index, boundaries = reference.get_vision_window_index(
            grid, spatial_merge_size=MERGE, window_size=vision.window_size, patch_size=PATCH
        )
        lengths = torch.as_tensor(boundaries).diff().unique()
        if len(lengths) != 1:
            raise ValueError(
                f"{width}x{height} is no multiple of the vision window of {vision.window_size} pixels"
            )
        device = next(model.parameters()).device
        self._window = int(lengths[0])
        self._reverse = torch.argsort(window_index).to(device)
        self._order = (window_index[:, None] * MERGE**2 + torch.arange(MERGE**2)).reshape(-1)
        positions = reference.get_vision_position_ids(grid, MERGE).to(device)
        cos, sin = self._tower.rotary_pos_emb(torch.zeros(1, device=device), positions)
        self._cos, self._sin = (table[self._order.to(device)][None, None] for table in (cos, sin))
        self._scale = torch.from_numpy(np.repeat(1 / (255 * STD), PATCH**2)).to(device)
        self._shift = torch.from_numpy(np.repeat(-MEAN / STD, PATCH**2)).to(device)

    def __call__(self, patches: Tensor) -> Tensor:
        tower = self._tower
        pixels = patches[:, self._order].to(self._scale.device).float() * self._scale + self._shift
        batch, count, _ = pixels.shape
        heads = tower.config.num_heads
        # A still image fills both temporal slices with the same pixels: sum the kernel over them instead.
        x = F.linear(pixels, tower.patch_embed.proj.weight.sum(2).flatten(1))

        def windows(t: Tensor) -> Tensor:
            split = t.reshape(batch, heads, count // self._window, self._window, -1).transpose(1, 2)
            return split.reshape(batch * count // self._window, heads, self._window, -1)

        for index, block in enumerate(tower.blocks):
            qkv = block.attn.qkv(rms_norm(x, block.norm1)).view(batch, count, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = (rotate(t, self._cos, self._sin) for t in (q, k))
            if index in tower.fullatt_block_indexes:
                attended = attend(q, k, v)
            else:
                # [B * windows, heads, window, D] → [B, heads, patches, D]
                local = attend(windows(q), windows(k), windows(v))
                local = local.reshape(batch, count // self._window, heads, self._window, -1)
                attended = local.transpose(1, 2).reshape(batch, heads, count, -1)
            x = x + block.attn.proj(attended.transpose(1, 2).reshape(batch, count, -1))
            h = rms_norm(x, block.norm2)
            x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h))
        merged = rms_norm(x, tower.merger.ln_q).view(batch, count // MERGE**2, -1)
        visual: Tensor = tower.merger.mlp(merged)[:, self._reverse]
        return visual
