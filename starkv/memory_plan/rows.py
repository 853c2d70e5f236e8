# SPDX-License-Identifier: Apache-2.0
"""Rows of prompts and of slots, and the bytes of the caches that hold them."""

from math import prod

import numpy as np

from starkv.errors import UsageError
from starkv.manifest import ImageLimits, TextShape, VisionShape
from starkv.methods.budget import Budget
from starkv.methods.rows import PromptRows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_plan import StarKVProgress
from starkv.methods.star_kv_request import request_star_kv
from starkv.runtime.engines.trt_kv import POOL_STEP
from starkv.runtime.kv.buffers import cache_shape
from starkv.runtime.preprocess.image import smart_resize

SCREEN = 1080, 1920
"""Height and width of the screenshots of the usual prompt."""
SCREENS, TEXT_ROWS = 5, 190
"""How many there are, and the rows of text around them."""


def usual_prompt_rows(vision: VisionShape, limits: ImageLimits) -> int:
    """Rows of the usual prompt: five 1080p screenshots as ``smart_resize`` leaves them, and text."""
    side = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(*SCREEN, side, limits.min_pixels, limits.max_pixels)
    return SCREENS * (height // side) * (width // side) + TEXT_ROWS


def kept_rows(prompt_rows: int, budget: float, observation_window: int) -> int:
    """Most rows that any layer keeps of a prompt under STaR-KV: what ``Engine.most_kept_rows`` says.

    Layers share one budget, so that one may keep up to a quarter more than the share.

    Raises:
        UsageError: the budget is no share, or too small for the method.
    """
    kept = Budget(budget).rows(prompt_rows)
    blank = PromptRows(np.zeros((prompt_rows, 4), np.int32), (), ())
    return request_star_kv(StarKVConfig(), blank, kept, StarKVProgress(), observation_window).most_rows


def slot_rows(rows: int, cache_rows: int) -> int:
    """Capacity of the slots of a pool for sequences of so many rows, as ``TrtEngine.new_pool`` chooses it."""
    return min(-(-rows // POOL_STEP) * POOL_STEP, cache_rows)


def cache_bytes(text: TextShape, slots: int, rows: int) -> int:
    """Bytes of keys and values in 16 bits: 2 · 2 · L · slots · Hkv · C · D, with C = ``rows`` rounded up to
    64."""
    return 2 * 2 * prod(cache_shape(text, slots, rows))


def check_rows(rows: int, limit: int, name: str) -> None:
    """Refuse a prompt that no engine of the model holds.

    Raises:
        UsageError: it is longer than ``max_context``.
    """
    if rows > limit:
        raise UsageError(
            f"{rows} KV rows, prompt and reply, are more than {name}'s max_context of {limit}; give fewer "
            "--prompt-rows"
        )
