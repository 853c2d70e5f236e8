# SPDX-License-Identifier: Apache-2.0
"""Memory that TensorRT hands out: a buffer, and nothing else."""

from typing import Any, NoReturn

_OPEN = ("nbytes", "dtype", "__class__", "__doc__", "__dict__")


class IHostMemory(bytearray):
    """Can be written and copied as a buffer is; the bindings' class is neither bytes nor has a length."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in _OPEN:
            return super().__getattribute__(name)
        raise AttributeError(f"'tensorrt.IHostMemory' object has no attribute '{name}'")

    @property
    def nbytes(self) -> int:
        return memoryview(self).nbytes

    def __bool__(self) -> bool:
        return True

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("'tensorrt.IHostMemory' object does not support this")

    __len__ = __getitem__ = __setitem__ = __iter__ = __add__ = __contains__ = _refuse  # type: ignore[assignment]
