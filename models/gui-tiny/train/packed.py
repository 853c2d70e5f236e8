# SPDX-License-Identifier: Apache-2.0
"""A fast training forward: the same maths as Hugging Face's, for batches of one fixed layout.

Hugging Face's forward walks the vision windows in a Python loop and pads every question by itself. Here
all images have one size (a multiple of the window), and ``questions`` questions about a screen share one
prefix: the mask lets each see the screen and itself only. ``test_gui_tiny`` checks the equality.
"""

import numpy as np
import torch
import torch.nn.functional as F
from model import MERGE, PATCH
from screens import Question
from tokens import SYSTEM_PROMPT
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as reference

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
TURN = "<|im_end|>\n<|im_start|>assistant\n"
TAPPED_LAYER, GUIDED_LAYER = 1, 2


def patchify(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → uint8 [B, patches, 588], in Qwen's merge order, one temporal slice."""
    batch, height, width, _ = images.shape
    rows, columns, side = height // PATCH, width // PATCH, PATCH * PATCH
    blocks = images.reshape(batch, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    return torch.from_numpy(blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, rows * columns, 3 * side))


def _rms_norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), norm.weight.float(), 1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class PackedForward:
    """Forward passes for one image size and one number of questions per screen.

    Args:
        model: the model; its parameters are read at every call.
        tokenizer: the tokenizer of :mod:`tokens`.
        size: image side in pixels, a multiple of the vision window.
        questions: questions packed behind one screen.
        segment: tokens per packed question and answer, padded.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        size: int,
        questions: int,
        segment: int = 24,
    ) -> None:
        self.model, self.tokenizer, self.size = model, tokenizer, size
        self.questions, self.segment = questions, segment
        vision = model.config.vision_config
        grid = torch.tensor([[1, size // PATCH, size // PATCH]])
        self.visual_tokens = (size // PATCH // MERGE) ** 2
        window_index, boundaries = reference.get_vision_window_index(
            grid, spatial_merge_size=MERGE, window_size=vision.window_size, patch_size=PATCH
        )
        lengths = torch.as_tensor(boundaries).diff().unique()
        if len(lengths) != 1:
            raise ValueError(
                f"size {size} is no multiple of the vision window of {vision.window_size} pixels"
            )
        device = next(model.parameters()).device
        self.window = int(lengths[0])
        self.reverse = torch.argsort(window_index).to(device)
        self.patch_order = (window_index[:, None] * MERGE**2 + torch.arange(MERGE**2)).reshape(-1)
        positions = reference.get_vision_position_ids(grid, MERGE).to(device)
        cos, sin = model.model.visual.rotary_pos_emb(torch.zeros(1, device=device), positions)
        self.vision_cos, self.vision_sin = (
            table[self.patch_order.to(device)][None, None] for table in (cos, sin)
        )

        before = self._encode(
            f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        )
        image_pad = self._encode("<|image_pad|>") * self.visual_tokens
        prefix = before + image_pad + self._encode("<|vision_end|>")
        kinds = [0] * len(before) + [1] * self.visual_tokens + [0]
        self.prefix = torch.tensor(prefix, device=device)
        self.image_slots = torch.arange(len(before), len(before) + self.visual_tokens, device=device)
        self._init_positions(grid, kinds, device)
        self.scale = torch.from_numpy(np.repeat(1 / (255 * STD), PATCH**2)).to(device)
        self.shift = torch.from_numpy(np.repeat(-MEAN / STD, PATCH**2)).to(device)

    def _init_positions(self, grid: Tensor, kinds: list[int], device: torch.device) -> None:
        prefix_length, total = len(self.prefix), len(self.prefix) + self.questions * self.segment
        inner = self.model.model
        positions, _ = inner.get_rope_index(
            self.prefix[None].cpu(), mm_token_type_ids=torch.tensor([kinds]), image_grid_thw=grid
        )
        behind = int(positions.max()) + 1 + torch.arange(self.segment)
        packed = behind.repeat(self.questions)[None].expand(3, -1)
        positions = torch.cat([positions[:, 0], packed], 1)[:, None].to(device)
        text_rope = inner.language_model.rotary_emb
        cos, sin = text_rope(torch.zeros(1, device=device), positions)
        # The rotary module returns the table after M-RoPE's section selection, [1, length, head_dim].
        self.cos, self.sin = (table.reshape(1, 1, total, -1) for table in (cos, sin))
        mask = torch.zeros(total, total, dtype=torch.bool)
        mask[:, :prefix_length] = True
        for index in range(self.questions):
            start = prefix_length + index * self.segment
            mask[start : start + self.segment, start : start + self.segment] = True
        self.mask = mask.tril().to(device)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def pack(self, questions: list[Question]) -> tuple[list[int], list[int], list[int]]:
        """Token ids, next-token targets (−100: not trained) and the starts of the answers."""
        ids: list[int] = []
        targets: list[int] = []
        starts: list[int] = []
        for question in questions:
            asked = self._encode(question.text + TURN)
            answer = self._encode(question.answer + "<|im_end|>")
            padding = self.segment - len(asked) - len(answer)
            if padding < 0:
                raise ValueError(
                    f"question of {self.segment - padding} tokens, segment of {self.segment}: {question}"
                )
            ids += asked + answer + [0] * padding
            targets += [-100] * (len(asked) - 1) + answer + [-100] * (padding + 1)
            starts.append(len(asked))
        return ids, targets, starts

    def normalise(self, patches: Tensor) -> Tensor:
        """uint8 patches of :func:`patchify` → float [B, patches, 588], in window order."""
        ordered = patches[:, self.patch_order].to(self.scale.device)
        return ordered.float() * self.scale + self.shift

    def vision(self, pixels: Tensor) -> Tensor:
        """Normalised patches [B, patches, 588] → visual tokens [B, tokens, hidden] in raster order."""
        tower = self.model.model.visual
        batch, count, _ = pixels.shape
        heads = tower.config.num_heads
        # A still image fills both temporal slices with the same pixels: sum the kernel over them instead.
        x = F.linear(pixels, tower.patch_embed.proj.weight.sum(2).flatten(1))

        def windows(t: Tensor) -> Tensor:
            split = t.reshape(batch, heads, count // self.window, self.window, -1).transpose(1, 2)
            return split.reshape(batch * count // self.window, heads, self.window, -1)

        for index, block in enumerate(tower.blocks):
            qkv = block.attn.qkv(_rms_norm(x, block.norm1)).view(batch, count, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = (_rotate(t, self.vision_cos, self.vision_sin) for t in (q, k))
            if index not in tower.fullatt_block_indexes:
                q, k, v = (windows(t) for t in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, -1)
            x = x + block.attn.proj(attended)
            h = _rms_norm(x, block.norm2)
            x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h))
        merged = _rms_norm(x, tower.merger.ln_q).view(batch, self.visual_tokens, -1)
        return tower.merger.mlp(merged)[:, self.reverse]

    def hidden(self, visual: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the decoder on visual tokens and packed ids ``[B, questions * segment]``.

        Returns:
            The hidden states of the packed part; and for the auxiliary losses the visual tokens after layer
            ``TAPPED_LAYER``, and what head 0 of layer ``GUIDED_LAYER`` attends to: log-probabilities
            [B, questions * segment, visual tokens] of the packed part's rows.
        """
        decoder = self.model.model.language_model
        config = decoder.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        batch = ids.shape[0]
        x = decoder.embed_tokens(torch.cat([self.prefix[None].expand(batch, -1), ids], 1)).float()
        x = x.index_copy(1, self.image_slots, visual.float())
        length = x.shape[1]
        tapped = attended_log = x
        for index, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            h = _rms_norm(x, layer.input_layernorm)
            q = attention.q_proj(h).view(batch, length, heads, -1).transpose(1, 2)
            k = attention.k_proj(h).view(batch, length, kv_heads, -1).transpose(1, 2)
            v = attention.v_proj(h).view(batch, length, kv_heads, -1).transpose(1, 2)
            q, k = _rotate(q, self.cos, self.sin), _rotate(k, self.cos, self.sin)
            if index == GUIDED_LAYER:
                attended_log = self._attention_log(q[:, 0], k[:, 0])
            k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            x = x + attention.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
            h = _rms_norm(x, layer.post_attention_layernorm)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
            if index == TAPPED_LAYER:
                tapped = x[:, self.image_slots]
        return _rms_norm(x, decoder.norm)[:, len(self.prefix) :], tapped, attended_log

    def _attention_log(self, q: Tensor, k: Tensor) -> Tensor:
        """Log-probabilities with which one head's packed rows attend to the visual tokens."""
        packed = slice(len(self.prefix), None)
        scores = q[:, packed].float() @ k.float().transpose(1, 2) / q.shape[-1] ** 0.5
        return scores.masked_fill(~self.mask[packed], float("-inf")).log_softmax(-1)[:, :, self.image_slots]

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.lm_head.weight)

    @torch.no_grad()
    def generate(self, visual: Tensor, ids: Tensor, starts: Tensor, steps: int = 12) -> list[list[str]]:
        """Greedy answers to packed questions: ``ids`` [B, questions * segment], ``starts`` [B, questions]."""
        batch = ids.shape[0]
        shape = (batch, self.questions, self.segment)
        place = torch.arange(self.segment, device=ids.device)
        grid = torch.where(place < starts[..., None], ids.view(shape), 0)
        # Past the segment's end there is no room: an answer that long is malformed and stays cut.
        for step in range(min(steps, self.segment - int(starts.max()))):
            hidden, _, _ = self.hidden(visual, grid.flatten(1))
            last = starts + step - 1
            picked = hidden.view(*shape, -1).gather(
                2, last[..., None, None].expand(-1, -1, 1, hidden.shape[-1])
            )
            following = self.logits(picked.squeeze(2)).argmax(-1)
            grid.scatter_(2, (starts + step)[..., None], following[..., None])
        end = "<|im_end|>"
        return [
            [
                self.tokenizer.decode(grid[b, q, int(starts[b, q]) :].tolist()).split(end)[0]
                for q in range(self.questions)
            ]
            for b in range(batch)
        ]
