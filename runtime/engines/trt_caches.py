# SPDX-License-Identifier: Apache-2.0
"""How a decoder's caches are bound to its plan: of floats, or of codes where it was built for them.

Every input must be bound in every run. Of the cache that is not read, a plan sees a few rows that nobody
touches.
"""

import numpy as np

from starkv.manifest import Manifest
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.device_codes import DeviceCodes
from starkv.runtime.engines.device_kv import DeviceKv
from starkv.runtime.engines.device_packing import SCALES, TABLES, DevicePacking
from starkv.runtime.engines.device_tensor import DeviceTensor, numpy_dtype
from starkv.runtime.engines.row_positions import COMPONENTS
from starkv.runtime.kv.buffers import ROW_STEP
from starkv.trt_compat.execution import Execution


class DecoderCaches:
    """Binds caches to a decoder's profiles."""

    def __init__(self, manifest: Manifest, memory: CudaMemory, packing: DevicePacking | None) -> None:
        """Allocate what stands for a cache that is not read.

        Args:
            manifest: of the engine.
            memory: of the card.
            packing: the engine's; None where it has none, or none yet.
        """
        text, build = manifest.text, manifest.tensorrt
        self._packing, self._layers = packing, text.layers
        self._no_rows: dict[str, DeviceTensor] = {}
        if build is None or build.kv_bits is None:
            return
        heads, dim = text.kv_heads, text.head_dim
        width = dim * build.kv_bits // 8 // np.dtype(np.int32).itemsize
        shapes = {
            "floats": ((build.sessions, heads, ROW_STEP, dim), numpy_dtype(manifest.compute_dtype)),
            "codes": ((build.sessions, heads, 1, width), np.int32),
            "row_positions": ((build.sessions, 1, COMPONENTS), np.int32),
            **dict.fromkeys(SCALES, ((heads * dim,), np.float32)),
            **dict.fromkeys(TABLES, ((1, dim // 2), np.float32)),
        }
        for name, (shape, dtype) in shapes.items():
            self._no_rows[name] = memory.empty(shape, dtype)
            memory.device.clear(self._no_rows[name].address, self._no_rows[name].nbytes)

    def bind(self, execution: Execution, kv: DeviceKv, batch: int) -> None:
        """Bind the first slots of a cache as past and present."""
        if isinstance(kv, DeviceCodes) and self._packing is not None:
            self._bind_codes(execution, kv, batch, self._packing)
            return
        for layer in range(self._layers):
            for kind, tensor in (("k", kv.keys), ("v", kv.values)):
                _in_place(execution, kind, layer, tensor.at(layer), (batch, *kv.shape[2:]))
        if self._no_rows:
            self._bind_no_codes(execution, batch)

    def _bind_codes(self, execution: Execution, kv: DeviceCodes, batch: int, packing: DevicePacking) -> None:
        _, _, heads, capacity, width = kv.shape
        codes = (batch, heads, capacity, width // np.dtype(np.int32).itemsize)
        positions, floats = kv.row_positions.tensor, self._no_rows["floats"]
        for layer in range(self._layers):
            for kind, tensor in (("k", kv.keys), ("v", kv.values)):
                _in_place(execution, f"{kind}_codes", layer, tensor.at(layer), codes)
                _in_place(execution, kind, layer, floats.address, (batch, *floats.shape[1:]))
            execution.bind(f"row_positions.{layer}", positions.at(layer), (batch, capacity, COMPONENTS))
            for name in SCALES:
                tensor = packing.tensors[name]
                execution.bind(f"{name}.{layer}", tensor.at(layer), tensor.shape[1:])
        for name in TABLES:
            execution.bind(name, packing.tensors[name].address, packing.tensors[name].shape)

    def _bind_no_codes(self, execution: Execution, batch: int) -> None:
        nothing = self._no_rows
        for layer in range(self._layers):
            for kind in "kv":
                codes = nothing["codes"]
                _in_place(execution, f"{kind}_codes", layer, codes.address, (batch, *codes.shape[1:]))
            positions = nothing["row_positions"]
            execution.bind(f"row_positions.{layer}", positions.address, (batch, *positions.shape[1:]))
            for name in SCALES:
                execution.bind(f"{name}.{layer}", nothing[name].address, nothing[name].shape)
        for name in TABLES:
            execution.bind(name, nothing[name].address, nothing[name].shape)


def _in_place(execution: Execution, kind: str, layer: int, address: int, shape: tuple[int, ...]) -> None:
    """Bind memory as a layer's past and as the present that it becomes."""
    execution.bind(f"past_{kind}.{layer}", address, shape)
    execution.bind(f"present_{kind}.{layer}", address, shape)
