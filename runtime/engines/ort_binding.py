# SPDX-License-Identifier: Apache-2.0
"""How numpy arrays, and caches made of them, are bound to ONNX Runtime's decoder."""

from abc import ABC, abstractmethod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from starkv.runtime.kv.buffers import HostKv, KvStore, host_buffers

ONNX_BFLOAT16 = 16


def bind_array(bind: Any, name: str, array: NDArray[Any]) -> None:
    """Bind a contiguous numpy array by address. The caller keeps it alive."""
    # numpy has no bfloat16 that ONNX Runtime knows, so it is named by ONNX's number.
    dtype = ONNX_BFLOAT16 if array.dtype == ml_dtypes.bfloat16 else array.dtype
    bind(name, "cpu", 0, dtype, array.shape, array.ctypes.data)


def bind_in_place(binding: Any, kind: str, layer: int, array: NDArray[Any]) -> None:
    """Bind an array as ``past_{kind}.{layer}``, and as the ``present`` that it becomes."""
    bind_array(binding.bind_input, f"past_{kind}.{layer}", array)
    bind_array(binding.bind_output, f"present_{kind}.{layer}", array)


def bind_cache(binding: Any, kv: HostKv, batch: int, suffix: str = "") -> None:
    """Bind the first slots of a cache as past and present; a layer's are contiguous, so a batch is a view."""
    for layer in range(kv.shape[0]):
        for kind, buffer in (("k", kv.keys), ("v", kv.values)):
            bind_in_place(binding, f"{kind}{suffix}", layer, buffer[layer, :batch])


class CacheBinding(ABC):
    """Binds a kind of cache, and knows what a step appends to."""

    @abstractmethod
    def bind(self, binding: Any, kv: KvStore, batch: int) -> None:
        """Bind the first ``batch`` slots."""

    def covers(self, kv: KvStore, batch: int) -> bool:
        """Whether what is bound still serves the rows."""
        return True

    def append_lengths(self, kv: KvStore, batch: int) -> NDArray[np.int32]:
        """``[L, B]``: rows that the new ones of a step come behind, in what the step appends to."""
        return kv.lengths[:, :batch]

    def finish_step(self, kv: KvStore, batch: int) -> None:
        """Count the row that a step appended to each sequence."""
        kv.lengths[:, :batch] += 1


class FloatCache(CacheBinding):
    """A cache as the decoder computes it."""

    def bind(self, binding: Any, kv: KvStore, batch: int) -> None:
        bind_cache(binding, host_buffers(kv), batch)
