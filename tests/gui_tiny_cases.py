# SPDX-License-Identifier: Apache-2.0
"""gui-tiny in PyTorch, and lessons packed for it."""

from functools import lru_cache
from pathlib import Path

import batches
import lessons
import packed
import tokens
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

MODEL = Path(__file__).parent.parent / "models" / "gui-tiny"


@lru_cache(maxsize=1)
def reference_model() -> Qwen2_5_VLForConditionalGeneration:
    """The shipped weights in float32; tests must not change them."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


def forward_of(layout: packed.Layout) -> packed.PackedForward:
    return packed.PackedForward(reference_model(), tokens.build_tokenizer(), layout)


def asking_of(some: list[lessons.Lesson], forward: packed.PackedForward) -> batches.Asking:
    """The questions of lessons of the forward pass's layout."""
    asking = batches.collate(some, lambda _: forward, relative=False).asking
    assert asking is not None
    return asking
