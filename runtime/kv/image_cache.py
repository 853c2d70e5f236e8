# SPDX-License-Identifier: Apache-2.0
"""Encoded images, so that a screenshot that is shown again is encoded once."""

import hashlib
from collections import OrderedDict

from starkv.runtime.engines.base import Engine, Floats
from starkv.runtime.preprocess.image import ImageInputs

DEFAULT_BYTES = 512 * 2**20
"""About twelve 1080p screenshots of a 7B model."""


def image_key(image: ImageInputs) -> bytes:
    """Names an image by its pixels as the model sees them."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((image.grid_h, image.grid_w)).encode())
    digest.update(image.pixel_values.tobytes())
    return digest.digest()


class ImageCache:
    """Embeddings of the images that were used last.

    Args:
        most_bytes: of embeddings that are kept; 0 keeps none.
    """

    def __init__(self, most_bytes: int = DEFAULT_BYTES) -> None:
        self._most_bytes = most_bytes
        self._embeds: OrderedDict[bytes, Floats] = OrderedDict()
        self.hits = 0

    @property
    def nbytes(self) -> int:
        return sum(embeds.nbytes for embeds in self._embeds.values())

    def encode(self, engine: Engine, image: ImageInputs, key: bytes) -> Floats:
        """Image tokens ``[T, hidden]``, from the cache where they are.

        Args:
            engine: encodes the image if need be. A cache serves one engine.
            image: the image.
            key: :func:`image_key` of it.
        """
        if key in self._embeds:
            self.hits += 1
            self._embeds.move_to_end(key)
            return self._embeds[key]
        embeds = engine.encode_image(image)
        if embeds.nbytes <= self._most_bytes:
            self._embeds[key] = embeds
            while self.nbytes > self._most_bytes:
                self._embeds.popitem(last=False)
        return embeds
