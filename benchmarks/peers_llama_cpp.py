# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as a system of ``peers.py``, through llama-cpp-python's binding of its C API."""

import ctypes
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from peers_llama_state import lengthen_state

_BATCH = 512
"""Rows of one prefill call, llama-bench's ``-b`` and ``-ub``."""
_SEED_ROWS = 64
"""Rows that are really prefilled where a long cache is filled with copies of them."""
_ROOM = 256


class LlamaCppSystem:
    """A GGUF file: flash attention on, cache in f16, weights mapped and repacked for the processor.

    A long cache is filled through ``llama_state_seq_set_data`` with copies of a few prefilled rows: the time
    of decoding depends on how many rows there are, not on their values.
    """

    def __init__(self, model: Path, threads: int, max_rows: int) -> None:
        started = time.perf_counter()
        self._llama = llama_cpp.Llama(
            str(model),
            n_ctx=max_rows + _ROOM,
            n_batch=_BATCH,
            n_ubatch=_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            use_mmap=True,
            verbose=True,
        )
        self._load_seconds = time.perf_counter() - started
        self._context = self._llama._ctx.ctx
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = self._llama.n_vocab()
        self._threads = threads
        self._random = np.random.default_rng(0)

    def describe(self) -> dict[str, Any]:
        flags = llama_cpp.llama_print_system_info().decode()
        return {
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "threads": self._threads,
            "kv_dtype": "float16",
            "flash_attention": True,
            "batch": _BATCH,
            "processor_features": re.findall(r"(\w+) = 1", flags),
            "load_seconds": self._load_seconds,
        }

    def decode(self, rows: int, position: int, tokens: int) -> float:
        if position != rows:
            raise ValueError("llama.cpp's rows are its positions here")
        self._cache(rows)
        token = 0
        started = time.perf_counter()
        for _ in range(tokens):
            self._evaluate([token])
            token = int(self._last_logits().argmax())
        return time.perf_counter() - started

    def prefill(self, tokens: int) -> float:
        llama_cpp.llama_memory_clear(self._memory, False)
        ids = self._random.integers(0, self._vocab, tokens).tolist()
        started = time.perf_counter()
        self._evaluate(ids)
        self._last_logits().argmax()
        return time.perf_counter() - started

    def logits(self, tokens: list[int], path: str) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        self._evaluate(tokens)
        self._last_logits().astype(np.float32).tofile(path)

    def real_decode(self, rows: int, tokens: int) -> float:
        """As ``decode``, but behind really prefilled rows: to check that it makes no difference."""
        llama_cpp.llama_memory_clear(self._memory, False)
        self._evaluate(self._random.integers(0, self._vocab, rows).tolist())
        return self.decode(rows, rows, tokens)

    def _cache(self, rows: int) -> None:
        """Have exactly ``rows`` valid rows; those that are there are used."""
        cached = llama_cpp.llama_memory_seq_pos_max(self._memory, 0) + 1
        if cached < rows:
            self._fill(rows)
        elif cached > rows:
            llama_cpp.llama_memory_seq_rm(self._memory, 0, rows, -1)
        cached = llama_cpp.llama_memory_seq_pos_max(self._memory, 0) + 1
        if cached != rows:
            raise RuntimeError(f"llama.cpp holds {cached} rows instead of {rows}")

    def _fill(self, rows: int) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        self._evaluate(self._random.integers(0, self._vocab, min(rows, _SEED_ROWS)).tolist())
        size = llama_cpp.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self._context, state, size, 0)
        longer = lengthen_state(bytes(state), rows)
        source = (ctypes.c_uint8 * len(longer)).from_buffer(longer)
        llama_cpp.llama_memory_clear(self._memory, False)
        if llama_cpp.llama_state_seq_set_data(self._context, source, len(longer), 0) != len(longer):
            raise RuntimeError(f"llama.cpp refused a state of {rows} rows")

    def _evaluate(self, tokens: list[int]) -> None:
        """Append tokens behind the cached rows; logits are made for the last one of each call only."""
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            array = (llama_cpp.llama_token * len(part))(*part)
            status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(part)))
            if status:
                raise RuntimeError(f"llama_decode returned {status}")

    def _last_logits(self) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab,))
