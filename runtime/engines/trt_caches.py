# SPDX-License-Identifier: Apache-2.0
"""How a decoder's caches are bound to its plan: of floats, or of codes where it was built for them.

Every input must be bound in every run. Of the cache that is not read, a plan sees a few rows that nobody
touches.
"""

from dataclasses import dataclass

import numpy as np

from starkv.kv_packing.positions import COMPONENTS
from starkv.kv_packing.quantized import SCALES, TABLES
from starkv.manifest import Manifest
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.device_codes import DeviceCodes
from starkv.runtime.engines.device_kv import DeviceKv
from starkv.runtime.engines.device_tensor import DeviceTensor, numpy_dtype
from starkv.runtime.kv.buffers import ROW_STEP
from starkv.trt_compat.execution import Execution

_INT32 = np.dtype(np.int32)
_CODES, _POSITIONS, _FLOATS = "codes", "row_positions", "floats"


@dataclass(frozen=True)
class _Rows:
    """What a layer's input is bound to."""

    tensor: DeviceTensor
    shape: tuple[int, ...]
    """Of a layer's part, behind the sequences where it has any."""
    of_layers: bool = True
    """Every layer has a part of its own."""

    @classmethod
    def shared(cls, tensor: DeviceTensor, sequences: bool = True) -> "_Rows":
        """One tensor for all layers."""
        return cls(tensor, tensor.shape[1:] if sequences else tensor.shape, False)

    def at(self, layer: int) -> int:
        return self.tensor.at(layer) if self.of_layers else self.tensor.address


class DecoderCaches:
    """Binds caches to a decoder's profiles."""

    def __init__(self, manifest: Manifest, memory: CudaMemory) -> None:
        """Allocate what stands for a cache that is not read.

        Args:
            manifest: of the engine.
            memory: of the card.
        """
        text, build = manifest.text, manifest.tensorrt
        self._layers = text.layers
        self._no_rows: dict[str, DeviceTensor] = {}
        if build is None or build.kv_bits is None:
            return
        heads, dim = text.kv_heads, text.head_dim
        width = dim * build.kv_bits // 8 // _INT32.itemsize
        shapes = {
            _FLOATS: ((build.sessions, heads, ROW_STEP, dim), numpy_dtype(manifest.compute_dtype)),
            _CODES: ((build.sessions, heads, 1, width), _INT32),
            _POSITIONS: ((build.sessions, 1, COMPONENTS), _INT32),
            **dict.fromkeys(SCALES, ((heads * dim,), np.float32)),
            **dict.fromkeys(TABLES, ((1, dim // 2), np.float32)),
        }
        for name, (shape, dtype) in shapes.items():
            self._no_rows[name] = memory.empty(shape, dtype)
            memory.device.clear(self._no_rows[name].address, self._no_rows[name].nbytes)

    def bind(self, execution: Execution, kv: DeviceKv, batch: int) -> None:
        """Bind the first slots of a cache as past and present."""
        codes = kv if isinstance(kv, DeviceCodes) else None
        self._bind_caches(execution, ("k", "v"), self._floats_of(kv), batch)
        if not self._no_rows:
            return
        self._bind_caches(execution, ("k_codes", "v_codes"), self._codes_of(codes), batch)
        positions, tensors = self._positions_of(codes), codes.packing.tensors if codes else self._no_rows
        for layer in range(self._layers):
            execution.bind(f"{_POSITIONS}.{layer}", positions.at(layer), (batch, *positions.shape))
            for name in SCALES:
                tensor = tensors[name]
                scale = _Rows(tensor, tensor.shape[1:]) if codes else _Rows.shared(tensor, sequences=False)
                execution.bind(f"{name}.{layer}", scale.at(layer), scale.shape)
        for name in TABLES:
            execution.bind(name, tensors[name].address, tensors[name].shape)

    def _floats_of(self, kv: DeviceKv) -> tuple[_Rows, _Rows]:
        if isinstance(kv, DeviceCodes):
            nothing = _Rows.shared(self._no_rows[_FLOATS])
            return nothing, nothing
        return _Rows(kv.keys, kv.shape[2:]), _Rows(kv.values, kv.shape[2:])

    def _codes_of(self, kv: DeviceCodes | None) -> tuple[_Rows, _Rows]:
        if kv is None:
            nothing = _Rows.shared(self._no_rows[_CODES])
            return nothing, nothing
        *rest, width = kv.shape[2:]
        shape = (*rest, width // _INT32.itemsize)
        return _Rows(kv.keys, shape), _Rows(kv.values, shape)

    def _positions_of(self, kv: DeviceCodes | None) -> _Rows:
        if kv is None:
            return _Rows.shared(self._no_rows[_POSITIONS])
        tensor = kv.row_positions.tensor
        return _Rows(tensor, tensor.shape[2:])

    def _bind_caches(
        self, execution: Execution, kinds: tuple[str, str], caches: tuple[_Rows, _Rows], batch: int
    ) -> None:
        for kind, rows in zip(kinds, caches, strict=True):
            for layer in range(self._layers):
                for name in (f"past_{kind}.{layer}", f"present_{kind}.{layer}"):
                    execution.bind(name, rows.at(layer), (batch, *rows.shape))
