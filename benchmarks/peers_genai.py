# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime GenAI as a system of ``peers.py``."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

_CHUNK = 512
"""Rows of one prefill call where a long cache is filled; each measured prefill is one call."""
_ROOM = 256


class GenAISystem:
    """A folder of onnxruntime-genai's model builder.

    There is no way to say that rows are cached, so each cached length has a generator that really prefilled
    so many tokens, once; before a measurement it is rewound to that length.
    """

    def __init__(self, model: Path, threads: int, max_rows: int) -> None:
        started = time.perf_counter()
        config = og.Config(str(model))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self._load_seconds = time.perf_counter() - started
        self._threads = threads
        self._vocab = json.loads((model / "genai_config.json").read_text())["model"]["vocab_size"]
        self._random = np.random.default_rng(0)
        self._generators: dict[int, Any] = {}

    def describe(self) -> dict[str, Any]:
        return {
            "versions": {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")},
            "threads": self._threads,
            "kv_dtype": "float32",
            "load_seconds": self._load_seconds,
        }

    def decode(self, rows: int, position: int, tokens: int) -> float:
        if position != rows:
            raise ValueError("a generator has no cache whose rows are no positions")
        generator = self._generators.get(rows)
        if generator is None:
            generator = self._generators[rows] = self._generator(rows + _ROOM)
            ids = self._ids(rows)
            for start in range(0, rows, _CHUNK):
                generator.append_tokens(ids[:, start : start + _CHUNK])
        generator.rewind_to(rows)
        # The first choice needs no step of its own: its logits come from the appended token.
        generator.append_tokens(self._ids(1))
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return time.perf_counter() - started

    def prefill(self, tokens: int) -> float:
        generator, ids = self._generator(tokens + 64), self._ids(tokens)
        started = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        return time.perf_counter() - started

    def logits(self, tokens: list[int], path: str) -> None:
        generator = self._generator(len(tokens) + 64)
        generator.append_tokens(np.array([tokens], np.int32))
        generator.get_logits().reshape(-1, self._vocab)[-1].astype(np.float32).tofile(path)

    def _generator(self, max_rows: int) -> Any:
        params = og.GeneratorParams(self._model)
        # A least length as large as the greatest keeps a random model from ending its text.
        params.set_search_options(max_length=max_rows, min_length=max_rows, do_sample=False)
        return og.Generator(self._model, params)

    def _ids(self, count: int) -> np.ndarray:
        return self._random.integers(0, self._vocab, (1, count), dtype=np.int32)
