# SPDX-License-Identifier: Apache-2.0
"""Memory for an engine's keys and values on its card: arenas, and pools of floats or of codes."""

from dataclasses import dataclass
from math import prod

from starkv.manifest import Manifest
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.device_codes import DeviceCodes
from starkv.runtime.engines.device_kv import DeviceArena, DeviceKv
from starkv.runtime.engines.device_packing import DevicePacking
from starkv.runtime.engines.device_tensor import numpy_dtype
from starkv.runtime.engines.trt_memory import room_for
from starkv.runtime.engines.trt_pools import SparePools
from starkv.runtime.kv.buffers import Pool, cache_shape

POOL_STEP = 512
"""Capacities of pools are multiples of this, so that their memory, and CUDA graphs on it, are used again."""


@dataclass(frozen=True)
class TrtKv:
    """Allocates caches, and says what would take less where the card has no room."""

    manifest: Manifest
    memory: CudaMemory
    spare: SparePools
    packing: DevicePacking | None
    """The engine's; None where it packs no rows."""

    def new_arena(self, rows: int) -> DeviceArena:
        """Memory to prefill up to so many rows in.

        Raises:
            EngineError: the card has no room.
        """
        with room_for(
            "the prompt's KV rows", self._bytes(1, rows), "use a shorter prompt, or fewer or smaller images"
        ):
            kv = self._floats(1, rows)
        kv.unpack = self.packing.unpack if self.packing else None
        return DeviceArena.around(kv, self.manifest.text)

    def new_pool(self, slots: int, rows: int, packed: bool) -> Pool:
        """Memory to decode in, used again where such a pool was before.

        Args:
            slots: sequences at once.
            rows: of each; rounded up.
            packed: rows become codes.

        Raises:
            EngineError: the card has no room.
        """
        codes = self.packing if packed else None
        kv = self.spare.take(DeviceCodes if codes else DeviceKv, slots, rows)
        if kv is None:
            size = slots * rows * codes.codec.bytes_per_row if codes else self._bytes(slots, rows)
            remedy = "keep fewer rows (--kv-budget, --kv-capacity), or allow fewer new tokens or sessions"
            with room_for("the sessions' KV rows", size, remedy):
                kv = codes.new_codes(slots, rows) if codes else self._floats(slots, rows)
        return self.spare.lend(kv)

    def _floats(self, slots: int, rows: int) -> DeviceKv:
        dtype = numpy_dtype(self.manifest.compute_dtype)
        return DeviceKv.allocate(self.memory, self.manifest.text, slots, rows, dtype)

    def _bytes(self, slots: int, rows: int) -> int:
        size = numpy_dtype(self.manifest.compute_dtype).itemsize
        return 2 * prod(cache_shape(self.manifest.text, slots, rows)) * size
