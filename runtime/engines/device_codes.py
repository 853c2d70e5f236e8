# SPDX-License-Identifier: Apache-2.0
"""Int8 and int4 caches on a device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starkv.kv_packing.positions import POSITION_BYTES
from starkv.runtime.engines.device_kv import DeviceKv, device_kv
from starkv.runtime.engines.device_tensor import DeviceMemory, DeviceTensor
from starkv.runtime.engines.row_positions import RowPositions
from starkv.runtime.kv.buffers import KvStore, cache_shape, empty_rows
from starkv.runtime.kv.packed import PackedKv
from starkv.runtime.kv.parked import ParkedRows

if TYPE_CHECKING:
    from starkv.runtime.engines.device_packing import DevicePacking


@dataclass(kw_only=True)
class DeviceCodes(DeviceKv, PackedKv):
    """Codes ``[L, N, Hkv, C, D]`` int8, or ``[L, N, Hkv, C, D / 2]`` uint8, and their rows' positions."""

    packing: "DevicePacking"
    """The engine's."""
    row_positions: RowPositions

    @classmethod
    def new(
        cls,
        memory: DeviceMemory,
        packing: "DevicePacking",
        slots: int,
        rows: int,
    ) -> "DeviceCodes":
        """A cache without rows of ``slots`` sequences of up to ``rows`` rows."""
        codec = packing.codec
        layers, _, heads, capacity, dim = shape = cache_shape(codec.text, slots, rows)
        codes = (layers, slots, heads, capacity, codec.packing.code_width(dim))
        keys, values = (memory.empty(codes, codec.packing.code_dtype) for _ in range(2))
        for tensor in (keys, values):
            memory.device.clear(tensor.address, tensor.nbytes)
        return cls(
            *empty_rows(shape),
            keys,
            values,
            packing=packing,
            row_positions=RowPositions(memory, layers, slots, capacity),
        )

    @property
    def tensors(self) -> tuple[DeviceTensor, ...]:
        return self.keys, self.values, self.row_positions.tensor

    @property
    def row_bytes(self) -> int:
        return 2 * self.shape[2] * self.shape[4] * self.itemsize + POSITION_BYTES

    @property
    def bytes_reserved(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def _is_of_this_cache(self, parked: ParkedRows) -> bool:
        return self.packing.codec.is_of_this_packing(parked)

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        super().copy_rows(source, target, rows)
        self.row_positions.forget(slice(target, target + 1))

    def load(self, slot: int, parked: ParkedRows) -> None:
        KvStore.load(self, slot, parked)
        self.row_positions.send(slot, self.positions[:, slot], self.lengths[:, slot])

    def forget(self) -> None:
        super().forget()
        self.row_positions.forget(slice(None))

    def pack(self, slot: int, source: KvStore) -> None:
        floats = device_kv(source)
        self._check_packable(floats)
        self.row_positions.send(slot, floats.positions[:, 0], floats.lengths[:, 0])
        self.packing.quantize(floats, self, slot)
        self._note_packed(slot, floats)
