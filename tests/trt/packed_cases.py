# SPDX-License-Identifier: Apache-2.0
"""gui-tiny as TensorRT engines that keep codes, each built once, and prompts for them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import install
from numpy.typing import NDArray
from packed_engines import calibration_prompts
from runtime_cases import CHUNK, SESSIONS, Engines, open_on, tokens
from trt_engines import plugin_library

from starkv.calibration.kv_packing import quantized_packing
from starkv.calibration.kv_statistics import KvStatistics, gather_statistics
from starkv.export.build.pack import describe_packing, write_packing
from starkv.export.build.trt import build_trt_engine
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.export.lower.attention_weights import projection_biases
from starkv.kv_packing.options import PackingOptions
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import Manifest
from starkv.methods.rows import prompt_rows
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

LENGTH = 130
PROMPT = prompt_rows(LENGTH, [(20, 84)], [(8, 8)], range(8))
"""A screenshot of 8x8 tokens in 130 rows."""


@dataclass
class PackedEngines:
    """Engines that keep codes; scales are measured on the processor, which is quicker than the fakes. Of two
    that are open, only the one that was opened last runs."""

    engines: Engines
    host: OrtEngine

    @cached_property
    def statistics(self) -> KvStatistics:
        directory = self.engines.exports.processor_engine
        tokenizer = ChatTokenizer.from_directory(directory)
        return gather_statistics(self.host, tokenizer, self.biases, calibration_prompts())

    @cached_property
    def biases(self) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        return projection_biases(ir.load(self.exported / "decoder.onnx"))

    @property
    def exported(self) -> Path:
        return self.engines.exports.folders["fp32"]

    def packing(self, bits: Bits) -> QuantizedPacking:
        return quantized_packing(bits, self.statistics, self.biases)

    def directory(self, bits: Bits, sessions: int = SESSIONS) -> Path:
        """An engine directory, which no test may change."""
        out = self.engines.folder / f"int{bits}-{sessions}" / "engine"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            options = TrtBuildOptions(
                sessions=sessions,
                prefill_rows=CHUNK,
                timing_directory=out.parent,
                plugins=plugin_library(out.parent),
                kv_bits=bits,
            )

            def finish(engine: Path, manifest: Manifest) -> Manifest:
                asked = PackingOptions.of_codes(bits)
                described = describe_packing(self.packing(bits), asked, self.statistics.tokens)
                return write_packing(engine, manifest, self.packing(bits), described)

            with pytest.MonkeyPatch.context() as patch:
                install(patch, cuda=FakeCuda())
                build_trt_engine(self.exported, out, options, finish=finish)
        return out

    def open(self, bits: Bits, cuda: FakeCuda | None = None, **arguments: Any) -> TrtEngine:
        """An engine on a new card."""
        directory = self.directory(bits)
        return open_on(self.engines.install(cuda=cuda), directory, **arguments)


def placed(rows: int, engine: Engine, start: int = 0) -> Rope:
    """Tables of positions whose t, h and w differ."""
    row = np.arange(start, start + rows)
    return Rope.at(np.stack([row, row // 3 + 5, row % 7 + 2]), engine.manifest.text)


def behind(engine: Engine, position: int, batch: int = 1) -> Rope:
    """Tables of one new token per sequence."""
    return Rope.at(np.full((3, batch, 1), position), engine.manifest.text)


def prefilled(engine: Engine, seed: int = 0, rows: int = LENGTH) -> Arena:
    """An arena with a prompt."""
    arena = engine.new_arena(rows)
    engine.prefill(arena, engine.embed(tokens(rows, seed)), placed(rows, engine))
    return arena


def admitted(engine: Engine, pool: Pool, policy: KvPolicy, seed: int = 0) -> int:
    """Prefill the prompt and move what is kept into the pool; its handle."""
    handle = pool.acquire()
    engine.compress(prefilled(engine, seed), pool, handle, PROMPT, policy)
    return handle


def pool_with(engine: Engine, policy: KvPolicy, packed: bool, seeds: tuple[int, ...] = (0,)) -> Pool:
    pool = engine.new_pool(len(seeds), LENGTH + 40, policy.method, packed)
    for seed in seeds:
        admitted(engine, pool, policy, seed)
    return pool


def decoded(engine: Engine, pool: Pool, steps: int, start: int = LENGTH) -> NDArray[np.float32]:
    """Logits ``[steps, B, vocab]`` behind what the pool holds."""
    logits = []
    for step in range(steps):
        embeds = engine.embed(tokens(pool.active, 50 + step))
        logits.append(engine.decode(pool, embeds, behind(engine, start + step, pool.active)))
    return np.stack(logits)


def relative(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Error relative to how far logits lie apart."""
    spread = expected - expected.mean(-1, keepdims=True)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(spread))
