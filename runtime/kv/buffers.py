# SPDX-License-Identifier: Apache-2.0
"""KV memory: the arena that is prefilled, and pools of slots that are decoded.

Symbols: L layers, N slots, Hkv KV heads, C capacity in rows, D head dim. Row and position of a token are
different things: positions enter the engine as rotary tables, rows are counted here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.manifest import TextShape
from starkv.methods.rows import ROW_COLUMNS
from starkv.runtime.kv.parked import ParkedRows

ROW_STEP = 64
"""Capacities are multiples of this, so that few different ones exist."""

OTHER_ROWS = "the parked KV rows are of another model or dtype, or packed otherwise; start the session anew"


def round_up_rows(rows: int) -> int:
    """Smallest capacity that holds ``rows``."""
    return max(1, -(-rows // ROW_STEP)) * ROW_STEP


@dataclass
class KvStore(ABC):
    """Keys and values of ``N`` sequences with the same capacity, wherever their memory lies.

    What is known of the rows lies on the host.
    """

    lengths: NDArray[np.int32]
    """``[L, N]``: valid rows; layers may differ after compaction."""
    row_meta: NDArray[np.int32]
    """``[L, N, C, 4]``: what is known of each row, see ``starkv.methods.rows``; −1 where nothing is."""
    positions: NDArray[np.int32]
    """``[L, N, C, 3]``: t, h and w of each row, −1 where they are unknown."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``[L, N, Hkv, C, D]`` of the keys and of the values."""

    @property
    @abstractmethod
    def itemsize(self) -> int:
        """Bytes of one number."""

    @abstractmethod
    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copy the first ``rows`` keys and values of slot ``source`` to slot ``target``, in all layers."""

    @abstractmethod
    def _read(self, layer: int, slot: int, rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Copies of a layer's first keys and values of a slot, ``[Hkv, rows, D]`` each."""

    @abstractmethod
    def _write(self, layer: int, slot: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Write a layer's first keys and values of a slot."""

    def clear(self, slot: int) -> None:
        """Forget a slot's rows."""
        self.lengths[:, slot] = 0

    def park(self, slot: int) -> ParkedRows:
        """Copy a slot's rows to host memory."""
        pairs = [self._read(layer, slot, int(rows)) for layer, rows in enumerate(self.lengths[:, slot])]
        known = [
            tuple(array[layer, slot, :rows].copy() for layer, rows in enumerate(self.lengths[:, slot]))
            for array in (self.row_meta, self.positions)
        ]
        return ParkedRows(tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs), *known)

    def park_some(self, slot: int, rows: Sequence[NDArray[np.integer]]) -> ParkedRows:
        """Copy some of a slot's rows to host memory; ``rows`` has L times their numbers, ascending."""
        pairs = []
        for layer, some in enumerate(rows):
            keys, values = self._read(layer, slot, int(some.max(initial=-1)) + 1)
            pairs.append((keys[:, some], values[:, some]))
        meta, positions = (
            tuple(array[layer, slot, some] for layer, some in enumerate(rows))
            for array in (self.row_meta, self.positions)
        )
        return ParkedRows(
            tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs), meta, positions
        )

    def load(self, slot: int, parked: ParkedRows) -> None:
        """Put parked rows into a slot, in place of what it holds.

        Raises:
            UsageError: they don't fit, or are another model's or dtype's.
        """
        lengths = parked.lengths
        if not self._is_of_this_cache(parked):
            raise UsageError(OTHER_ROWS)
        if lengths.max() > self.capacity:
            raise UsageError(f"{lengths.max()} parked KV rows do not fit {self.capacity} rows")
        for layer, (keys, values, meta, positions) in enumerate(
            zip(parked.keys, parked.values, parked.row_meta, parked.positions, strict=True)
        ):
            self._write(layer, slot, keys, values)
            self.row_meta[layer, slot, : len(meta)] = meta
            self.positions[layer, slot, : len(meta)] = positions
        self.lengths[:, slot] = lengths

    def _is_of_this_cache(self, parked: ParkedRows) -> bool:
        """Whether parked rows have this cache's layers, heads and dtype."""
        layers, _, heads, _, dim = self.shape
        shapes = {(keys.shape[0], keys.shape[2]) for keys in parked.keys}
        widths = {keys.dtype.itemsize for keys in parked.keys}
        return len(parked.keys) == layers and shapes == {(heads, dim)} and widths == {self.itemsize}

    def take_positions(self, slot: int, source: "KvStore", rows: NDArray[np.int64]) -> None:
        """Note where the rows of a slot are, which were those rows of ``source``'s slot 0.

        Args:
            slot: that holds them now.
            source: may be this cache itself.
            rows: ``[L, N, K]``, −1 behind a layer's last. Where each head kept rows of its own (N > 1), a row
                has no one position: they are unknown then.
        """
        for layer, kept in enumerate(rows):
            count = kept.shape[1]
            # What stands behind a layer's last row is never read, and may be anything.
            known = source.positions[layer, 0].take(kept[0], axis=0, mode="clip") if len(kept) == 1 else -1
            self.positions[layer, slot, :count] = known

    @property
    def slots(self) -> int:
        return self.shape[1]

    @property
    def capacity(self) -> int:
        return self.shape[3]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer: its key and its value for all KV heads."""
        return 2 * self.shape[2] * self.shape[4] * self.itemsize

    def count_rows(self, rows: int) -> None:
        """Say that every slot holds so many rows, whatever is in them: to measure with."""
        self.lengths[:] = rows

    def bytes_of(self, slots: slice) -> int:
        """Bytes of the valid rows of some slots."""
        return int(self.lengths[:, slots].sum()) * self.row_bytes

    @property
    def bytes_held(self) -> int:
        """Bytes of the valid rows."""
        return self.bytes_of(slice(None))

    @property
    def bytes_reserved(self) -> int:
        """Bytes that are allocated."""
        return 2 * math.prod(self.shape) * self.itemsize


def cache_shape(text: TextShape, slots: int, rows: int, heads: int | None = None) -> tuple[int, ...]:
    """``[L, N, Hkv, C, D]`` for ``slots`` sequences of up to ``rows`` rows (rounded up to ``ROW_STEP``).

    Args:
        text: sizes of the decoder.
        slots: N.
        rows: least capacity.
        heads: heads that rows are stored for; the KV heads by default.
    """
    return (text.layers, slots, heads or text.kv_heads, round_up_rows(rows), text.head_dim)


def empty_rows(
    shape: tuple[int, ...],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """``lengths``, ``row_meta`` and ``positions`` of a cache of that shape without any row."""
    layers, slots, _, capacity, _ = shape
    return (
        np.zeros((layers, slots), np.int32),
        np.full((layers, slots, capacity, ROW_COLUMNS), -1, np.int32),
        np.full((layers, slots, capacity, 3), -1, np.int32),
    )


@dataclass
class HostKv(KvStore):
    """A cache in host memory."""

    keys: NDArray[Any]
    """``[L, N, Hkv, C, D]``."""
    values: NDArray[Any]
    """``[L, N, Hkv, C, D]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.keys.shape

    @property
    def itemsize(self) -> int:
        return self.keys.itemsize

    def _read(self, layer: int, slot: int, rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.keys[layer, slot, :, :rows].copy(), self.values[layer, slot, :, :rows].copy()

    def _write(self, layer: int, slot: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        rows = keys.shape[1]
        self.keys[layer, slot, :, :rows], self.values[layer, slot, :, :rows] = keys, values

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[:, target, :, :rows] = buffer[:, source, :, :rows]


@dataclass
class KvBuffers(HostKv):
    """A cache in host memory, of float32 as the decoder computes; layer i is the contiguous ``past_k.i``."""

    unpack: Callable[[ParkedRows], ParkedRows] | None = None
    """How rows that were parked packed become float ones; None where the engine packs none."""

    @classmethod
    def allocate(cls, text: TextShape, slots: int, rows: int, heads: int | None = None) -> "KvBuffers":
        """Zeroed buffers, see :func:`cache_shape`."""
        shape = cache_shape(text, slots, rows, heads)
        return cls(*empty_rows(shape), np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def load(self, slot: int, parked: ParkedRows) -> None:
        super().load(slot, self.unpack(parked) if self.unpack and parked.packed else parked)


def host_buffers(store: KvStore) -> KvBuffers:
    """The store, which must be one in host memory.

    Raises:
        UsageError: it is another engine's.
    """
    if not isinstance(store, KvBuffers):
        raise UsageError(
            "this KV cache is another engine's; make it with this engine's new_arena or new_pool"
        )
    return store


@dataclass
class Arena:
    """Holds the one sequence that is being prefilled, and what its prefill left for the scoring methods."""

    kv: KvStore
    q_window: NDArray[np.float32]
    """``[L, 1, Hq, w, D]``: the last ``w ≤ observation_window`` queries after rotation."""
    hidden_norm: NDArray[np.float32]
    """``[L, 1, C]``: L2 norm of each row's attention input."""

    @classmethod
    def allocate(cls, text: TextShape, rows: int) -> "Arena":
        kv = KvBuffers.allocate(text, 1, rows)
        q_window = np.zeros((text.layers, 1, text.heads, 0, text.head_dim), np.float32)
        return cls(kv, q_window, np.zeros((text.layers, 1, kv.capacity), np.float32))

    @property
    def host_kv(self) -> KvBuffers:
        """``kv`` in host memory, see :func:`host_buffers`."""
        return host_buffers(self.kv)

    def on_host(self, text: TextShape) -> "Arena":
        """The arena in host memory, in float32; a copy where it lies elsewhere."""
        return self

    def reset(self) -> None:
        """Forget the sequence; the memory stays."""
        self.kv.lengths[:] = 0


@dataclass
class Pool:
    """Slots of equal capacity. The sequences in use are always the first ones, so a batch is a prefix.

    A sequence is addressed by the handle that :meth:`acquire` returned; its slot may change when another
    sequence leaves.
    """

    kv: KvStore
    handles: list[int] = field(default_factory=list)
    """Handle of the sequence in each used slot."""
    _next_handle: int = 0

    @property
    def host_kv(self) -> KvBuffers:
        """``kv`` in host memory, see :func:`host_buffers`."""
        return host_buffers(self.kv)

    @property
    def active(self) -> int:
        """Sequences in use: the batch size of a decode step."""
        return len(self.handles)

    def acquire(self) -> int:
        """Take a free slot, empty.

        Raises:
            UsageError: all slots are taken.
        """
        if self.active == self.kv.slots:
            raise UsageError(f"all {self.kv.slots} slots of the KV pool are in use")
        self.kv.clear(self.active)
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self.handles.append(handle)
        return handle

    def slot_of(self, handle: int) -> int:
        """Current slot of a sequence.

        Raises:
            UsageError: the sequence is not in the pool.
        """
        if handle not in self.handles:
            raise UsageError(f"sequence {handle} is not in the KV pool; it has been released")
        return self.handles.index(handle)

    def release(self, handle: int) -> None:
        """Give a slot back; the last sequence moves into the gap."""
        slot, last = self.slot_of(handle), self.active - 1
        if slot != last:
            longest = int(self.kv.lengths[:, last].max())
            self.kv.copy_rows(last, slot, longest)
            for known in (self.kv.row_meta, self.kv.positions):
                known[:, slot, :longest] = known[:, last, :longest]
            self.kv.lengths[:, slot] = self.kv.lengths[:, last]
            self.handles[slot] = self.handles[last]
        self.handles.pop()
