# SPDX-License-Identifier: Apache-2.0
"""No screenshot makes an input of the vision graph larger than the engine is built for."""

import random
from collections.abc import Iterator

import pytest

from starkv.errors import ImageError
from starkv.export.build.trt_vision_bounds import VisionSizes, least_sizes, most_sizes, usual_sizes
from starkv.manifest import ImageLimits, VisionShape
from starkv.runtime.preprocess.image import smart_resize
from starkv.runtime.preprocess.vision_plan import WindowPlan, plan_vision

FACTOR = 28


def tower(window_size: int | None) -> VisionShape:
    return VisionShape(
        depth=1,
        hidden=32,
        intermediate=64,
        heads=2,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=window_size,
        full_attention_blocks=[],
        rope_theta=10000.0,
    )


def limits(least: int, most: int) -> ImageLimits:
    return ImageLimits(min_pixels=least, max_pixels=most, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def some_images() -> Iterator[tuple[int, int]]:
    """Sizes of images: every small one of a few forms, the longest allowed, and random ones."""
    chance = random.Random(0)
    for short in (1, 7, 13, 14, 15, 27, 28, 41, 42, 43, 70, 100):
        for ratio in (1, 2, 7, 50, 199, 200):
            yield short, short * ratio
    for _ in range(3000):
        short = int(2 ** chance.uniform(0, 12))
        yield short, min(int(short * 2 ** chance.uniform(0, 7.6)), short * 200)


@pytest.mark.parametrize("window_size", [112, 56, None])
@pytest.mark.parametrize(("least", "most"), [(50176, 50176), (3136, 50176), (3136, 1_000_000)])
def test_no_image_is_larger_than_the_bounds(window_size: int | None, least: int, most: int) -> None:
    shape, image = tower(window_size), limits(least, most)
    bound = most_sizes(image, shape)
    reached = least_sizes(shape)
    for short, long in some_images():
        for height, width in ((short, long), (long, short)):
            resized = smart_resize(height, width, FACTOR, least, most)
            sizes = VisionSizes.of_grid(resized[0] // FACTOR, resized[1] // FACTOR, shape)
            reached = reached.largest_of(sizes)
    assert reached.largest_of(bound) == bound
    # Not far too large, either: memory is reserved for it.
    assert bound.patches <= 1.35 * reached.patches
    assert bound.slots <= 1.35 * reached.slots


@pytest.mark.parametrize("window_size", [112, 56, None])
def test_sizes_of_a_grid_are_those_of_the_plan(window_size: int | None) -> None:
    shape = tower(window_size)
    for rows in (1, 2, 3, 4, 5, 8, 9, 39):
        for columns in (1, 2, 4, 7, 8, 69):
            plan = plan_vision(2 * rows, 2 * columns, shape)
            sizes = VisionSizes.of_grid(rows, columns, shape)
            assert sizes.slots == len(plan.rope_cos)
            assert sizes.patches == 4 * rows * columns
            if isinstance(plan, WindowPlan):
                assert sizes.windows == len(plan.window_valid)
                assert sizes.patches == len(plan.real_slots)
                assert sizes.tokens == len(plan.unpad_idx)


def test_bounds_of_a_real_model_are_those_of_its_pixels() -> None:
    bound = most_sizes(limits(3136, 12_845_056), tower(112))
    assert bound.patches == 65_536
    assert bound.tokens == 16_384
    assert bound.windows * 64 == bound.slots


@pytest.mark.parametrize("most", [3136, 50176, 12_845_056])
def test_usual_image_lies_between(most: int) -> None:
    image, shape = limits(3136, most), tower(112)
    least, usual, bound = least_sizes(shape), usual_sizes(image, shape), most_sizes(image, shape)
    assert usual.largest_of(least) == usual
    assert usual.largest_of(bound) == bound


def test_longer_images_are_refused_and_need_no_bounds() -> None:
    with pytest.raises(ImageError):
        smart_resize(10, 2010, FACTOR, 3136, 50176)
