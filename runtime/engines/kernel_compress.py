# SPDX-License-Identifier: Apache-2.0
"""STaR-KV on a device by the kernels' library, where one is built."""

from collections.abc import Callable
from typing import Any

import numpy as np

from starkv.kernels.c_abi import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    POOLINGS,
    CompressBuffers,
    CompressShape,
    KernelAbi,
    KernelError,
)
from starkv.kernels.library_paths import kernel_libraries
from starkv.manifest import ComputeDtype, Manifest
from starkv.runtime.engines.device_compress import DeviceCompressor, Operands
from starkv.runtime.engines.device_tensor import DeviceMemory

KERNEL_DTYPES: dict[ComputeDtype, int] = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
_POOLING, _POOLING_KERNEL = POOLINGS["avgpool"], 5
"""As in ``compress.onnx``."""


def find_kernels(device: str) -> KernelAbi | None:
    """The kernels' library for ``cuda`` or ``cpu``, or None where none is built."""
    for path in kernel_libraries(device):
        try:
            library = KernelAbi(path)
        except KernelError:
            continue
        if library.device == device:
            return library
    return None


class KernelCompressor(DeviceCompressor):
    """Calls ``starkv_compress``; without a library everything runs on the processor."""

    def __init__(
        self,
        manifest: Manifest,
        open_graph: Callable[[str], Any],
        memory: DeviceMemory,
        kernels: KernelAbi | None,
    ) -> None:
        """Graphs are opened when a method first needs them.

        Args:
            manifest: sizes and dtype.
            open_graph: makes the session of ``{name}.onnx`` on the processor.
            memory: of the device where the caches lie.
            kernels: the library for that device, if there is one.
        """
        super().__init__(manifest, open_graph, memory)
        self._kernels, self._dtype = kernels, KERNEL_DTYPES[manifest.compute_dtype]

    @property
    def on_device(self) -> bool:
        return self._kernels is not None

    def _run_compress(self, operands: Operands) -> None:
        if self._kernels is None:
            raise ValueError("there is no library to run")
        layers, sequences, groups, capacity, dim = operands["k"].shape
        _, slots, _, slot_capacity, _ = operands["dst_k"].shape
        shape = CompressShape(
            layers=layers,
            sequences=sequences,
            kv_heads=groups,
            query_heads=operands["q_window"].shape[2],
            window=operands["q_window"].shape[3],
            head_dim=dim,
            capacity=capacity,
            slots=slots,
            slot_capacity=slot_capacity,
            pattern_capacity=operands["pattern_ema"].shape[-1],
            dtype=self._dtype,
            pooling=_POOLING,
            pooling_kernel=_POOLING_KERNEL,
        )
        size = self._kernels.workspace_bytes(shape)
        workspace = self._memory.empty((max(1, size),), np.uint8)
        buffers = CompressBuffers(**{name: tensor.address for name, tensor in operands.items()})
        self._memory.device.synchronize()
        self._kernels.launch(shape, buffers, workspace.address, size)
        self._memory.device.synchronize()
