# SPDX-License-Identifier: Apache-2.0
"""Decode steps in ONNX Runtime with everything bound once."""

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.manifest import Manifest
from starkv.runtime.engines.base import Floats, Rope
from starkv.runtime.engines.ort_binding import CacheBinding, bind_array
from starkv.runtime.kv.buffers import Pool


class DecodeStep:
    """A decode step of one pool and batch size: everything is bound once and run again and again."""

    def __init__(self, session: Any, pool: Pool, manifest: Manifest, cache: CacheBinding) -> None:
        """Bind everything.

        Args:
            session: of the decoder.
            pool: its sequences in use are decoded.
            manifest: sizes.
            cache: binds the pool's rows.
        """
        text, batch = manifest.text, pool.active
        self._session, self._batch, self._cache = session, batch, cache
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
        cache.bind(self._binding, pool.kv, batch)
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
        if not self._cache.covers(pool.kv, self._batch):
            self._cache.bind(self._binding, pool.kv, self._batch)
        lengths = self._cache.append_lengths(pool.kv, self._batch)
        self._embeds[:, 0], self._cos[:], self._sin[:] = embeds, rope.cos, rope.sin
        # The one new row of each sequence comes behind its valid ones.
        self._last_rows[:] = lengths.reshape(-1)
        self._longest[0] = self._last_rows.max() + 1
        self._session.run_with_iobinding(self._binding)
        self._cache.finish_step(pool.kv, self._batch)
        logits: Floats = self._logits.copy()
        return logits
