# SPDX-License-Identifier: Apache-2.0
"""Int8 and int4 caches: every row quantized, those of the reply as they are appended."""

from dataclasses import dataclass

import numpy as np

from starkv.kv_packing.positions import POSITION_BYTES
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.quantized_rows import QuantizedRows
from starkv.lowrank.rotary import Rotary, rotate
from starkv.manifest import TextShape
from starkv.runtime.kv.buffers import HostKv, KvStore, cache_shape, empty_rows, host_buffers
from starkv.runtime.kv.packed import KvCodec, PackedKv, check_numbers, head_major
from starkv.runtime.kv.parked import ParkedRows


class QuantizedCodec(KvCodec):
    """Static scales per channel."""

    def __init__(self, packing: QuantizedPacking, rotary: Rotary, text: TextShape) -> None:
        self.packing, self.rotary, self.text = packing, rotary, text
        self.name = f"int{packing.bits}"
        self.bytes_per_row = sum(packing.bytes_per_row(layer) for layer in range(text.layers))

    def new_store(self, slots: int, rows: int) -> "QuantizedKv":
        layers, _, heads, capacity, dim = shape = cache_shape(self.text, slots, rows)
        codes = (layers, slots, heads, capacity, self.packing.code_width(dim))
        dtype = self.packing.code_dtype
        return QuantizedKv(*empty_rows(shape), np.zeros(codes, dtype), np.zeros(codes, dtype), self)

    def is_of_this_packing(self, parked: ParkedRows) -> bool:
        row = (self.text.kv_heads, self.packing.code_width(self.text.head_dim))
        return len(parked.keys) == self.text.layers and all(
            (array.shape[0], array.shape[2]) == row and array.dtype == self.packing.code_dtype
            for array in (*parked.keys, *parked.values)
        )

    def _unpack(self, parked: ParkedRows) -> ParkedRows:
        keys, values = [], []
        for layer, positions in enumerate(parked.positions):
            quantization = self.packing.layers[layer]
            codes = [array[layer].transpose(1, 0, 2) for array in (parked.keys, parked.values)]
            rows = QuantizedRows(codes[0], codes[1], positions)
            cosines, sines = self.rotary.tables(positions)
            bias = rotate(quantization.key_bias, cosines[:, None], sines[:, None])
            keys.append(head_major(quantization.stored_keys(rows) + bias))
            values.append(head_major(quantization.stored_values(rows) + quantization.value_bias))
        return ParkedRows(tuple(keys), tuple(values), parked.row_meta, parked.positions)


@dataclass
class QuantizedKv(HostKv, PackedKv):
    """Codes ``[L, N, Hkv, C, D]`` int8, or ``[L, N, Hkv, C, D / 2]`` uint8."""

    codec: QuantizedCodec

    @property
    def row_bytes(self) -> int:
        return 2 * self.shape[2] * self.shape[4] * self.itemsize + POSITION_BYTES

    @property
    def bytes_reserved(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes

    def _is_of_this_cache(self, parked: ParkedRows) -> bool:
        return self.codec.is_of_this_packing(parked)

    def pack(self, slot: int, source: KvStore) -> None:
        self._check_packable(source)
        floats = host_buffers(source)
        for layer, rows in enumerate(source.lengths[:, 0]):
            keys, values = (
                array[layer, 0, :, :rows].transpose(1, 0, 2) for array in (floats.keys, floats.values)
            )
            check_numbers(layer, keys, values)
            codes = self.codec.packing.layers[layer].quantize(
                keys, values, source.positions[layer, 0, :rows], self.codec.rotary
            )
            self.keys[layer, slot, :, :rows] = codes.keys.transpose(1, 0, 2)
            self.values[layer, slot, :, :rows] = codes.values.transpose(1, 0, 2)
        self._note_packed(slot, source)
