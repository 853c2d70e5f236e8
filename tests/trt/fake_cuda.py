# SPDX-License-Identifier: Apache-2.0
"""CUDA over host memory, stricter than a card: work waits on its stream until somebody synchronizes.

What is queued runs at ``synchronize``, so whoever forgets to wait reads poison. Every address must lie in
memory that is allocated and not freed.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError

ALIGNMENT = 256
POISON = 0x7F


class CudaMisuseError(AssertionError):
    """What a real card would answer with garbage, or a crash."""


@dataclass
class _Block:
    raw: NDArray[np.uint8]
    address: int
    size: int


@dataclass
class FakeGraph:
    """Recorded work."""

    work: list[Callable[[], None]]
    alive: bool = True


@dataclass
class FakeCuda:
    """The protocol of ``runtime/engines/cuda.py`` on host memory."""

    total: int = 1 << 30
    """Bytes of the card."""
    name: str = "cuda"
    blocks: dict[int, _Block] = field(default_factory=dict)
    freed: dict[int, int] = field(default_factory=dict)
    queued: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    capturing: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    in_use: int = 0
    peak: int = 0
    downloads: list[int] = field(default_factory=list)
    """Bytes of every copy to the host."""
    uploads: list[int] = field(default_factory=list)
    launches: int = 0
    captures: int = 0
    synchronizes: int = 0
    pinned: list[NDArray[Any]] = field(default_factory=list)

    # --- memory ---

    def allocate(self, size: int) -> int:
        self._not_while_capturing("allocate")
        free = self.total - self.in_use
        if size > free:
            raise EngineError(f"the GPU is out of memory: {size} bytes asked for, {free} free")
        raw = np.full(size + ALIGNMENT, POISON, np.uint8)
        address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = _Block(raw, address, size)
        self.freed.pop(address, None)
        self.in_use += size
        self.peak = max(self.peak, self.in_use)
        return address

    def free(self, address: int) -> None:
        if address not in self.blocks:
            raise CudaMisuseError("freed twice, or never allocated")
        if any(self.queued.values()):
            raise CudaMisuseError("memory is freed while work is queued that may use it")
        block = self.blocks.pop(address)
        block.raw[:] = POISON
        self.freed[address] = block.size
        self.in_use -= block.size

    def memory(self) -> tuple[int, int]:
        return self.total - self.in_use, self.total

    def allocate_pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        array = np.zeros(shape, dtype)
        self.pinned.append(array)
        return array

    def check(self, address: int, size: int, what: str) -> None:
        """Refuse memory that isn't allocated."""
        for block in self.blocks.values():
            if block.address <= address and address + size <= block.address + block.size:
                return
        for start, length in self.freed.items():
            if start <= address < start + length:
                raise CudaMisuseError(f"{what}: memory was freed")
        raise CudaMisuseError(f"{what}: {size} bytes at {address:#x} are not in one allocation")

    # --- streams ---

    def new_stream(self) -> int:
        stream = len(self.queued) + 1
        self.queued[stream] = []
        return stream

    def submit(self, stream: int, work: Callable[[], None], what: str) -> None:
        """Queue work, or record it."""
        if not stream:
            raise CudaMisuseError(f"{what} on the default stream, which waits for all others")
        if stream not in self.queued:
            raise CudaMisuseError(f"{what} on a stream that does not exist")
        (self.capturing if stream in self.capturing else self.queued)[stream].append(work)

    def synchronize(self, stream: int) -> None:
        self._not_while_capturing("synchronize")
        self.synchronizes += 1
        work, self.queued[stream] = self.queued[stream], []
        for step in work:
            step()

    # --- copies ---

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        self.check(target, source.nbytes, "upload")
        self.uploads.append(source.nbytes)
        pinned = any(np.may_share_memory(source, array) for array in self.pinned)
        if stream in self.capturing and not pinned:
            raise CudaMisuseError("ordinary memory is copied while a graph is captured")
        # A copy from ordinary memory is staged before the call returns; pinned memory is read when it runs.
        held = source if pinned else source.copy()
        if not source.flags.c_contiguous:
            raise CudaMisuseError("upload of an array that is not contiguous")

        def run() -> None:
            self.check(target, held.nbytes, "upload")
            ctypes.memmove(target, held.ctypes.data, held.nbytes)

        self.submit(stream, run, "upload")

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        self.check(source, target.nbytes, "download")
        if not target.flags.c_contiguous:
            raise CudaMisuseError("download to an array that is not contiguous")
        self.downloads.append(target.nbytes)
        ctypes.memset(target.ctypes.data, POISON, target.nbytes)

        def run() -> None:
            self.check(source, target.nbytes, "download")
            ctypes.memmove(target.ctypes.data, source, target.nbytes)

        self.submit(stream, run, "download")

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
        if not height:
            raise CudaMisuseError("a copy of nothing")

        def run() -> None:
            self.check(target, (height - 1) * target_pitch + width, "copy")
            self.check(source, (height - 1) * source_pitch + width, "copy")
            for row in range(height):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        self.submit(stream, run, "copy")

    def clear(self, target: int, size: int, stream: int) -> None:
        self.check(target, size, "clear")
        self.submit(stream, lambda: ctypes.memset(target, 0, size) and None, "clear")

    # --- graphs ---

    def begin_capture(self, stream: int) -> None:
        if self.queued.get(stream):
            # Allowed by CUDA, but then a capture's order is easily misjudged.
            self.synchronize(stream)
        self.capturing[stream] = []

    def end_capture(self, stream: int) -> FakeGraph:
        self.captures += 1
        return FakeGraph(self.capturing.pop(stream))

    def launch(self, graph: FakeGraph, stream: int) -> None:
        if not graph.alive:
            raise CudaMisuseError("a graph is launched after it was destroyed")
        self.launches += 1

        def run() -> None:
            for step in graph.work:
                step()

        self.submit(stream, run, "launch")

    def destroy_graph(self, graph: FakeGraph) -> None:
        graph.alive = False
        graph.work = []

    def _not_while_capturing(self, what: str) -> None:
        if self.capturing:
            raise CudaMisuseError(f"{what} while a graph is captured")

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Begin to count copies and launches anew."""
        self.downloads, self.uploads, self.launches, self.captures = [], [], 0, 0
        yield
