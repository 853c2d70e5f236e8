# SPDX-License-Identifier: Apache-2.0
"""Decode steps in ONNX Runtime with everything bound once, and how numpy arrays are bound."""

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.manifest import Manifest
from starkv.runtime.engines.base import Floats, Rope
from starkv.runtime.kv.buffers import KvBuffers, Pool


class DecodeStep:
    """A decode step of one pool and batch size: everything is bound once and run again and again."""

    def __init__(self, session: Any, pool: Pool, manifest: Manifest) -> None:
        text, batch = manifest.text, pool.active
        self._session, self._batch = session, batch
        # Weak, or the engine would hold the memory of a pool that nobody uses any more.
        self._pool = weakref.ref(pool)
        self._embeds = np.empty((batch, 1, text.hidden), np.float32)
        self._cos = np.empty((batch, 1, text.head_dim // 2), np.float32)
        self._sin = np.empty_like(self._cos)
        self._last_rows = np.empty(text.layers * batch, np.int32)
        self._longest = np.empty(1, np.int32)
        self._logits = np.empty((batch, text.vocab), np.float32)
        self._last = np.zeros(batch, np.int32)
        self._binding = session.io_binding()
        bind_cache(self._binding, pool.host_kv, batch)
        inputs: dict[str, NDArray[Any]] = {
            "inputs_embeds": self._embeds,
            "rope_cos": self._cos,
            "rope_sin": self._sin,
            "last_rows": self._last_rows,
            "longest": self._longest,
            "last_index": self._last,
        }
        for name, array in inputs.items():
            bind_array(self._binding.bind_input, name, array)
        bind_array(self._binding.bind_output, "logits", self._logits)

    def fits(self, pool: Pool) -> bool:
        return self._pool() is pool and self._batch == pool.active

    def run(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        lengths = pool.kv.lengths[:, : self._batch]
        self._embeds[:, 0], self._cos[:], self._sin[:] = embeds, rope.cos, rope.sin
        # The one new row of each sequence comes behind its valid ones.
        self._last_rows[:] = lengths.reshape(-1)
        self._longest[0] = self._last_rows.max() + 1
        self._session.run_with_iobinding(self._binding)
        lengths += 1
        logits: Floats = self._logits.copy()
        return logits


def bind_array(bind: Any, name: str, array: NDArray[Any]) -> None:
    """Bind a contiguous numpy array by address. The caller keeps it alive."""
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def bind_cache(binding: Any, kv: KvBuffers, batch: int) -> None:
    for layer in range(kv.keys.shape[0]):
        for kind, buffer in (("k", kv.keys), ("v", kv.values)):
            # The first slots of a layer are contiguous: a batch is a view.
            view = buffer[layer, :batch]
            bind_array(binding.bind_input, f"past_{kind}.{layer}", view)
            bind_array(binding.bind_output, f"present_{kind}.{layer}", view)
