# SPDX-License-Identifier: Apache-2.0
"""The module ``cuda.bindings.runtime`` by script: it notes what is called, and answers what a test wants."""

from types import SimpleNamespace
from typing import Any

import numpy as np

SUCCESS, OUT_OF_MEMORY, OLD_DRIVER, FAILED = 0, 2, 35, 719
TEXTS = {OUT_OF_MEMORY: b"out of memory", OLD_DRIVER: b"driver is insufficient", FAILED: b"launch failure"}
STREAM, FREE, TOTAL = 77, 3 << 20, 10 << 20


CONSTANTS: dict[str, Any] = {
    "cudaStreamNonBlocking": 1,
    "cudaError_t": {"cudaSuccess": SUCCESS},
    "cudaMemcpyKind": {
        "cudaMemcpyHostToDevice": 1,
        "cudaMemcpyDeviceToHost": 2,
        "cudaMemcpyDeviceToDevice": 3,
    },
    "cudaStreamCaptureMode": {"cudaStreamCaptureModeThreadLocal": 1},
    "cudaDeviceAttr": {"cudaDevAttrIntegrated": 18},
}


class Script:
    """The module ``cuda.bindings.runtime``: notes calls, and answers what a test wants."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {
            "cudaGetDeviceCount": 1,
            "cudaMemGetInfo": (FREE, TOTAL),
            "cudaDeviceGetAttribute": 0,
            "cudaStreamCreateWithFlags": STREAM,
            "cudaStreamEndCapture": "graph",
            "cudaGraphInstantiate": "executable",
            "cudaRuntimeGetVersion": 13050,
            "cudaDriverGetVersion": 12060,
            "cudaGetErrorString": TEXTS.get,
            "cudaMallocHost": self._pinned,
            "cudaMalloc": 4096,
        }
        self.failures: dict[str, int | Exception] = {}
        self.held: dict[int, np.ndarray[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in CONSTANTS:
            value = CONSTANTS[name]
            return SimpleNamespace(**value) if isinstance(value, dict) else value

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name != "cudaGetErrorString":
                self.calls.append((name, *arguments))
            failure = self.failures.get(name, SUCCESS)
            if isinstance(failure, Exception):
                raise failure
            if failure:
                return (failure, None)
            answer = self.answers.get(name, ())
            answer = answer(*arguments) if callable(answer) else answer
            return (SUCCESS, *(answer if isinstance(answer, tuple) else (answer,)))

        return call

    def _pinned(self, size: int) -> int:
        array = np.zeros(size, np.uint8)
        self.held[array.ctypes.data] = array
        return array.ctypes.data

    @property
    def last(self) -> tuple[Any, ...]:
        return self.calls[-1]

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]
