# SPDX-License-Identifier: Apache-2.0
"""Images on their way to the vision tower: what planning needs of them, and patches for the tower alone.

Patches take eight times the memory of the pixels that they are made of, and an image that the model has seen
before needs none. So a request that waits holds pixels at most.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from PIL import Image

from starkv.manifest import ImageLimits, VisionShape
from starkv.runtime.preprocess.image import ImageInputs, image_inputs, load_image, resized_pixels


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image once it was seen."""

    key: bytes
    """Names the image by its pixels as the model sees them."""
    merged_grid: tuple[int, int]
    """Rows and columns of image tokens."""
    resized_height: int
    resized_width: int
    """Pixels of the image that the model sees."""
    original_height: int
    original_width: int
    """Pixels of the upright image that came in."""


class PreparedImage:
    """One image of one request.

    Args:
        facts: of the image.
        make: makes what the vision graph takes.
    """

    def __init__(self, facts: ImageFacts, make: Callable[[], ImageInputs]) -> None:
        self.facts = facts
        self.milliseconds = 0.0
        """That preparing it took, told by whoever did it."""
        self._make: Callable[[], ImageInputs] | None = make

    def inputs(self) -> ImageInputs:
        """What the vision graph takes, made now.

        Raises:
            ValueError: the image was released.
        """
        if self._make is None:
            raise ValueError("this image was released: a prepared image serves one request")
        return self._make()

    def release(self) -> None:
        """Let go of the pixels: the image is encoded, or is in the cache already."""
        self._make = None


def prepare(image: Image.Image, vision: VisionShape, limits: ImageLimits) -> PreparedImage:
    """Resize an image and name it.

    Args:
        image: any Pillow image; goes through ``load_image`` first.
        vision: patch and merge sizes of the tower.
        limits: of its pixels.

    Raises:
        ImageError: the image's size is out of bounds.
    """
    image = load_image(image)
    pixels = resized_pixels(image, vision, limits)
    height, width = pixels.shape[:2]
    side = vision.patch_size * vision.spatial_merge_size
    digest = hashlib.blake2b(repr((height, width)).encode(), digest_size=16)
    digest.update(pixels.tobytes())
    facts = ImageFacts(
        digest.digest(), (height // side, width // side), height, width, image.height, image.width
    )
    return PreparedImage(facts, partial(image_inputs, pixels, (image.height, image.width), vision, limits))
