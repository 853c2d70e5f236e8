# SPDX-License-Identifier: Apache-2.0
"""CUDA through NVIDIA's cuda-python (``cuda.bindings``), behind the protocol of ``cuda.py``."""

import ctypes
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError

_MIB = 1 << 20
_MEMORY = Path("/proc/meminfo")


class CudaPython:
    """The first card."""

    name = "cuda"

    def __init__(self) -> None:
        """Load cuda-python and look for a card.

        Raises:
            EngineError: the package is missing, or the driver, or it sees no card.
        """
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise EngineError(
                "TensorRT engines need the package cuda-bindings; pip install 'starkv[trt]'"
            ) from None
        self._runtime = runtime
        try:
            (count,) = self._call("cudaGetDeviceCount")
        except EngineError as error:
            raise EngineError(f"CUDA can't begin here: {error}; {self._why_not()}") from None
        if not count:
            raise EngineError("CUDA finds no GPU; check nvidia-smi")

    def _why_not(self) -> str:
        """What may keep CUDA from beginning, as far as versions tell."""
        try:
            (release,), (driver,) = self._call("cudaRuntimeGetVersion"), self._call("cudaDriverGetVersion")
        except EngineError:
            driver = 0
        if not driver:
            return "there is no NVIDIA driver; check nvidia-smi"
        major = driver // 1000
        if major < release // 1000:
            return (
                f"cuda-bindings is for CUDA {_version(release)}, this driver runs CUDA {_version(driver)} at "
                f"most; update it, or pip install 'cuda-bindings=={major}.*'"
            )
        return "check nvidia-smi"

    def allocate(self, size: int) -> int:
        # CUDA makes no memory of no bytes, and TensorRT takes no null addresses.
        try:
            (address,) = self._call("cudaMalloc", max(1, size))
        except EngineError as error:
            free, total = self.memory()
            raise EngineError(
                f"the GPU is out of memory: {size / _MIB:.0f} MiB asked for, {free / _MIB:.0f} of "
                f"{total / _MIB:.0f} MiB free ({error})"
            ) from None
        return int(address)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        (address,) = self._call("cudaMallocHost", max(1, size))

        def free() -> None:
            # A card that failed keeps it until the process ends.
            with suppress(EngineError):
                self._call("cudaFreeHost", address)

        pinned: NDArray[Any] = _array_at(int(address), size, free)
        typed: NDArray[Any] = pinned.view(dtype).reshape(shape)
        return typed

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cudaMemGetInfo")
        attribute = self._runtime.cudaDeviceAttr.cudaDevAttrIntegrated
        (integrated,) = self._call("cudaDeviceGetAttribute", attribute, 0)
        # Where the processor shares the memory, CUDA counts what caches of files hold as taken.
        available = _available_memory() if integrated else 0
        return max(int(free), min(available, int(total))), int(total)

    def new_stream(self) -> int:
        (stream,) = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        return int(stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream)

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream)

    def copy(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        stream: int,
    ) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(
            "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, height, kind, stream
        )

    def clear(self, target: int, size: int, stream: int) -> None:
        self._call("cudaMemsetAsync", target, 0, size, stream)

    def begin_capture(self, stream: int) -> None:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        (graph,) = self._call("cudaStreamEndCapture", stream)
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        return executable

    def launch(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """What a function puts out beside its error code.

        Raises:
            EngineError: the code is one.
        """
        try:
            code, *values = getattr(self._runtime, function)(*arguments)
        except RuntimeError as error:
            # Versions before 13 say so where the driver is missing.
            raise EngineError(f"{function}: {error}") from None
        if code != self._runtime.cudaError_t.cudaSuccess:
            _, text = self._runtime.cudaGetErrorString(code)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise EngineError(f"{function}: {reason}")
        return tuple(values)


def _version(number: int) -> str:
    """CUDA's way to write 12.6 is 12060."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _available_memory() -> int:
    """Bytes that the system could give to a program."""
    if not _MEMORY.is_file():
        return 0
    fields = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines() if ":" in line)
    return int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024


def _array_at(address: int, size: int, free: Any) -> NDArray[np.uint8]:
    """Bytes at an address, given back when the last view of them is gone."""
    block: Any = (ctypes.c_uint8 * max(1, size)).from_address(address)
    weakref.finalize(block, free)
    return np.frombuffer(block, np.uint8, size)
