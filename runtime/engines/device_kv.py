# SPDX-License-Identifier: Apache-2.0
"""KV memory on a device: caches whose rows lie there and whose lengths lie on the host."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.manifest import TextShape
from starkv.runtime.engines.device_tensor import DeviceMemory, DeviceTensor
from starkv.runtime.kv.buffers import Arena, KvBuffers, KvStore, cache_shape, empty_rows
from starkv.runtime.kv.parked import ParkedRows


@dataclass
class DeviceKv(KvStore):
    """A cache on a device."""

    keys: DeviceTensor
    """``[L, N, Hkv, C, D]``."""
    values: DeviceTensor
    """``[L, N, Hkv, C, D]``."""
    steps: dict[int, Any] = field(default_factory=dict)
    """Batch size → decode step that is bound to this memory."""
    unpack: Callable[["DeviceKv", ParkedRows], None] | None = None
    """Fills slot 0 with rows that were parked packed; None where the engine packs none."""

    @classmethod
    def allocate(
        cls, memory: DeviceMemory, text: TextShape, slots: int, rows: int, dtype: np.dtype[Any]
    ) -> "DeviceKv":
        """Zeroed buffers, see :func:`cache_shape`: what a kernel reads behind the rows must be numbers."""
        shape = cache_shape(text, slots, rows)
        keys, values = (memory.empty(shape, dtype) for _ in range(2))
        for tensor in (keys, values):
            memory.device.clear(tensor.address, tensor.nbytes)
        return cls(*empty_rows(shape), keys, values)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.keys.shape

    @property
    def tensors(self) -> tuple[DeviceTensor, ...]:
        """The memory that the cache lies in."""
        return self.keys, self.values

    def load(self, slot: int, parked: ParkedRows) -> None:
        if self.unpack is None or not parked.packed:
            super().load(slot, parked)
            return
        self.unpack(self, parked)

    @property
    def itemsize(self) -> int:
        return self.keys.dtype.itemsize

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        copy_rows(self, source, self, target, rows)

    def write_rows(self, slot: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Write the first rows of a slot from host memory: ``[L, Hkv, rows, D]`` each."""
        for layer, rows in enumerate(zip(keys, values, strict=True)):
            self._write(layer, slot, *rows)

    def _write(self, layer: int, slot: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        for tensor, rows in ((self.keys, keys), (self.values, values)):
            for head, part in enumerate(rows.astype(tensor.dtype, copy=False)):
                if part.size:
                    tensor.device.upload(tensor.at(layer, slot, head), part)

    def _read(self, layer: int, slot: int, rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
        _, _, heads, _, dim = self.shape
        copies = []
        for tensor in (self.keys, self.values):
            copy = np.empty((heads, rows, dim), tensor.dtype)
            for head in range(heads if rows else 0):
                tensor.device.download(copy[head], tensor.at(layer, slot, head))
            copies.append(copy)
        return copies[0], copies[1]

    def forget(self) -> None:
        """Make the memory as good as new for another user."""
        self.lengths[:] = 0
        self.row_meta[:] = self.positions[:] = -1


def copy_rows(source: DeviceKv, source_slot: int, target: DeviceKv, target_slot: int, rows: int) -> None:
    """Copy the first rows of a slot to a slot of another cache of the same heads, in all layers."""
    layers, _, heads, _, dim = source.shape
    row = dim * source.itemsize
    if not rows:
        return
    for old, new in ((source.keys, target.keys), (source.values, target.values)):
        for layer in range(layers):
            old.device.copy(
                new.at(layer, target_slot),
                target.capacity * row,
                old.at(layer, source_slot),
                source.capacity * row,
                rows * row,
                heads,
            )


@dataclass
class DeviceArena(Arena):
    """An arena whose keys, values and last queries lie on a device; ``q_window`` stays empty."""

    queries: DeviceTensor | None = None
    """``[L, 1, Hq, w, D]``: the last ``w`` queries after rotation, once something is prefilled."""

    @classmethod
    def around(cls, kv: DeviceKv, text: TextShape) -> "DeviceArena":
        """An arena without a sequence."""
        no_queries = np.zeros((text.layers, 1, text.heads, 0, text.head_dim), np.float32)
        return cls(kv, no_queries, np.zeros((text.layers, 1, kv.capacity), np.float32))

    @property
    def device_kv(self) -> DeviceKv:
        return device_kv(self.kv)

    @property
    def last_queries(self) -> DeviceTensor:
        """``queries`` of a prefilled arena.

        Raises:
            UsageError: nothing was prefilled.
        """
        if self.queries is None:
            raise UsageError("the arena holds no prompt; prefill it first")
        return self.queries

    def on_host(self, text: TextShape) -> Arena:
        """A copy in host memory, in float32."""
        kv, own = KvBuffers.allocate(text, 1, self.kv.capacity), self.device_kv
        kv.keys[:], kv.values[:] = own.keys.read(), own.values.read()
        kv.lengths[:], kv.row_meta[:] = own.lengths, own.row_meta
        kv.positions[:] = own.positions
        return Arena(kv, self.last_queries.read().astype(np.float32), self.hidden_norm)


def device_arena(arena: Arena) -> DeviceArena:
    """The arena, which must be one on a device.

    Raises:
        UsageError: it is another engine's.
    """
    if not isinstance(arena, DeviceArena):
        raise UsageError("this arena is another engine's; make it with this engine's new_arena")
    return arena


def device_kv(store: KvStore) -> DeviceKv:
    """The store, which must be one on a device.

    Raises:
        UsageError: it is another engine's.
    """
    if not isinstance(store, DeviceKv):
        raise UsageError(
            "this KV cache is another engine's; make it with this engine's new_arena or new_pool"
        )
    return store
