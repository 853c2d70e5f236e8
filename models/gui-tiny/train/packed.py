# SPDX-License-Identifier: Apache-2.0
"""Packs the questions about the same screenshots behind one prefix, so that those are read once.

The mask lets each question see the screenshots and itself only. ``test_gui_tiny`` checks that every question
gets the same logits as it would get alone from Hugging Face's forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fast_decoder import Hidden, decoder_hidden
from fast_vision import FastVision
from model import CELL
from tokens import SYSTEM_PROMPT
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IGNORE = -100
LONGEST_SEGMENT = 64
"""Tokens of the longest question with its answer."""


class Layout(NamedTuple):
    """Screenshots of a prompt: how many, and their size in pixels, a multiple of the vision window."""

    frames: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens of one frame."""
        return self.height // CELL, self.width // CELL

    @property
    def visual_tokens(self) -> int:
        """Of all frames."""
        rows, columns = self.grid
        return self.frames * rows * columns


@dataclass
class Packed:
    """Questions behind one prefix, one entry per token; or a batch of them, ``[B, T]`` each."""

    ids: Tensor
    targets: Tensor
    """Next-token targets, −100: not trained."""
    segments: Tensor
    """Number of the question, −1 for padding."""
    offsets: Tensor
    """Place inside the segment."""

    def to(self, device: torch.device | str) -> "Packed":
        return Packed(*(t.to(device) for t in (self.ids, self.targets, self.segments, self.offsets)))


def stack(packed: Sequence[Packed]) -> Packed:
    """A batch, padded on the right."""
    length = max(len(one.ids) for one in packed)

    def padded(name: str, value: int) -> Tensor:
        rows = [getattr(one, name) for one in packed]
        return torch.stack([F.pad(row, (0, length - len(row)), value=value) for row in rows])

    return Packed(padded("ids", 0), padded("targets", IGNORE), padded("segments", -1), padded("offsets", 0))


class PackedForward:
    """Forward passes for one layout of screenshots.

    Args:
        model: its parameters are read at every call.
        tokenizer: the tokenizer of :mod:`tokens`.
        layout: number and size of the screenshots.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        layout: Layout,
    ) -> None:
        self.model, self.tokenizer, self.layout = model, tokenizer, layout
        self.vision = FastVision(model, layout.height, layout.width)
        device = next(model.parameters()).device
        before = self._encode(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n")
        start, pad, end = (
            self._encode(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end")
        )
        rows, columns = layout.grid
        frame = start + pad * (rows * columns) + end
        ids = before + frame * layout.frames
        self.prefix = torch.tensor(ids, device=device)
        self.image_slots = torch.nonzero(self.prefix == pad[0])[:, 0]
        grids = torch.tensor([[1, 2 * rows, 2 * columns]] * layout.frames)
        kinds = (self.prefix == pad[0]).int()[None].cpu()
        positions, _ = model.model.get_rope_index(
            self.prefix[None].cpu(), mm_token_type_ids=kinds, image_grid_thw=grids
        )
        behind = int(positions.max()) + 1 + torch.arange(LONGEST_SEGMENT)
        positions = torch.cat([positions[:, 0], behind[None].expand(3, -1)], 1)[:, None].to(device)
        rotary = model.model.language_model.rotary_emb
        # The rotary module returns the tables after M-RoPE's section selection, [1, length, head_dim].
        self.cos, self.sin = (t[0] for t in rotary(torch.zeros(1, device=device), positions))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def pack(self, questions: Sequence[str], answers: Sequence[str]) -> Packed:
        """Questions with their answers.

        Raises:
            ValueError: a question with its answer is longer than ``LONGEST_SEGMENT``.
        """
        ids: list[int] = []
        targets: list[int] = []
        segments: list[int] = []
        offsets: list[int] = []
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            asked = self._encode(question + TURN)
            answered = self._encode(answer + END)
            length = len(asked) + len(answered)
            if length > LONGEST_SEGMENT:
                raise ValueError(f"question of {length} tokens, {LONGEST_SEGMENT} at most: {question}")
            ids += asked + answered
            targets += [IGNORE] * (len(asked) - 1) + answered + [IGNORE]
            segments += [number] * length
            offsets += range(length)
        return Packed(*(torch.tensor(values) for values in (ids, targets, segments, offsets)))

    def hidden(self, visual: Tensor, packed: Packed) -> Hidden:
        """Run the decoder on visual tokens ``[B, all visual tokens, hidden]`` and packed questions."""
        prefix = len(self.prefix)
        ids, segments = packed.ids, packed.segments
        embed = self.model.model.language_model.embed_tokens
        x = embed(torch.cat([self.prefix[None].expand(len(ids), -1), ids], 1)).float()
        x = x.index_copy(1, self.image_slots, visual.float())
        places = torch.arange(prefix, device=ids.device)[None].expand(len(ids), -1)
        places = torch.cat([places, prefix + packed.offsets], 1)
        same = segments[:, :, None] == segments[:, None]
        before = F.pad(torch.ones_like(segments, dtype=torch.bool)[:, :, None], (0, prefix - 1), value=True)
        rows = torch.cat([before, same], 2)
        above = torch.zeros(len(ids), prefix, rows.shape[2], dtype=torch.bool, device=ids.device)
        above[:, :, :prefix] = True
        mask = torch.cat([above, rows], 1).tril()[:, None]
        cos, sin = self.cos[places][:, None], self.sin[places][:, None]
        return decoder_hidden(self.model, x, cos, sin, mask, prefix, self.image_slots, self.layout.frames)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.lm_head.weight)
