# SPDX-License-Identifier: Apache-2.0
"""Positions of a cache's rows on a device, sent ahead of the rows.

Attention to codes reads the position of every row, that of the new row included. A reply's positions follow
each other, so those of rows to come are sent with those that are there: a decode step has nothing to send.
"""

import numpy as np
from numpy.typing import NDArray

from starkv.kv_packing.positions import COMPONENTS
from starkv.runtime.engines.device_tensor import DeviceMemory, DeviceTensor
from starkv.runtime.kv.buffers import KvStore


class RowPositions:
    """Positions ``[L, N, C, 3]`` int32 on a device."""

    def __init__(self, memory: DeviceMemory, layers: int, slots: int, rows: int) -> None:
        shape = (layers, slots, rows, COMPONENTS)
        self.tensor: DeviceTensor = memory.empty(shape, np.int32)
        self._sent = np.full(shape, -1, np.int32)
        self.tensor.write(self._sent)

    def send(self, slot: int, positions: NDArray[np.int32], rows: NDArray[np.int32]) -> None:
        """Send a slot's positions, and those that would follow.

        Args:
            slot: whose rows they are.
            positions: ``[L, rows, 3]``.
            rows: ``[L]``: how many of each layer are known.
        """
        for layer, known in enumerate(rows):
            own = self._sent[layer, slot]
            own[:known] = positions[layer, :known]
            following = own[:known].max(initial=-1) + 1
            own[known:] = (following + np.arange(len(own) - known))[:, None]
            self.tensor.device.upload(self.tensor.at(layer, slot), own)

    def forget(self, slots: slice) -> None:
        """Say that some slots hold other rows now."""
        self._sent[:, slots] = -1

    def follow(self, kv: KvStore, batch: int) -> None:
        """See to it that the rows that the first ``batch`` slots are about to get have their positions."""
        lengths = kv.lengths[:, :batch]
        where = (np.arange(len(lengths))[:, None], np.arange(batch), lengths)
        late = (self._sent[where] != kv.positions[where]).any(axis=(0, 2))
        for slot in np.flatnonzero(late):
            self.send(int(slot), kv.positions[:, slot], lengths[:, slot] + 1)
