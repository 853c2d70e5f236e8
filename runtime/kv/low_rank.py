# SPDX-License-Identifier: Apache-2.0
"""Low-rank caches: latents of the rows that a compression kept, and a tail of newer rows as they are.

A parked row is one run of bytes per layer: latents or codes of its key, their scales, and the same of its
value. The tail grows with the reply.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from starkv.kv_packing.low_rank import LowRankPacking
from starkv.lowrank.latent_format import key_code_bytes, value_code_bytes
from starkv.lowrank.pack import PackedRows, pack_keys, pack_values, unpack_keys, unpack_values
from starkv.lowrank.rotary import Rotary
from starkv.manifest import TextShape
from starkv.runtime.kv.buffers import (
    ROW_STEP,
    KvStore,
    cache_shape,
    empty_rows,
    host_buffers,
    round_up_rows,
)
from starkv.runtime.kv.packed import KvCodec, PackedKv, check_numbers, head_major
from starkv.runtime.kv.parked import ParkedRows

Array = NDArray[Any]


class LowRankCodec(KvCodec):
    """Factors of every layer."""

    def __init__(self, packing: LowRankPacking, rotary: Rotary, text: TextShape, name: str) -> None:
        self.packing, self.rotary, self.text, self.name = packing, rotary, text, name
        self.layer_bytes = [packing.bytes_per_row(layer) for layer in range(text.layers)]
        self.bytes_per_row = sum(self.layer_bytes)

    def new_store(self, slots: int, rows: int) -> "LowRankKv":
        shape = cache_shape(self.text, slots, rows)
        layers, _, heads, capacity, dim = shape
        tail = (layers, slots, heads, round_up_rows(min(rows, self.packing.recent_rows) + 1), dim)
        return LowRankKv(
            *empty_rows(shape),
            self,
            shape,
            [self.layer_arrays(layer, (slots, capacity)) for layer in range(layers)],
            np.zeros(tail, np.float32),
            np.zeros(tail, np.float32),
        )

    def layer_arrays(self, layer: int, rows: tuple[int, ...]) -> dict[str, Array]:
        """Zeroed arrays ``[*rows, …]`` of a layer's packed rows, by the names of the decoder's inputs."""
        latent, lanes = self.packing.latent, self.packing.lanes(layer)
        rank = self.packing.layers[layer].values.rank
        if not latent.quantized:
            return {
                "k_latent": np.zeros((*rows, lanes.lanes), np.float32),
                "v_latent": np.zeros((*rows, rank), np.float32),
            }
        dtype = np.uint8 if latent.lane_bits == 4 else np.int8
        return {
            "k_codes": np.zeros((*rows, key_code_bytes(lanes, latent)), dtype),
            "k_scales": np.zeros((*rows, len(lanes.ranks), 2), ml_dtypes.bfloat16),
            "v_codes": np.zeros((*rows, value_code_bytes(rank, latent)), dtype),
            "v_scales": np.zeros((*rows, 2), ml_dtypes.bfloat16),
        }

    def encode(self, layer: int, keys: Array, values: Array, positions: Array) -> dict[str, Array]:
        """Packed rows of exact ones.

        Args:
            layer: whose factors.
            keys: ``[Hkv, rows, D]``, rotated, with bias.
            values: likewise.
            positions: ``[rows, 3]``.

        Raises:
            EngineError: rows are not numbers.
        """
        check_numbers(layer, keys, values)
        factors, latent = self.packing.layers[layer], self.packing.latent
        cosines, sines = self.rotary.tables(positions)
        of_keys = factors.key_latents(keys.transpose(1, 0, 2), cosines, sines)
        of_values = factors.value_latents(values.transpose(1, 0, 2))
        if not latent.quantized:
            return {"k_latent": self.packing.lanes(layer).join(of_keys), "v_latent": of_values}
        packed_keys, packed_values = pack_keys(of_keys, latent), pack_values(of_values, latent)
        return {
            "k_codes": packed_keys.codes,
            "k_scales": packed_keys.scales,
            "v_codes": packed_values.codes,
            "v_scales": packed_values.scales,
        }

    def decode(self, layer: int, rows: dict[str, Array], positions: Array) -> tuple[Array, Array]:
        """Exact-form keys and values ``[Hkv, rows, D]`` f32, as far as packed rows hold them."""
        factors, latent, lanes = self.packing.layers[layer], self.packing.latent, self.packing.lanes(layer)
        if latent.quantized:
            of_keys: Sequence[Array] = unpack_keys(
                PackedRows(rows["k_codes"], rows["k_scales"]), lanes, latent
            )
            packed_values = PackedRows(rows["v_codes"], rows["v_scales"])
            of_values: Array = unpack_values(packed_values, factors.values.rank, latent)
        else:
            of_keys, of_values = lanes.split(rows["k_latent"]), rows["v_latent"]
        cosines, sines = self.rotary.tables(positions)
        lifted = factors.values.lift(of_values).reshape(len(positions), *factors.value_bias.shape)
        keys = factors.lifted_keys(list(of_keys), cosines, sines)
        return head_major(keys), head_major(lifted + factors.value_bias)

    def is_of_this_packing(self, parked: ParkedRows) -> bool:
        if len(parked.keys) != self.text.layers:
            return False
        for layer, stored in enumerate(zip(parked.keys, parked.values, strict=True)):
            row = self.layer_arrays(layer, (1,))
            for kind, array in zip("kv", stored, strict=True):
                width = sum(_row_bytes(part) for part in _arrays(row, kind))
                if array.dtype != np.uint8 or array.shape[0] != 1 or array.shape[2] != width:
                    return False
        return True

    def _unpack(self, parked: ParkedRows) -> ParkedRows:
        pairs = []
        for layer, positions in enumerate(parked.positions):
            rows = self.layer_arrays(layer, (len(positions),))
            _from_bytes(rows, "k", parked.keys[layer])
            _from_bytes(rows, "v", parked.values[layer])
            pairs.append(self.decode(layer, rows, positions))
        keys, values = zip(*pairs, strict=True) if pairs else ((), ())
        return ParkedRows(keys, values, parked.row_meta, parked.positions)


@dataclass
class LowRankKv(PackedKv):
    """Packed rows first, then the tail."""

    codec: LowRankCodec
    logical_shape: tuple[int, ...]
    """``[L, N, Hkv, C, D]`` of the rows that it stands for."""
    packed: list[dict[str, Array]]
    """Per layer ``[N, C, …]``, by the names of the decoder's inputs."""
    tail_keys: NDArray[np.float32]
    """``[L, N, Hkv, T, D]``, rotated, with bias."""
    tail_values: NDArray[np.float32]
    """``[L, N, Hkv, T, D]``."""
    tail_lengths: NDArray[np.int32] = field(init=False)
    """``[L, N]``: valid rows of the tail, which are the last ones of ``lengths``."""

    def __post_init__(self) -> None:
        self.tail_lengths = np.zeros_like(self.lengths)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.logical_shape

    @property
    def itemsize(self) -> int:
        return self.tail_keys.itemsize

    @property
    def packed_lengths(self) -> NDArray[np.int32]:
        """``[L, N]``."""
        lengths: NDArray[np.int32] = self.lengths - self.tail_lengths
        return lengths

    def count_rows(self, rows: int) -> None:
        super().count_rows(rows)
        self.tail_lengths[:] = min(rows, self.codec.packing.recent_rows)

    def bytes_of(self, slots: slice) -> int:
        tail_row = 2 * self.shape[2] * self.shape[4] * self.itemsize
        packed = self.packed_lengths[:, slots].sum(1) @ np.array(self.codec.layer_bytes)
        return int(packed) + int(self.tail_lengths[:, slots].sum()) * tail_row

    @property
    def bytes_reserved(self) -> int:
        packed = sum(array.nbytes for layer in self.packed for array in layer.values())
        return packed + self.positions.nbytes + self.tail_keys.nbytes + self.tail_values.nbytes

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.tail_lengths[:, slot] = 0

    def grow_tail(self, batch: int) -> None:
        """Make room for another row of each of the first ``batch`` sequences."""
        used, capacity = int(self.tail_lengths[:, :batch].max()), self.tail_keys.shape[3]
        if used < capacity:
            return
        more = ((0, 0), (0, 0), (0, 0), (0, ROW_STEP), (0, 0))
        self.tail_keys, self.tail_values = np.pad(self.tail_keys, more), np.pad(self.tail_values, more)

    def pack(self, slot: int, source: KvStore) -> None:
        self._check_packable(source)
        floats = host_buffers(source)
        for layer, rows in enumerate(source.lengths[:, 0]):
            recent = min(int(rows), self.codec.packing.recent_rows)
            older = int(rows) - recent
            keys, values = floats.keys[layer, 0, :, :rows], floats.values[layer, 0, :, :rows]
            positions = source.positions[layer, 0, :older]
            packed = self.codec.encode(layer, keys[:, :older], values[:, :older], positions)
            for name, array in packed.items():
                self.packed[layer][name][slot, :older] = array
            self.tail_keys[layer, slot, :, :recent] = keys[:, older:]
            self.tail_values[layer, slot, :, :recent] = values[:, older:]
            self.tail_lengths[layer, slot] = recent
        self._note_packed(slot, source)

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        for layer in self.packed:
            for array in layer.values():
                array[target, :rows] = array[source, :rows]
        for tail in (self.tail_keys, self.tail_values):
            tail[:, target] = tail[:, source]
        self.tail_lengths[:, target] = self.tail_lengths[:, source]

    def _read(self, layer: int, slot: int, rows: int) -> tuple[Array, Array]:
        """Bytes ``[1, rows, …]``; the tail is packed, too: newer rows come behind it in the next turn."""
        recent = int(self.tail_lengths[layer, slot])
        older = rows - recent
        keys, values = self.tail_keys[layer, slot, :, :recent], self.tail_values[layer, slot, :, :recent]
        newer = self.codec.encode(layer, keys, values, self.positions[layer, slot, older:rows])
        every = {
            name: np.concatenate([array[slot, :older], newer[name].astype(array.dtype)])
            for name, array in self.packed[layer].items()
        }
        return _to_bytes(every, "k"), _to_bytes(every, "v")

    def _write(self, layer: int, slot: int, keys: Array, values: Array) -> None:
        rows = {name: array[slot, : keys.shape[1]] for name, array in self.packed[layer].items()}
        _from_bytes(rows, "k", keys)
        _from_bytes(rows, "v", values)
        self.tail_lengths[layer, slot] = 0

    def _is_of_this_cache(self, parked: ParkedRows) -> bool:
        return self.codec.is_of_this_packing(parked)


def _arrays(rows: dict[str, Array], kind: str) -> list[Array]:
    return [array for name, array in rows.items() if name.startswith(kind)]


def _row_bytes(array: Array) -> int:
    return math.prod(array.shape[1:]) * array.itemsize


def _to_bytes(rows: dict[str, Array], kind: str) -> NDArray[np.uint8]:
    """``[1, rows, bytes]``: a row's arrays one behind the other."""
    parts = [
        np.ascontiguousarray(array).view(np.uint8).reshape(len(array), _row_bytes(array))
        for array in _arrays(rows, kind)
    ]
    return np.concatenate(parts, -1)[None]


def _from_bytes(rows: dict[str, Array], kind: str, stored: Array) -> None:
    """Fill the arrays of :func:`_to_bytes`."""
    start = 0
    for array in _arrays(rows, kind):
        end = start + _row_bytes(array)
        array[:] = np.ascontiguousarray(stored[0, :, start:end]).view(array.dtype).reshape(array.shape)
        start = end
