# SPDX-License-Identifier: Apache-2.0
"""Images that were seen before.

A client sends the last few screenshots again at every step. One that comes again costs a checksum of what was
sent: neither decoding nor resizing nor the vision tower.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from PIL import Image

from starkv.manifest import Manifest
from starkv.runtime.engines.base import Engine, Floats
from starkv.runtime.preprocess.image import MAX_PIXELS, load_image
from starkv.runtime.preprocess.prepared import ImageFacts, PreparedImage, prepare

DEFAULT_BYTES = 512 * 2**20
"""About twelve 1080p screenshots of a 7B model."""
MOST_KNOWN = 16_384
"""Images of which facts are kept: some 5 MiB."""


class ImageCache:
    """Facts and embeddings of the images that were used last. A cache serves one engine.

    Images may be prepared on any thread; they are encoded on the one that steps the engine.

    Args:
        most_bytes: of embeddings that are kept; 0 keeps none.
        most_known: images of which facts are kept; 0 keeps none.
    """

    def __init__(self, most_bytes: int = DEFAULT_BYTES, most_known: int = MOST_KNOWN) -> None:
        self._most_bytes, self._most_known = most_bytes, most_known
        self._embeds: OrderedDict[bytes, Floats] = OrderedDict()
        self._known: OrderedDict[bytes, ImageFacts] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        """Times that the tower was spared."""

    @property
    def nbytes(self) -> int:
        """Of the embeddings."""
        return sum(embeds.nbytes for embeds in self._embeds.values())

    def prepare(
        self,
        source: bytes | Image.Image,
        manifest: Manifest,
        most_pixels: int = MAX_PIXELS,
        on_pixels: Callable[[int], None] = lambda pixels: None,
    ) -> PreparedImage:
        """Prepare an image for one request.

        Args:
            source: the bytes of a file, or an image.
            manifest: of the engine.
            most_pixels: a larger image is refused.
            on_pixels: told the number of pixels before they are decoded, which happens only where the image
                was not seen before; it may refuse by raising.

        Raises:
            ImageError: the image can't be taken.
        """
        started = time.perf_counter()
        prepared = self._prepare(source, manifest, most_pixels, on_pixels)
        prepared.milliseconds = (time.perf_counter() - started) * 1e3
        return prepared

    def _prepare(
        self,
        source: bytes | Image.Image,
        manifest: Manifest,
        most_pixels: int,
        on_pixels: Callable[[int], None],
    ) -> PreparedImage:
        if isinstance(source, Image.Image):
            source = load_image(source, most_pixels)
        content = _content_key(source)
        with self._lock:
            facts = self._known.get(content)
            if facts is not None:
                self._known.move_to_end(content)
        vision, limits = manifest.vision, manifest.image
        if facts is not None:
            # Its embeddings are most likely there, too; if not, it is decoded when the tower wants it.
            return PreparedImage(facts, lambda: prepare(load_image(source), vision, limits).inputs())
        prepared = prepare(load_image(source, most_pixels, on_pixels), vision, limits)
        with self._lock:
            self._known[content] = prepared.facts
            while len(self._known) > self._most_known:
                self._known.popitem(last=False)
        return prepared

    def encode(self, engine: Engine, image: PreparedImage) -> Floats:
        """Image tokens ``[T, hidden]``, from the cache where they are; releases the image.

        Args:
            engine: encodes the image if need be.
            image: the image.
        """
        key = image.facts.key
        embeds = self._embeds.get(key)
        if embeds is not None:
            self.hits += 1
            self._embeds.move_to_end(key)
        else:
            embeds = engine.encode_image(image.inputs())
            if embeds.nbytes <= self._most_bytes:
                self._embeds[key] = embeds
                while self.nbytes > self._most_bytes:
                    self._embeds.popitem(last=False)
        image.release()
        return embeds


def _content_key(source: bytes | Image.Image) -> bytes:
    """Names what was sent: the bytes of a file, or the pixels of an upright RGB image."""
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=32, person=b"file").digest()
    digest = hashlib.blake2b(repr(source.size).encode(), digest_size=32, person=b"pixels")
    digest.update(source.tobytes())
    return digest.digest()
