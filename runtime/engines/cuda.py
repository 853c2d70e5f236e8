# SPDX-License-Identifier: Apache-2.0
"""What the TensorRT engine needs of CUDA, as a protocol: memory, one stream's copies, and graphs.

``cuda_python.py`` has it over NVIDIA's cuda-python; tests have it over numpy. Addresses and streams are
integers, as TensorRT and the kernels' library take them. Nothing waits unless it says so: what is uploaded
must stay as it is, and what is downloaded may not be read, until ``synchronize``.
"""

from typing import Any, Protocol

from numpy.typing import NDArray


class Cuda(Protocol):
    """A GPU's memory, streams and graphs. Sizes are in bytes."""

    @property
    def name(self) -> str:
        """``cuda``; the processor in the same role is ``cpu``."""

    def allocate(self, size: int) -> int:
        """Address of new memory, a multiple of 256.

        Raises:
            EngineError: there is not that much; says how much there is.
        """
        ...

    def free(self, address: int) -> None:
        """Give memory back. The caller has synchronized everything that uses it."""

    def allocate_pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array in page-locked host memory: copies to and from it do not hold up the host."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of the card that are free, and all of them."""
        ...

    def new_stream(self) -> int: ...

    def synchronize(self, stream: int) -> None:
        """Wait for everything on the stream.

        Raises:
            EngineError: something on it failed.
        """

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the device."""

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        """Fill a contiguous array from the device."""

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
        """Copy ``height`` runs of ``width`` bytes that begin every ``pitch`` bytes, within the device."""

    def clear(self, target: int, size: int, stream: int) -> None:
        """Set bytes to 0."""

    def begin_capture(self, stream: int) -> None:
        """Record what is enqueued from now on instead of running it."""

    def end_capture(self, stream: int) -> Any:
        """A graph of what was recorded.

        Raises:
            EngineError: something can't be recorded.
        """
        ...

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a graph."""

    def destroy_graph(self, graph: Any) -> None: ...
