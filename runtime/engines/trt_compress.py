# SPDX-License-Identifier: Apache-2.0
"""STaR-KV by the engine's compression plan, on the stream of everything else."""

from collections.abc import Callable
from typing import Any

from starkv.manifest import Manifest
from starkv.runtime.engines.device_compress import DeviceCompressor, Operands
from starkv.runtime.engines.device_tensor import DeviceMemory
from starkv.runtime.engines.trt_tensors import COMPRESS_ALIASES
from starkv.trt_compat.execution import Execution


class TrtCompressor(DeviceCompressor):
    """Runs ``compress.plan``; methods other than STaR-KV run on the processor."""

    def __init__(
        self,
        manifest: Manifest,
        open_graph: Callable[[str], Any],
        memory: DeviceMemory,
        execution: Execution,
    ) -> None:
        """Graphs are opened when a method first needs them.

        Args:
            manifest: sizes and dtype.
            open_graph: makes the session of ``{name}.onnx`` on the processor.
            memory: of the device where the caches lie.
            execution: of the plan.
        """
        super().__init__(manifest, open_graph, memory)
        self._execution = execution

    @property
    def on_device(self) -> bool:
        return True

    def _run_compress(self, operands: Operands) -> None:
        for name, tensor in operands.items():
            self._execution.bind(name, tensor.address, tensor.shape)
        for output, source in COMPRESS_ALIASES.items():
            self._execution.bind(output, operands[source].address, operands[source].shape)
        self._execution.enqueue()
        self._memory.device.synchronize()
