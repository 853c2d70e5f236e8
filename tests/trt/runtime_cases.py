# SPDX-License-Identifier: Apache-2.0
"""Engines that the runtime's tests open, and prompts for them: gui-tiny, built once per form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from code_rows import submit_code_rows
from fake_cuda import FakeCuda
from fake_tensorrt import H100, install
from fake_tensorrt.context import view
from fake_tensorrt.state import State
from numpy.typing import NDArray
from trt_engines import Exports, build_tensorrt_engine

from starkv.gpu import Gpu
from starkv.kernels.c_abi import KernelAbi
from starkv.kernels.c_abi_quantized import CodeRowsBuffers, CodeRowsShape
from starkv.kernels.sampling_reference import argmax_token, sample_token
from starkv.methods.rows import prompt_rows
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.positions import rope_tables, text_positions

SESSIONS, CHUNK = 4, 96
"""Of the engines that are built here."""


@dataclass(frozen=True)
class Engines:
    """Builds each form of an engine once, and opens it on cards of its own."""

    exports: Exports
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def directory(
        self, preset: str = "fp32", version: str = "10.3.0.26", gpu: Gpu = H100, **options: Any
    ) -> Path:
        """An engine directory, which no test may change."""
        name = "-".join([preset, version, *(f"{key}={value}" for key, value in sorted(options.items()))])
        out = self.folder / name / "engine"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            sizes = {"sessions": SESSIONS, "prefill_rows": CHUNK, "timing_directory": out.parent, **options}
            with pytest.MonkeyPatch.context() as patch:
                install(patch, version, FakeCuda(), gpu)
                build_tensorrt_engine(self.exports.folders[preset], out, **sizes)
        return out

    def install(self, version: str = "10.3.0.26", cuda: FakeCuda | None = None, **machine: Any) -> State:
        """Be a machine from now on."""
        return install(self.monkeypatch, version, cuda or FakeCuda(), **machine)

    def open(self, version: str = "10.3.0.26", cuda: FakeCuda | None = None, **options: Any) -> TrtEngine:
        """An engine on a new card."""
        directory = self.directory(version=version, **options)
        return open_on(self.install(version, cuda), directory)


def open_on(state: State, directory: Path, **arguments: Any) -> TrtEngine:
    """An engine on a machine's card, with the kernels' library."""
    kernels: Any = Kernels(state.cuda)
    return TrtEngine(directory, False, 1, state.cuda, **{"kernels": kernels, **arguments})


@dataclass(frozen=True)
class Kernels:
    """The kernels' library on the fake card: its reference, on a stream."""

    cuda: FakeCuda
    library: KernelAbi | None = None
    """Packs rows in its place, if there is one: the kernels built for the processor."""

    def quantize_rows(self, shape: CodeRowsShape, buffers: CodeRowsBuffers, stream: int) -> None:
        self._pack("quantize_rows", shape, buffers, stream)

    def dequantize_rows(self, shape: CodeRowsShape, buffers: CodeRowsBuffers, stream: int) -> None:
        self._pack("dequantize_rows", shape, buffers, stream)

    def _pack(self, function: str, shape: CodeRowsShape, buffers: CodeRowsBuffers, stream: int) -> None:
        if self.library is None:
            submit_code_rows(self.cuda, function == "quantize_rows", shape, buffers, stream)
            return
        launch = getattr(self.library, function)
        self.cuda.submit(stream, lambda: launch(shape, buffers), function)

    def call(self, function: str, *arguments: Any) -> None:
        logits, *draws, ids, sequences, vocabulary, stream = arguments

        def floats(address: int) -> NDArray[Any]:
            return view(address, (sequences,), np.float32, "draws")

        def run() -> None:
            rows = torch.from_numpy(view(logits, (sequences, vocabulary), np.float32, "logits").copy())
            if function == "starkv_argmax":
                found = [argmax_token(row) for row in rows]
            else:
                assert function == "starkv_sample_top_p"
                drawn = zip(*(floats(address).tolist() for address in draws), strict=True)
                found = [sample_token(row, *each) for row, each in zip(rows, drawn, strict=True)]
            view(ids, (sequences,), np.int32, "ids")[:] = found

        self.cuda.submit(stream, run, function)


def tokens(count: int, seed: int = 0) -> list[int]:
    """Ids of a prompt without images."""
    return [int(token) for token in np.random.default_rng(seed).integers(8, 400, count)]


def rope(engine: Engine, rows: int, start: int = 0) -> Rope:
    return Rope(*rope_tables(text_positions(rows, start).values, engine.manifest.text))


def prefilled(engine: Engine, ids: list[int]) -> tuple[Arena, NDArray[np.float32]]:
    """An arena with a prompt, and its last logits."""
    arena = engine.new_arena(len(ids))
    return arena, engine.prefill(arena, engine.embed(ids), rope(engine, len(ids)))


def admit(engine: Engine, pool: Pool, ids: list[int], policy: KvPolicy | None = None) -> int:
    """Prefill a prompt and move it into a pool; its handle."""
    arena, _ = prefilled(engine, ids)
    handle = pool.acquire()
    engine.compress(arena, pool, handle, prompt_rows(len(ids), [], []), policy or KvPolicy())
    return handle


def batch_rope(engine: Engine, positions: list[int]) -> Rope:
    tables = [rope(engine, 1, position) for position in positions]
    return Rope(np.concatenate([t.cos for t in tables]), np.concatenate([t.sin for t in tables]))


def step(engine: Engine, pool: Pool, ids: list[int], position: int) -> NDArray[np.float32]:
    """Logits behind one more token per sequence."""
    return engine.decode(pool, engine.embed(ids), batch_rope(engine, [position] * len(ids)))
