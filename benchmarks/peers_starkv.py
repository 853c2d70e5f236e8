# SPDX-License-Identifier: Apache-2.0
"""starkv as a system of ``peers.py``."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import starkv
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.kv.buffers import KvBuffers, Pool
from starkv.runtime.preprocess.positions import rope_tables, text_positions

_ROOM = 256
"""Rows of a slot beside those that are cached before; more than are decoded at once."""


class StarkvSystem:
    """An engine directory. Each cached length has a slot of its own, as large as a session's would be."""

    def __init__(self, model: Path, threads: int, max_rows: int) -> None:
        started = time.perf_counter()
        self._engine = OrtEngine(model, verify=False, threads=threads)
        self._load_seconds = time.perf_counter() - started
        self._pools: dict[int, Pool] = {}
        self._random = np.random.default_rng(0)

    def describe(self) -> dict[str, Any]:
        manifest, info = self._engine.manifest, self._engine.info
        return {
            "versions": {"starkv": starkv.__version__, "onnxruntime": onnxruntime.__version__},
            "threads": info.threads,
            "kv_dtype": info.kv_dtype,
            "loaded_form": info.loaded_form,
            "quantization": manifest.quantization.model_dump(),
            "load_seconds": self._load_seconds,
        }

    def decode(self, rows: int, position: int, tokens: int) -> float:
        pool = self._pools.get(rows)
        if pool is None:
            pool = self._pools[rows] = self._engine.new_pool(1, rows + _ROOM)
            pool.acquire()
            self._fill(pool.kv, rows)
        pool.kv.lengths[:] = rows
        token = 0
        started = time.perf_counter()
        for step in range(tokens):
            rope = self._rope(1, position + step)
            token = int(self._engine.decode(pool, self._engine.embed([token]), rope)[0].argmax())
        return time.perf_counter() - started

    def prefill(self, tokens: int) -> float:
        arena = self._engine.new_arena(tokens)
        # Memory that was never written costs page faults, which a session meets in its first turn only.
        self._fill(arena.kv, tokens)
        ids = self._random.integers(0, self._engine.manifest.text.vocab, tokens).tolist()
        started = time.perf_counter()
        self._engine.prefill(arena, self._engine.embed(ids), self._rope(tokens, 0)).argmax()
        return time.perf_counter() - started

    def logits(self, tokens: list[int], path: str, stretch: float = 1.0) -> None:
        """As the protocol says; ``stretch`` scales positions, to see whether they matter."""
        positions = text_positions(len(tokens), 0).values
        rope = Rope(*rope_tables(np.rint(positions * stretch).astype(positions.dtype), self._text))
        arena = self._engine.new_arena(len(tokens))
        self._engine.prefill(arena, self._engine.embed(tokens), rope).astype(np.float32).tofile(path)

    @property
    def _text(self) -> Any:
        return self._engine.manifest.text

    def _rope(self, rows: int, start: int) -> Rope:
        return Rope(*rope_tables(text_positions(rows, start).values, self._text))

    def _fill(self, kv: KvBuffers, rows: int) -> None:
        """Write random keys and values: pages that nobody wrote would all be read from one page of zeros."""
        block = self._random.standard_normal((64, self._text.head_dim), np.float32)
        tiled = np.tile(block, (-(-rows // 64), 1))[:rows]
        for buffer in (kv.keys, kv.values):
            buffer[:, :, :, :rows] = tiled
