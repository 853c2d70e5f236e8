# SPDX-License-Identifier: Apache-2.0
"""Several small arrays on their way to the card in one copy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.trt_compat.running import ALIGNMENT


class UploadBlock:
    """Arrays of a step side by side: filled on the host, on the card after one copy."""

    def __init__(self, memory: CudaMemory, parts: dict[str, tuple[tuple[int, ...], Any]]) -> None:
        """Lay out the parts.

        Args:
            memory: of the card.
            parts: name → shape and dtype.
        """
        offsets, end = {}, 0
        for name, (shape, dtype) in parts.items():
            offsets[name] = end
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self._memory, self._block = memory, memory.block(end)
        self._host: NDArray[np.uint8] = memory.cuda.allocate_pinned((end,), np.uint8)
        self.host: dict[str, NDArray[Any]] = {}
        """Where to write what is uploaded next."""
        for name, (shape, dtype) in parts.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            part = self._host[offsets[name] : offsets[name] + size]
            self.host[name] = part.view(dtype).reshape(shape)
        self._offsets = offsets

    def address(self, name: str) -> int:
        """Of a part on the card."""
        return self._block.address + self._offsets[name]

    def upload(self) -> None:
        """Enqueue the copy."""
        self._memory.cuda.upload(self._block.address, self._host, self._memory.stream)
