# SPDX-License-Identifier: Apache-2.0
"""An engine that does not repeat itself: asked the last prompt again, it has its images and rows already."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from starkv.runtime.engines.base import Engine, Floats, Rope
from starkv.runtime.kv.buffers import Arena
from starkv.runtime.preprocess.image import ImageInputs


@dataclass
class SharedPrefill:
    """Another engine, for sessions that ask one prompt under several policies, one after the other.

    A compression leaves the arena as it was, so each policy finds the same rows. Only the last prompt is
    kept: its arena of full keys and values, and its encoded images.
    """

    engine: Engine
    _arena: Arena | None = None
    _rows: int = 0
    """Rows that were asked of the arena."""
    _prompt: Floats | None = None
    """``[S, hidden]`` that the arena holds; None before its prefill."""
    _logits: Floats | None = None
    _images: list[tuple[NDArray[np.float32], Floats]] = field(default_factory=list)
    """Pixel values and image tokens."""

    def __getattr__(self, name: str) -> object:
        """Everything else is the engine's."""
        return getattr(self.engine, name)

    def encode_image(self, image: ImageInputs) -> Floats:
        for pixels, encoded in self._images:
            if np.array_equal(pixels, image.pixel_values):
                return encoded
        # Engines may write the next image's tokens into the same memory.
        tokens: Floats = self.engine.encode_image(image).copy()
        self._images.append((image.pixel_values, tokens))
        return tokens

    def new_arena(self, rows: int) -> Arena:
        if self._arena is None or rows != self._rows:
            # The old one goes back first: two full prompts may not fit.
            self._arena = self._prompt = self._logits = None
            self._arena, self._rows = self.engine.new_arena(rows), rows
        return self._arena

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        same = self._prompt is not None and np.array_equal(self._prompt, embeds)
        if arena is self._arena and same and self._logits is not None:
            return self._logits
        arena.reset()
        logits: Floats = self.engine.prefill(arena, embeds, rope).copy()
        if arena is self._arena:
            self._prompt, self._logits = embeds.copy(), logits
        return logits

    def forget_images(self) -> None:
        """Drop the encoded images: another prompt comes now."""
        self._images.clear()
