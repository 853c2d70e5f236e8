# SPDX-License-Identifier: Apache-2.0
"""What callers subclass, and how TensorRT calls it (the bindings' trampolines in pyCore.cpp)."""

import sys
from typing import Any

from fake_tensorrt.binding import Callback, called
from fake_tensorrt.enums import SEVERITIES
from fake_tensorrt.state import Current


class ILogger(Callback):
    Severity = SEVERITIES

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger):
    """Keeps all that it is told, for tests."""

    def __init__(self, min_severity: Any = SEVERITIES.WARNING) -> None:
        super().__init__()
        self._min_severity = min_severity
        self._lines: list[str] = []

    @property
    def min_severity(self) -> Any:
        return self._min_severity

    @min_severity.setter
    def min_severity(self, severity: Any) -> None:
        self._min_severity = severity

    def log(self, severity: Any, msg: str) -> None:
        self._lines.append(msg)


for _name, _member in SEVERITIES.__members__.items():
    setattr(ILogger, _name, _member)


class IProgressMonitor(Callback):
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError("phase_start is pure virtual")

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError("step_complete is pure virtual")

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError("phase_finish is pure virtual")


class IProfiler(Callback):
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError("report_layer_time is pure virtual")


class IDebugListener(Callback):
    def process_debug_tensor(
        self, addr: int, location: Any, type: Any, shape: Any, name: str, stream: int
    ) -> None:
        """Addresses are integers in Python."""


class IStreamWriter(Callback):
    def write(self, data: bytes) -> int:
        raise NotImplementedError("write is pure virtual")


class IStreamReader(Callback):
    def read(self, size: int) -> Any:
        raise NotImplementedError("read is pure virtual")


class IStreamReaderV2(Callback):
    def __init__(self) -> None:
        # pyCore.cpp PyStreamReaderV2 opens libcuda.
        if Current.get().gpu is None:
            raise RuntimeError("[ERROR] Failed to open cuda driver.")
        super().__init__()

    def read(self, num_bytes: int, stream: int) -> Any:
        raise NotImplementedError("read is pure virtual")

    def seek(self, offset: int, where: Any) -> bool:
        raise NotImplementedError("seek is pure virtual")


def written(writer: IStreamWriter, content: bytes, piece: int = 1 << 20) -> bool:
    """Write all of it in pieces; False as soon as one is not taken whole."""
    for start in range(0, len(content), piece):
        part = content[start : start + piece]
        count = called(writer.write, part, otherwise=0)
        if not isinstance(count, int):
            sys.stderr.write("[ERROR] StreamWriter shall returns the written bytes count in integer.\n")
            return False
        if count != len(part):
            return False
    return True


def read_once(reader: IStreamReader, size: int) -> bytes:
    """``IStreamReader`` is asked once; what is missing is missing (10.3, PyStreamReader::read)."""
    return bytes(called(reader.read, size, otherwise=b""))[:size]


def read_all(reader: IStreamReaderV2, size: int) -> bytes:
    """``IStreamReaderV2`` is asked again for what is missing, until nothing comes (PyStreamReaderV2)."""
    found = b""
    while len(found) < size:
        piece = bytes(called(reader.read, size - len(found), 0, otherwise=b""))[: size - len(found)]
        if not piece:
            sys.stderr.write("[ERROR] User aborted the operation\n")
            break
        found += piece
    return found
