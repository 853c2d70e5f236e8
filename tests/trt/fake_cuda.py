# SPDX-License-Identifier: Apache-2.0
"""CUDA over host memory, stricter than a card: work waits on its stream until somebody synchronizes.

What is queued runs at ``synchronize``, so whoever forgets to wait reads poison. Every address must lie in
memory that is allocated and not freed, and two streams may not touch the same memory without a wait between.
"""

import bisect
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fake_cuda_work import Block, CudaMisuseError, FakeGraph, Ranges, Work, check_runs
from numpy.typing import NDArray

from starkv.errors import EngineError

ALIGNMENT = 256
POISON = 0x7F


@dataclass
class FakeCuda:
    """The protocol of ``runtime/engines/cuda.py`` on host memory."""

    total: int = 1 << 30
    """Bytes of the card."""
    name: str = "cuda"
    blocks: dict[int, Block] = field(default_factory=dict)
    freed: dict[int, int] = field(default_factory=dict)
    queued: dict[int, list[Work]] = field(default_factory=dict)
    capturing: dict[int, list[Work]] = field(default_factory=dict)
    in_use: int = 0
    peak: int = 0
    reserved: int = 0
    """Bytes that others than the caller hold, such as an engine's weights."""
    downloads: list[int] = field(default_factory=list)
    """Bytes of every copy to the host."""
    uploads: list[int] = field(default_factory=list)
    launches: int = 0
    captures: int = 0
    synchronizes: int = 0
    pinned: list[NDArray[Any]] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)

    # --- memory ---

    def allocate(self, size: int) -> int:
        # CUDA runtime, cudaStreamBeginCapture: cudaMalloc is unsafe while a stream is captured.
        self._not_while_capturing("allocate")
        free, _ = self.memory()
        if size > free:
            raise EngineError(f"the GPU is out of memory: {size} bytes asked for, {free} free")
        raw = np.full(size + ALIGNMENT, POISON, np.uint8)
        address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        caller = sys._getframe(1)
        self.blocks[address] = Block(raw, size, f"{caller.f_code.co_filename}:{caller.f_lineno}")
        bisect.insort(self._starts, address)
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
        self._starts.remove(address)
        block.raw[:] = POISON
        self.freed[address] = block.size
        self.in_use -= block.size

    def memory(self) -> tuple[int, int]:
        return self.total - self.in_use - self.reserved, self.total

    def reserve(self, size: int) -> bool:
        """Hold memory for somebody else than the caller; False where there is not enough."""
        fits = size <= self.memory()[0]
        self.reserved += size if fits else 0
        return fits

    def leaks(self) -> list[str]:
        """Who allocated what was not freed."""
        return [f"{block.size} bytes from {block.where}" for block in self.blocks.values()]

    def allocate_pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        array = np.zeros(shape, dtype)
        self.pinned.append(array)
        return array

    def check(self, address: int, size: int, what: str) -> None:
        """Refuse memory that isn't allocated."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index >= 0:
            start = self._starts[index]
            if address + size <= start + self.blocks[start].size:
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

    def submit(
        self, stream: int, run: Callable[[], None], what: str, reads: Ranges = (), writes: Ranges = ()
    ) -> None:
        """Queue work, or record it.

        Args:
            stream: where.
            run: does it.
            what: for messages.
            reads: memory that is read.
            writes: memory that is written.
        """
        if not stream:
            raise CudaMisuseError(f"{what} on the default stream, which waits for all others")
        if stream not in self.queued:
            raise CudaMisuseError(f"{what} on a stream that does not exist")
        work = Work(run, what, reads, writes)
        if stream in self.capturing:
            self.capturing[stream].append(work)
            return
        for other, waiting in self.queued.items():
            for earlier in waiting if other != stream else ():
                if work.meets(earlier):
                    raise CudaMisuseError(
                        f"{what} and {earlier.what} touch the same memory on two streams, and nobody waits"
                    )
        self.queued[stream].append(work)

    def synchronize(self, stream: int) -> None:
        # CUDA runtime, cudaStreamBeginCapture: a stream that is captured can't be waited for.
        self._not_while_capturing("synchronize")
        self.synchronizes += 1
        waiting = self.queued[stream]
        try:
            while waiting:
                waiting.pop(0).run()
        except BaseException:
            waiting.clear()
            raise

    # --- copies ---

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        self.check(target, source.nbytes, "upload")
        if not source.flags.c_contiguous:
            raise CudaMisuseError("upload of an array that is not contiguous")
        self.uploads.append(source.nbytes)
        pinned = self._host_memory(source, stream)
        # A copy from ordinary memory is staged before the call returns; pinned memory is read when it runs.
        held = source if pinned else source.copy()

        def run() -> None:
            self.check(target, held.nbytes, "upload")
            ctypes.memmove(target, held.ctypes.data, held.nbytes)

        self.submit(stream, run, "upload", writes=((target, source.nbytes),))

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        self.check(source, target.nbytes, "download")
        if not target.flags.c_contiguous:
            raise CudaMisuseError("download to an array that is not contiguous")
        self._host_memory(target, stream)
        self.downloads.append(target.nbytes)
        ctypes.memset(target.ctypes.data, POISON, target.nbytes)

        def run() -> None:
            self.check(source, target.nbytes, "download")
            ctypes.memmove(target.ctypes.data, source, target.nbytes)

        self.submit(stream, run, "download", reads=((source, target.nbytes),))

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
        check_runs(target, target_pitch, source, source_pitch, width, height)
        written = (target, (height - 1) * target_pitch + width)
        read = (source, (height - 1) * source_pitch + width)

        def check() -> None:
            self.check(*written, "copy")
            self.check(*read, "copy")

        def run() -> None:
            check()
            for row in range(height):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        check()
        self.submit(stream, run, "copy", (read,), (written,))

    def clear(self, target: int, size: int, stream: int) -> None:
        self.check(target, size, "clear")

        def run() -> None:
            self.check(target, size, "clear")
            ctypes.memset(target, 0, size)

        self.submit(stream, run, "clear", writes=((target, size),))

    # --- graphs ---

    def begin_capture(self, stream: int) -> None:
        if stream in self.capturing or stream not in self.queued:
            raise CudaMisuseError("a stream is captured twice, or does not exist")
        self.capturing[stream] = []

    def end_capture(self, stream: int) -> FakeGraph:
        if stream not in self.capturing:
            raise CudaMisuseError("a capture ends that did not begin")
        self.captures += 1
        return FakeGraph(self.capturing.pop(stream))

    def launch(self, graph: FakeGraph, stream: int) -> None:
        if not graph.alive:
            raise CudaMisuseError("a graph is launched after it was destroyed")
        self.launches += 1
        recorded = tuple(graph.work)

        def run() -> None:
            for work in recorded:
                work.run()

        reads = tuple(piece for work in recorded for piece in work.reads)
        writes = tuple(piece for work in recorded for piece in work.writes)
        self.submit(stream, run, "launch", reads, writes)

    def destroy_graph(self, graph: FakeGraph) -> None:
        if not graph.alive:
            raise CudaMisuseError("a graph is destroyed twice")
        graph.alive = False
        graph.work = []

    def _host_memory(self, array: NDArray[Any], stream: int) -> bool:
        """Whether an array is pinned; others can't be copied within a capture (cudaMemcpyAsync)."""
        pinned = any(np.may_share_memory(array, known) for known in self.pinned)
        if stream in self.capturing and not pinned:
            raise CudaMisuseError("ordinary memory is copied while a graph is captured")
        return pinned

    def _not_while_capturing(self, what: str) -> None:
        if self.capturing:
            raise CudaMisuseError(f"{what} while a graph is captured")

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Begin to count copies and launches anew."""
        self.downloads, self.uploads, self.launches, self.captures = [], [], 0, 0
        yield
