# SPDX-License-Identifier: Apache-2.0
"""Between which sizes the inputs of the vision graph lie, whatever the screenshot.

An image is scaled so that its sides are multiples of a merge block and its area lies within the limits; so
the grids of blocks that can come out are few, and the largest of each size is found by going through them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from starkv.manifest import ImageLimits, VisionShape

MOST_ASPECT_RATIO = 200
"""Images with a longer side are refused."""
_USUAL_SCREEN = 1920, 1080
"""Width and height of the image that kernels are chosen for."""


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the vision graph's inputs for one image, or the largest of each for all of them."""

    patches: int
    slots: int
    """Patches and padding of windows."""
    windows: int
    tokens: int

    @classmethod
    def of_grid(cls, rows: int, columns: int, shape: VisionShape) -> "VisionSizes":
        """Of an image of so many merge blocks."""
        tokens, block = rows * columns, shape.spatial_merge_size**2
        if shape.window_size is None:
            return cls(tokens * block, tokens * block, 0, tokens)
        side = _window_side(shape.window_size, shape)
        windows = -(-rows // side) * -(-columns // side)
        return cls(tokens * block, windows * side**2 * block, windows, tokens)

    def largest_of(self, other: "VisionSizes") -> "VisionSizes":
        return VisionSizes(
            max(self.patches, other.patches),
            max(self.slots, other.slots),
            max(self.windows, other.windows),
            max(self.tokens, other.tokens),
        )


def least_sizes(shape: VisionShape) -> VisionSizes:
    """Of the smallest image: one merge block."""
    return VisionSizes.of_grid(1, 1, shape)


def usual_sizes(limits: ImageLimits, shape: VisionShape) -> VisionSizes:
    """Of a full screen, or of the largest image of its form where that is smaller."""
    width, height = _USUAL_SCREEN
    pixels = _block_pixels(shape)
    scale = math.sqrt(min(1.0, limits.max_pixels / (width * height)))
    rows, columns = (max(1, int(side * scale / math.sqrt(pixels))) for side in (height, width))
    return VisionSizes.of_grid(rows, columns, shape)


def most_sizes(limits: ImageLimits, shape: VisionShape) -> VisionSizes:
    """The largest of each size over all images; no single image need have them all."""
    most = least_sizes(shape)
    for rows, columns in _longest_grids(limits, _block_pixels(shape)):
        most = most.largest_of(VisionSizes.of_grid(rows, columns, shape))
    return most


def _longest_grids(limits: ImageLimits, pixels: int) -> Iterator[tuple[int, int]]:
    """For each number of rows of blocks the most columns; the other way round is as large.

    Follows ``smart_resize``. An image within the limits keeps its size, a larger one is scaled down to at
    most the limit, unless that leaves less than one row. A smaller one is scaled up, its sides rounded up.
    """
    most, least = limits.max_pixels // pixels, limits.min_pixels / pixels
    one_row = int(math.sqrt(MOST_ASPECT_RATIO * limits.max_pixels / pixels))
    grown = math.ceil(math.sqrt(MOST_ASPECT_RATIO * least))
    rows = 1
    while True:
        scaled = max(one_row, most) if rows == 1 else most // rows
        up = grown if rows == 1 else min(grown, math.ceil(least / (rows - 1)))
        # What rounding of the sides adds to the aspect ratio.
        columns = min(max(scaled, up), MOST_ASPECT_RATIO * (rows + 1) + 1)
        if columns < rows:
            return
        yield rows, columns
        rows += 1


def _block_pixels(shape: VisionShape) -> int:
    """Pixels of a merge block."""
    return (shape.patch_size * shape.spatial_merge_size) ** 2


def _window_side(window_size: int, shape: VisionShape) -> int:
    """Merge blocks along a side of a window."""
    return window_size // shape.spatial_merge_size // shape.patch_size
