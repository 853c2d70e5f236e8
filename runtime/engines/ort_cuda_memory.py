# SPDX-License-Identifier: Apache-2.0
"""KV memory on a device: tensors that ONNX Runtime allocates there, and what moves their bytes.

``HostDevice`` is the processor in the same role, so that everything but the driver's calls is tested without
a GPU.
"""

import ctypes
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.manifest import ComputeDtype, TextShape
from starkv.runtime.kv.buffers import Arena, KvBuffers, KvStore, cache_shape, empty_rows

_ONNX_BFLOAT16 = 16
"""numpy has no bfloat16 that ONNX Runtime knows, so it is named by ONNX's number."""
_DTYPES: dict[ComputeDtype, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


class Device(Protocol):
    """Moves bytes to, from and within a device's memory; addresses are integers. Sizes are in bytes."""

    @property
    def name(self) -> str:
        """As ONNX Runtime calls it: ``cpu`` or ``cuda``."""

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def clear(self, target: int, size: int) -> None:
        """Set bytes to 0."""

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Copy an array's bytes to the device."""

    def download(self, target: NDArray[Any], source: int) -> None:
        """Fill a contiguous array from the device."""

    def copy(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Copy ``height`` runs of ``width`` bytes that begin every ``pitch`` bytes."""


class HostDevice:
    """The processor as a device."""

    name = "cpu"

    def synchronize(self) -> None:
        return None

    def clear(self, target: int, size: int) -> None:
        ctypes.memset(target, 0, size)

    def upload(self, target: int, source: NDArray[Any]) -> None:
        array = np.ascontiguousarray(source)
        ctypes.memmove(target, array.ctypes.data, array.nbytes)

    def download(self, target: NDArray[Any], source: int) -> None:
        ctypes.memmove(target.ctypes.data, source, target.nbytes)

    def copy(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)


def numpy_dtype(dtype: ComputeDtype) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(_DTYPES[dtype])
    return found


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor in a device's memory."""

    value: Any
    """The ``OrtValue`` that owns the memory."""
    device: Device
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def empty(cls, ort: Any, device: Device, shape: tuple[int, ...], dtype: Any) -> "DeviceTensor":
        """Allocate a tensor; what is in it is undefined.

        Args:
            ort: the module ``onnxruntime``.
            device: where.
            shape: of the tensor; no dimension may be 0.
            dtype: numpy's, or ``ml_dtypes.bfloat16``.
        """
        dtype = np.dtype(dtype)
        value = ort.OrtValue.ortvalue_from_shape_and_type(
            [int(size) for size in shape], element_type(dtype), device.name, 0
        )
        return cls(value, device, tuple(shape), dtype)

    @classmethod
    def of(cls, ort: Any, device: Device, array: NDArray[Any]) -> "DeviceTensor":
        """A copy of an array on the device."""
        tensor = cls.empty(ort, device, array.shape, array.dtype)
        tensor.write(array)
        return tensor

    @property
    def address(self) -> int:
        return int(self.value.data_ptr())

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def at(self, *index: int) -> int:
        """Address of the part with these leading indices."""
        offset = 0
        for position, size in zip(index, self.shape, strict=False):
            offset = offset * size + position
        return self.address + offset * math.prod(self.shape[len(index) :]) * self.dtype.itemsize

    def write(self, array: NDArray[Any]) -> None:
        """Copy an array of the tensor's shape to the device, converted to its dtype."""
        self.device.upload(self.address, np.broadcast_to(array, self.shape).astype(self.dtype, copy=False))

    def read(self) -> NDArray[Any]:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        self.device.download(array, self.address)
        return array

    def bind(self, bind: Any, name: str, shape: tuple[int, ...], address: int) -> None:
        """Bind a part of the tensor, which the caller keeps alive, as an input or output."""
        bind(name, self.device.name, 0, element_type(self.dtype), list(shape), address)


def element_type(dtype: np.dtype[Any]) -> Any:
    """A dtype as ONNX Runtime's Python takes it."""
    return _ONNX_BFLOAT16 if dtype == ml_dtypes.bfloat16 else dtype.type


@dataclass
class DeviceKv(KvStore):
    """A cache on a device."""

    keys: DeviceTensor
    """``[L, N, Hkv, C, D]``."""
    values: DeviceTensor
    """``[L, N, Hkv, C, D]``."""
    steps: dict[int, Any] = field(default_factory=dict)
    """Batch size → decode step that is bound to this memory."""

    @classmethod
    def allocate(
        cls, ort: Any, device: Device, text: TextShape, slots: int, rows: int, dtype: np.dtype[Any]
    ) -> "DeviceKv":
        """Zeroed buffers, see :func:`cache_shape`: what a kernel reads behind the rows must be numbers."""
        shape = cache_shape(text, slots, rows)
        keys, values = (DeviceTensor.empty(ort, device, shape, dtype) for _ in range(2))
        for tensor in (keys, values):
            device.clear(tensor.address, tensor.nbytes)
        return cls(*empty_rows(shape), keys, values)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.keys.shape

    @property
    def itemsize(self) -> int:
        return self.keys.dtype.itemsize

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        copy_rows(self, source, self, target, rows)

    def write_rows(self, slot: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Write the first rows of a slot from host memory: ``[L, Hkv, rows, D]`` each."""
        for tensor, array in ((self.keys, keys), (self.values, values)):
            rows = array.astype(tensor.dtype)
            for layer, heads in enumerate(rows):
                for head, part in enumerate(heads):
                    tensor.device.upload(tensor.at(layer, slot, head), part)

    def forget(self) -> None:
        """Make the memory as good as new for another user."""
        self.lengths[:] = 0
        self.row_meta[:] = -1


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
