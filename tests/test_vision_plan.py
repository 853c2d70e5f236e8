# SPDX-License-Identifier: Apache-2.0
"""The vision plan against the window and position functions of Hugging Face's model."""

import importlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from starkv.manifest import VisionShape
from starkv.runtime.preprocess.vision_plan import WindowPlan, plan_vision

GRIDS = [(16, 16), (20, 36), (18, 30), (4, 2), (2, 2), (40, 72), (78, 138)]
SHAPE = VisionShape(
    depth=4,
    hidden=1280,
    intermediate=64,
    heads=16,
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=112,
    full_attention_blocks=[3],
    rope_theta=10_000.0,
)
WINDOW_PATCHES = 64
BLOCK = 4


def windowed(grid: tuple[int, int]) -> WindowPlan:
    plan = plan_vision(*grid, SHAPE)
    assert isinstance(plan, WindowPlan)
    return plan


def huggingface_order(grid: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """HF's merge blocks in window order, its window boundaries in patches, and cos/sin per patch."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    from transformers import vision_utils
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding

    config = transformers.Qwen2_5_VLConfig().vision_config
    config.hidden_size, config.num_heads = SHAPE.hidden, SHAPE.heads
    grid_thw = torch.tensor([[1, *grid]])
    window_index, boundaries = vision_utils.get_vision_window_index(grid_thw, 2, 112, 14)
    positions = vision_utils.get_vision_position_ids(grid_thw, 2)
    cos, sin = Qwen2_5_VLVisionRotaryEmbedding(config)(torch.zeros(1), positions)
    return window_index.numpy(), boundaries.numpy(), cos.numpy(), sin.numpy()


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_hold_the_same_patches_in_the_same_order_as_huggingface(grid: tuple[int, int]) -> None:
    window_index, boundaries, _, _ = huggingface_order(grid)
    plan = windowed(grid)
    expected = (window_index[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
    np.testing.assert_array_equal(plan.gather_idx[plan.real_slots], expected)
    np.testing.assert_array_equal(plan.window_valid.sum(axis=1), np.diff(boundaries))


@pytest.mark.parametrize("grid", GRIDS)
def test_rotary_tables_equal_huggingface(grid: tuple[int, int]) -> None:
    window_index, _, cos, sin = huggingface_order(grid)
    plan = windowed(grid)
    half = SHAPE.head_dim // 2
    patches = (window_index[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
    # HF repeats the half table for both members of a pair; a non-interleaved RotaryEmbedding takes it once.
    np.testing.assert_array_equal(cos[:, :half], cos[:, half:])
    np.testing.assert_allclose(plan.rope_cos[plan.real_slots], cos[patches, :half], rtol=0, atol=1e-7)
    np.testing.assert_allclose(plan.rope_sin[plan.real_slots], sin[patches, :half], rtol=0, atol=1e-7)


@pytest.mark.parametrize("grid", GRIDS)
def test_without_windows_patches_stay_in_the_order_of_the_image(grid: tuple[int, int]) -> None:
    _, _, cos, sin = huggingface_order(grid)
    plan = plan_vision(*grid, SHAPE.model_copy(update={"window_size": None}))
    half = SHAPE.head_dim // 2
    assert list(plan.inputs()) == ["rope_cos", "rope_sin"]
    np.testing.assert_allclose(plan.rope_cos, cos[:, :half], rtol=0, atol=1e-7)
    np.testing.assert_allclose(plan.rope_sin, sin[:, :half], rtol=0, atol=1e-7)


@pytest.mark.parametrize("grid", GRIDS)
def test_merged_tokens_return_to_reading_order(grid: tuple[int, int]) -> None:
    """Walk patch ids through every gather of the graph: each token must be its own merge block."""
    patches = np.arange(grid[0] * grid[1])
    plan = windowed(grid)
    slots = patches[plan.gather_idx]
    there_and_back = slots[plan.real_slots][plan.back_slots]
    valid = plan.window_valid.reshape(-1)
    np.testing.assert_array_equal(there_and_back[valid], slots[valid])
    merged = there_and_back.reshape(-1, BLOCK)[plan.unpad_idx]
    np.testing.assert_array_equal(merged, patches.reshape(-1, BLOCK))


@pytest.mark.parametrize("grid", GRIDS)
def test_shapes_and_dtypes(grid: tuple[int, int]) -> None:
    plan = windowed(grid)
    windows = -(-grid[0] // 8) * -(-grid[1] // 8)
    slots = windows * WINDOW_PATCHES
    expected: dict[str, tuple[tuple[int, ...], type]] = {
        "rope_cos": ((slots, 40), np.float32),
        "rope_sin": ((slots, 40), np.float32),
        "gather_idx": ((slots,), np.int64),
        "window_valid": ((windows, WINDOW_PATCHES), np.bool_),
        "real_slots": ((grid[0] * grid[1],), np.int64),
        "back_slots": ((slots,), np.int64),
        "unpad_idx": ((grid[0] * grid[1] // BLOCK,), np.int64),
    }
    assert list(plan.inputs()) == list(expected)
    for name, (shape, dtype) in expected.items():
        array = getattr(plan, name)
        assert (array.shape, array.dtype) == (shape, dtype), name


def test_windowed_attention_equals_attention_over_unpadded_windows() -> None:
    """Masked attention in padded windows, scattered back, is attention within HF's cut-off windows."""
    grid = (10, 18)
    window_index, boundaries, _, _ = huggingface_order(grid)
    plan = windowed(grid)
    features = np.random.default_rng(0).standard_normal((grid[0] * grid[1], 6))

    def attend(rows: np.ndarray, keep: np.ndarray) -> np.ndarray:
        scores = np.where(keep, rows @ rows.T, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        attended: np.ndarray = (weights / weights.sum(axis=1, keepdims=True)) @ rows
        return attended

    padded = features[plan.gather_idx].reshape(-1, WINDOW_PATCHES, 6)
    by_window = [attend(rows, keep) for rows, keep in zip(padded, plan.window_valid, strict=True)]
    ours = np.concatenate(by_window).reshape(-1, BLOCK * 6)[plan.unpad_idx]

    ordered = features[(window_index[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)]
    windows = [ordered[a:b] for a, b in pairwise(boundaries)]
    reference = np.concatenate([attend(rows, np.ones(len(rows), dtype=bool)) for rows in windows])
    reference = reference.reshape(-1, BLOCK * 6)[np.argsort(window_index)]
    np.testing.assert_allclose(ours, reference, rtol=1e-12)


@pytest.mark.parametrize("grid", [(3, 4), (4, 5), (0, 2), (2, 0)])
def test_a_grid_that_is_no_multiple_of_the_merge_block_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        plan_vision(*grid, SHAPE)
