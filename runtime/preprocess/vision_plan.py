# SPDX-License-Identifier: Apache-2.0
"""Inputs that let one vision graph serve every image size.

A tower whose blocks all see the whole image needs rotary tables only. That of Qwen2.5-VL attends within
square windows, cut off at the right and lower edge of the image. The graph pads each window to its full size
instead, so a window layer is a plain reshape plus a mask. Which patch sits in which slot depends on the patch
grid alone and is worked out here.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.manifest import VisionShape
from starkv.runtime.preprocess.rope import inverse_frequencies


@dataclass(frozen=True)
class VisionPlan:
    """Inputs of the vision graph that follow from the patch grid; fields are named like the inputs.

    N is the number of patches, M of slots (patches plus padding; M = N without windows), nW of windows, T of
    merged tokens. The fields are in the order of the graph's inputs after ``pixel_values``.
    """

    rope_cos: NDArray[np.float32]
    """``[M, head_dim / 2]``: cosines of the row angles, then of the column angles."""
    rope_sin: NDArray[np.float32]
    """``[M, head_dim / 2]``: sines in the same layout."""

    def inputs(self) -> dict[str, NDArray[Any]]:
        """The arrays by the names of the graph's inputs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class WindowPlan(VisionPlan):
    """Inputs of a tower with windows; rotary tables are in the order of slots."""

    gather_idx: NDArray[np.int64]
    """``[M]``: patch of each slot, window after window; padding repeats patch 0."""
    window_valid: NDArray[np.bool_]
    """``[nW, window_patches]``: which slots hold a patch."""
    real_slots: NDArray[np.int64]
    """``[N]``: the slots that hold a patch, ascending."""
    back_slots: NDArray[np.int64]
    """``[M]``: rank of each slot within ``real_slots``; padding takes rank 0."""
    unpad_idx: NDArray[np.int64]
    """``[T]``: merged slot of each merged token, in the image's reading order."""


def plan_vision(grid_h: int, grid_w: int, shape: VisionShape) -> VisionPlan:
    """Work out what the vision graph needs to know about one image.

    ``pixel_values`` holds its patches merge block after merge block.

    Args:
        grid_h: rows of patches, a multiple of ``shape.spatial_merge_size``.
        grid_w: columns of patches, likewise.
        shape: sizes of the vision tower.

    Raises:
        ValueError: the grid is empty or does not divide into merge blocks.
    """
    merge = shape.spatial_merge_size
    if min(grid_h, grid_w) < merge or grid_h % merge or grid_w % merge:
        raise ValueError(f"a grid of {grid_h}x{grid_w} patches does not divide into {merge}x{merge} blocks")
    if shape.window_size is None:
        return VisionPlan(*_rotary_tables(grid_h, grid_w, np.arange(grid_h * grid_w), shape))
    return plan_windows(grid_h, grid_w, shape.window_size, shape)


def plan_windows(grid_h: int, grid_w: int, window_size: int, shape: VisionShape) -> WindowPlan:
    """Lay the patches of one image out in padded windows of ``window_size`` pixels a side.

    A merge block is never split between windows, so the plan places blocks and expands them to patches.
    """
    merge = shape.spatial_merge_size
    block_rows, block_columns = grid_h // merge, grid_w // merge
    block_patches = merge * merge

    block_of_slot = _blocks_in_windows(block_rows, block_columns, window_size // merge // shape.patch_size)
    occupied = block_of_slot >= 0
    patch_of_slot = np.where(
        occupied[..., None], block_of_slot[..., None] * block_patches + np.arange(block_patches), 0
    )
    gather_idx = patch_of_slot.reshape(-1)
    window_valid = np.repeat(occupied, block_patches, axis=1)

    valid = window_valid.reshape(-1)
    real_slots = np.flatnonzero(valid)
    back_slots = np.where(valid, np.cumsum(valid) - 1, 0)

    merged_slots = np.flatnonzero(occupied.reshape(-1))
    unpad_idx = np.empty(block_rows * block_columns, dtype=np.int64)
    unpad_idx[block_of_slot.reshape(-1)[merged_slots]] = merged_slots

    rope_cos, rope_sin = _rotary_tables(grid_h, grid_w, gather_idx, shape)
    return WindowPlan(
        rope_cos=rope_cos,
        rope_sin=rope_sin,
        gather_idx=gather_idx,
        window_valid=window_valid,
        real_slots=real_slots,
        back_slots=back_slots,
        unpad_idx=unpad_idx,
    )


def _rotary_tables(
    grid_h: int, grid_w: int, patches: NDArray[np.int64], shape: VisionShape
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of these patches' rows, then of their columns: two arrays ``[M, head_dim / 2]``."""
    frequencies = inverse_frequencies(shape.head_dim // 2, shape.rope_theta)
    angles = np.concatenate(
        [
            np.outer(axis[patches].astype(np.float32), frequencies)
            for axis in _patch_coordinates(grid_h, grid_w, shape.spatial_merge_size)
        ],
        axis=1,
    )
    return np.cos(angles), np.sin(angles)


def _blocks_in_windows(block_rows: int, block_columns: int, side: int) -> NDArray[np.int64]:
    """Merge block of each place of each window, ``[nW, places]`` int64, -1 where the image has ended.

    ``side`` counts the merge blocks along a side of a window.
    """
    window_rows, window_columns = -(-block_rows // side), -(-block_columns // side)
    blocks = np.full((window_rows * side, window_columns * side), -1, dtype=np.int64)
    reading_order = np.arange(block_rows * block_columns)
    blocks[:block_rows, :block_columns] = reading_order.reshape(block_rows, block_columns)
    windows = blocks.reshape(window_rows, side, window_columns, side).swapaxes(1, 2)
    places: NDArray[np.int64] = windows.reshape(window_rows * window_columns, side * side)
    return places


def _patch_coordinates(grid_h: int, grid_w: int, merge: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each patch in the order of ``pixel_values``: two arrays ``[N]`` int64."""
    reading_order = np.arange(grid_h * grid_w, dtype=np.int64)
    order = reading_order.reshape(grid_h // merge, merge, grid_w // merge, merge).swapaxes(1, 2).reshape(-1)
    return order // grid_w, order % grid_w
