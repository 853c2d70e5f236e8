# SPDX-License-Identifier: Apache-2.0
"""What a decoder with packing takes beyond the others: which cache it is to read, and that cache.

Every run must bind every input. Those of the attention that is not wanted are bound to a row of zeros.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.kv_packing.positions import COMPONENTS
from starkv.runtime.engines.ort_binding import (
    CacheBinding,
    FloatCache,
    bind_array,
    bind_cache,
    bind_in_place,
)
from starkv.runtime.kv.buffers import KvStore
from starkv.runtime.kv.low_rank import LowRankCodec, LowRankKv
from starkv.runtime.kv.packed import KvCodec
from starkv.runtime.kv.quantized import QuantizedCodec, QuantizedKv

Array = NDArray[Any]

_TABLE_STEP = 256
"""Positions that tables grow by."""
_BOUND_STEP = 64
"""Positions by which more of the tables is bound. A step with quantized rows works on all that is bound."""


class PackedCache(CacheBinding):
    """Binds packed rows, and as much of the tables over positions as they need."""

    def __init__(self, codec: KvCodec) -> None:
        self._codec, self._text = codec, codec.text
        self._no_rows = np.zeros((1, codec.text.kv_heads, 1, codec.text.head_dim), np.float32)
        self._yes, self._no = np.array([True]), np.array([False])
        self._positions = 0
        self._bound = 1

    def bind(self, binding: Any, kv: KvStore, batch: int) -> None:
        bind_array(binding.bind_input, "packed", self._yes)
        needed = int(kv.positions[:, :batch].max(initial=0)) + 1
        if needed > self._positions:
            self._positions = -(-needed // _TABLE_STEP) * _TABLE_STEP
            angles = np.arange(self._positions)[:, None] * self._codec.rotary.inverse_frequencies
            self._make_tables(angles)
        self._bound = -(-needed // _BOUND_STEP) * _BOUND_STEP
        self._bind_rows(binding, kv, batch)

    def covers(self, kv: KvStore, batch: int) -> bool:
        return int(kv.positions[:, :batch].max(initial=0)) < self._bound

    def bind_nothing(self, binding: Any) -> None:
        """Choose the exact attention."""
        bind_array(binding.bind_input, "packed", self._no)
        self._bind_no_packed_rows(binding)

    @abstractmethod
    def _make_tables(self, angles: NDArray[np.float64]) -> None:
        """From the angles ``[P, D / 2]`` of every position and rotary pair."""

    @abstractmethod
    def _bind_rows(self, binding: Any, kv: KvStore, batch: int) -> None: ...

    @abstractmethod
    def _bind_no_packed_rows(self, binding: Any) -> None: ...

    def _bind_no_float_rows(self, binding: Any) -> None:
        for layer in range(self._text.layers):
            for kind in "kv":
                bind_in_place(binding, kind, layer, self._no_rows)


class FloatBesidePacked(FloatCache):
    """A float cache, in a decoder that could read packed ones, too."""

    def __init__(self, packed: PackedCache) -> None:
        self._packed = packed

    def bind(self, binding: Any, kv: KvStore, batch: int) -> None:
        super().bind(binding, kv, batch)
        self._packed.bind_nothing(binding)


class QuantizedCache(PackedCache):
    """Int8 and int4 caches."""

    def __init__(self, codec: QuantizedCodec) -> None:
        super().__init__(codec)
        self._make_tables(np.zeros((1, codec.text.head_dim // 2)))
        self._no_positions = np.zeros((1, 1, COMPONENTS), np.int32)
        self._no_codes = codec.new_store(1, 1)

    def _make_tables(self, angles: NDArray[np.float64]) -> None:
        self._tables = key_bias_tables(angles, self._codec.rotary.sections)

    def _bind_tables(self, binding: Any) -> None:
        for component, table in enumerate(self._tables):
            bind_array(binding.bind_input, f"rope_table.{component}", table[: self._bound])

    def _bind_rows(self, binding: Any, kv: KvStore, batch: int) -> None:
        assert isinstance(kv, QuantizedKv)
        self._bind_tables(binding)
        for layer in range(self._text.layers):
            bind_array(binding.bind_input, f"row_positions.{layer}", kv.positions[layer, :batch])
        bind_cache(binding, kv, batch, "_codes")
        self._bind_no_float_rows(binding)

    def _bind_no_packed_rows(self, binding: Any) -> None:
        self._bind_tables(binding)
        for layer in range(self._text.layers):
            bind_array(binding.bind_input, f"row_positions.{layer}", self._no_positions)
        bind_cache(binding, self._no_codes, 1, "_codes")


class LowRankCache(PackedCache):
    """Latents, with the tail in the place of the float cache."""

    def __init__(self, codec: LowRankCodec) -> None:
        super().__init__(codec)
        half = codec.text.head_dim // 2
        self._cos, self._sin = np.zeros((1, half), np.float32), np.zeros((1, half), np.float32)
        self._nothing = codec.new_store(1, 1)
        self._lengths = self._nothing.lengths
        self._tail: Array | None = None

    def _make_tables(self, angles: Array) -> None:
        self._cos, self._sin = (function(angles).astype(np.float32) for function in (np.cos, np.sin))

    def covers(self, kv: KvStore, batch: int) -> bool:
        assert isinstance(kv, LowRankKv)
        kv.grow_tail(batch)
        return super().covers(kv, batch) and kv.tail_keys is self._tail

    def append_lengths(self, kv: KvStore, batch: int) -> NDArray[np.int32]:
        assert isinstance(kv, LowRankKv)
        # What is bound is this array.
        self._lengths[:] = kv.packed_lengths[:, :batch]
        return kv.tail_lengths[:, :batch]

    def finish_step(self, kv: KvStore, batch: int) -> None:
        assert isinstance(kv, LowRankKv)
        super().finish_step(kv, batch)
        kv.tail_lengths[:, :batch] += 1

    def _bind_rows(self, binding: Any, kv: KvStore, batch: int) -> None:
        assert isinstance(kv, LowRankKv)
        kv.grow_tail(batch)
        self._tail = kv.tail_keys
        self._lengths = np.zeros((self._text.layers, batch), np.int32)
        self._bind_packed(binding, kv, batch)
        for kind, tail in (("k", kv.tail_keys), ("v", kv.tail_values)):
            for layer in range(self._text.layers):
                bind_in_place(binding, kind, layer, tail[layer, :batch])

    def _bind_no_packed_rows(self, binding: Any) -> None:
        self._bind_packed(binding, self._nothing, 1)

    def _bind_packed(self, binding: Any, kv: LowRankKv, batch: int) -> None:
        for name, table in (("cos_table", self._cos), ("sin_table", self._sin)):
            bind_array(binding.bind_input, name, table[: self._bound])
        for layer, rows in enumerate(kv.packed):
            bind_array(binding.bind_input, f"row_positions.{layer}", kv.positions[layer, :batch])
            bind_array(binding.bind_input, f"packed_len.{layer}", self._lengths[layer])
            for name, array in rows.items():
                bind_array(binding.bind_input, f"{name}.{layer}", array[:batch])


def key_bias_tables(angles: NDArray[np.float64], sections: Sequence[int]) -> list[NDArray[np.float32]]:
    """A decoder's inputs ``rope_table.c``, one per component of a position.

    Args:
        angles: ``[P, D / 2]`` of every position and rotary pair.
        sections: pairs that read each component.

    Returns:
        ``[P, 2 n]`` each: cosines and sines of the component's n pairs, divided by √D.
    """
    head_dim = 2 * angles.shape[1]
    return [
        (np.concatenate([np.cos(part), np.sin(part)], -1) / np.sqrt(head_dim)).astype(np.float32)
        for part in np.split(angles, np.cumsum(sections)[:-1], axis=-1)
    ]


def packed_cache(codec: KvCodec) -> PackedCache:
    """The binding of a codec's caches."""
    if isinstance(codec, QuantizedCodec):
        return QuantizedCache(codec)
    assert isinstance(codec, LowRankCodec)
    return LowRankCache(codec)
