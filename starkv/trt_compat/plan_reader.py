# SPDX-License-Identifier: Apache-2.0
"""Plans come from their file in pieces: Python never holds gigabytes of them."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv.errors import EngineError
from starkv.trt_compat.module import TensorRT
from starkv.trt_compat.version import STREAM_READER_V2

if TYPE_CHECKING:
    import tensorrt as trt

_PIECE = 64 << 20
"""Most bytes that are read at once."""


@contextmanager
def plan_reader(tensorrt: TensorRT, path: Path) -> "Iterator[trt.IStreamReaderV2]":
    """What ``deserialize_cuda_engine`` reads a plan from.

    Raises:
        EngineError: the file is missing, empty or can't be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise EngineError(f"{path} can't be read ({error.strerror}); build the engine again") from None
    with file:
        if not path.stat().st_size:
            raise EngineError(f"{path} is empty; build the engine again")
        if tensorrt.version < STREAM_READER_V2:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield _make_reader(tensorrt, content)
        else:
            yield _make_reader_v2(tensorrt, file)


def _make_reader_v2(tensorrt: TensorRT, file: BufferedReader) -> "trt.IStreamReaderV2":
    module = tensorrt.module
    origins = {module.SeekPosition.SET: 0, module.SeekPosition.CUR: 1, module.SeekPosition.END: 2}

    class Reader(module.IStreamReaderV2):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            # TensorRT asks again until it has all.
            return file.read(min(num_bytes, _PIECE))

        def seek(self, offset: int, where: Any) -> bool:
            file.seek(offset, origins[where])
            return True

    return Reader()


def _make_reader(tensorrt: TensorRT, content: mmap.mmap) -> Any:
    module = tensorrt.module

    class Reader(module.IStreamReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IStreamReader.__init__(self)

        def read(self, size: int) -> memoryview:
            # All that is asked for at once: a shorter answer ends the plan. TensorRT copies it (pyCore.cpp),
            # and the system takes the file's pages back where memory is short.
            start = content.tell()
            content.seek(min(start + size, len(content)))
            return memoryview(content)[start : start + size]

    return Reader()
