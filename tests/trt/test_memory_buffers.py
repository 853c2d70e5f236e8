# SPDX-License-Identifier: Apache-2.0
"""The memory plan against what ``TrtEngine`` allocates, byte for byte.

TensorRT's plans and their runs are stand-ins: only sizes count here.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from fake_cuda import FakeCuda
from fake_tensorrt import install
from test_deployment import BUILT
from trt_engines import SCREEN, Exports, agent_of, open_tensorrt_engine

from starkv.export.build.trt_vision_bounds import VisionSizes
from starkv.gpu import Gpu
from starkv.manifest import MANIFEST_NAME, Manifest, read_manifest, seal
from starkv.memory_plan.buffers import (
    compress_bytes,
    decode_bytes,
    prefill_bytes,
    step_bytes,
    vision_bytes,
)
from starkv.memory_plan.plan import CONTEXT_BYTES, PlannedModel, Wanted, plan_memory
from starkv.memory_plan.rows import cache_bytes, slot_rows
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.rows import prompt_rows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.engines import trt
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.engines.trt_opening import Machine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import ImageInputs
from starkv.trt_compat.module import TensorRT
from starkv.trt_compat.version import OLDEST

PROMPT, NEW, CHUNK, SESSIONS, WINDOW = 300, 20, 128, 3, 4
SCRATCH = {
    "vision": 3_000_000,
    "decoder.prefill": 7_000_001,
    "decoder.decode": 2_000_000,
    "compress": 1_000_000,
}


class StandInPlan:
    """A plan that only knows the memory of its profiles."""

    def __init__(self, *scratch: int) -> None:
        self.profiles, self._scratch = len(scratch), scratch

    def scratch_bytes(self, profile: int) -> int:
        return self._scratch[profile]


class StandInRun:
    """Takes every address and computes nothing, but that compression keeps rows."""

    cuda: FakeCuda
    layers: int

    def __init__(
        self, plan: StandInPlan, profile: int, scratch: int, size: int, stream: int, aliases: Any
    ) -> None:
        self._stream, self._addresses = stream, dict[str, int]()
        self.cuda.check(scratch, plan.scratch_bytes(profile), "scratch")
        assert size >= plan.scratch_bytes(profile)

    def bind(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        self._addresses[name] = address

    def enqueue(self) -> None:
        if "new_len" in self._addresses:
            kept = np.full((self.layers, 1), 16, np.int32)
            self.cuda.upload(self._addresses["new_len"], kept, self._stream)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def engine(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> TrtEngine:
    directory = tmp_path / "engine"
    directory.mkdir()
    shutil.copy(tiny.engine / "embedding.safetensors", directory)
    built = BUILT.model_copy(update={"prefill_rows": CHUNK, "sessions": SESSIONS, "scratch_bytes": SCRATCH})
    changes = {"backend": "trt", "compute_dtype": "bfloat16", "tensorrt": built}
    manifest = read_manifest(tiny.engine).model_copy(update=changes)
    (directory / MANIFEST_NAME).write_text(seal(manifest))
    plans: Any = {
        "vision": StandInPlan(SCRATCH["vision"]),
        "decoder": StandInPlan(SCRATCH["decoder.prefill"], SCRATCH["decoder.decode"]),
        "compress": StandInPlan(SCRATCH["compress"]),
    }
    tensorrt = TensorRT(None, OLDEST, built.version)
    machine = Machine(Gpu("Orin", (8, 7), 1 << 30), tensorrt, built)
    monkeypatch.setattr(trt, "find_machine", lambda *_: machine)
    monkeypatch.setattr(trt, "open_plans", lambda *_: plans)
    run = type("Run", (StandInRun,), {"cuda": cuda, "layers": manifest.text.layers})
    monkeypatch.setattr(trt, "Execution", run)
    return TrtEngine(directory, verify=False, cuda=cuda)


class Meter:
    """Bytes that a card came to hold beside what it held before."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self._before = cuda, cuda.in_use
        cuda.peak = cuda.in_use

    @property
    def held(self) -> int:
        return self._cuda.in_use - self._before

    @property
    def peak(self) -> int:
        return self._cuda.peak - self._before


def picture(rows: int, columns: int) -> ImageInputs:
    """An image of so many merged patches."""
    pixels = np.zeros((4 * rows * columns, 1176), np.float32)
    return ImageInputs(pixels, 2 * rows, 2 * columns, (rows, columns), 28 * rows, 28 * columns, 1, 1)


def rope(rows: int, manifest: Manifest, sequences: int = 1) -> Rope:
    table = np.zeros((sequences, rows, manifest.text.head_dim // 2), np.float32)
    return Rope(table, table)


def test_scratch_is_one_block(engine: TrtEngine, cuda: FakeCuda) -> None:
    assert cuda.in_use == max(SCRATCH.values())


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 20)])
def test_an_image(engine: TrtEngine, cuda: FakeCuda, grid: tuple[int, int]) -> None:
    meter, manifest = Meter(cuda), engine.manifest
    engine.encode_image(picture(*grid))
    sizes = VisionSizes.of_grid(*grid, manifest.vision)
    assert meter.peak == vision_bytes(manifest.vision, manifest.text.hidden, sizes)
    assert meter.held == 0


@pytest.mark.parametrize("rows", [5, CHUNK, CHUNK + 1, PROMPT])
def test_an_arena_and_its_prefill(engine: TrtEngine, cuda: FakeCuda, rows: int) -> None:
    meter, manifest = Meter(cuda), engine.manifest
    arena = engine.new_arena(rows)
    assert meter.held == cache_bytes(manifest.text, 1, rows)
    embeds = np.zeros((rows, manifest.text.hidden), np.float32)
    engine.prefill(arena, embeds, rope(rows, manifest))
    calls = prefill_bytes(manifest.text, manifest.observation_window, rows, CHUNK)
    assert meter.peak == cache_bytes(manifest.text, 1, rows) + calls
    del arena
    assert meter.held == 0


@pytest.mark.parametrize("sessions", [1, SESSIONS])
def test_a_pool_and_its_steps(engine: TrtEngine, cuda: FakeCuda, sessions: int) -> None:
    meter, manifest = Meter(cuda), engine.manifest
    pool = engine.new_pool(sessions, 100)
    capacity = slot_rows(100, BUILT.cache_rows)
    assert pool.kv.capacity == capacity
    slots = cache_bytes(manifest.text, sessions, capacity)
    assert meter.held == slots
    for used in range(1, sessions + 1):
        pool.acquire()
        for _ in range(3):
            embeds = np.zeros((used, manifest.text.hidden), np.float32)
            engine.decode(pool, embeds, rope(1, manifest, used))
        assert meter.held == slots + sum(step_bytes(manifest.text, count) for count in range(1, used + 1))
    assert meter.held == meter.peak == slots + decode_bytes(manifest.text, sessions)


def compress(engine: TrtEngine, arena: Arena, pool: Pool, budget: float, grid: tuple[int, int]) -> None:
    """Compress a prompt of one screenshot; its scores are not numbers, since nothing computed them."""
    screen = [(100, 100 + grid[0] * grid[1])]
    policy = KvPolicy(STAR_KV, Budget(budget), StarKVConfig(window=WINDOW))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("starkv.runtime.engines.ort_compress.check_numbers", lambda scores: None)
        engine.compress(arena, pool, pool.handles[0], prompt_rows(PROMPT, screen, [grid]), policy)


@pytest.mark.parametrize("budget", [1.0, 0.2])
def test_a_compression(engine: TrtEngine, cuda: FakeCuda, budget: float) -> None:
    text, window = engine.manifest.text, engine.manifest.observation_window
    arena, pool = engine.new_arena(PROMPT), engine.new_pool(SESSIONS, PROMPT + NEW, STAR_KV)
    pool.acquire()
    meter = Meter(cuda)
    engine.prefill(arena, np.zeros((PROMPT, text.hidden), np.float32), rope(PROMPT, engine.manifest))
    cuda.peak = cuda.in_use
    compress(engine, arena, pool, budget, (8, 8))
    windows, capacities = (window, WINDOW), (arena.kv.capacity, pool.kv.capacity)
    assert meter.peak == compress_bytes(text, windows, capacities[0], SESSIONS, capacities[1], 64)


def test_the_plan_is_what_the_card_holds_at_most(
    engine: TrtEngine, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sessions decode, and the largest image and prompt come in."""
    manifest, text = engine.manifest, engine.manifest.text
    # No image has the most of all sizes that the plan reckons with.
    image = VisionSizes.of_grid(8, 8, manifest.vision)
    monkeypatch.setattr("starkv.memory_plan.plan.most_sizes", lambda *_: image)
    wanted = Wanted(PROMPT, NEW, CHUNK, (1.0,), (SESSIONS,))
    plan = plan_memory(PlannedModel.of(manifest), wanted, manifest.tensorrt)
    (scenario,) = plan.scenarios
    pool = engine.new_pool(SESSIONS, scenario.kept_rows + NEW, STAR_KV)
    for used in range(1, SESSIONS + 1):
        pool.acquire()
        engine.decode(pool, np.zeros((used, text.hidden), np.float32), rope(1, manifest, used))
    arena = engine.new_arena(PROMPT)
    engine.encode_image(picture(8, 8))
    engine.prefill(arena, np.zeros((PROMPT, text.hidden), np.float32), rope(PROMPT, manifest))
    compress(engine, arena, pool, 1.0, (8, 8))
    assert cuda.peak == scenario.total - plan.weights.device - CONTEXT_BYTES


def test_a_reply_of_gui_tiny_stays_within_the_plan(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built and run on the fakes, from a screenshot to a click."""
    state = install(monkeypatch, cuda=FakeCuda())
    engine = open_tensorrt_engine(state, exports.folders["fp32"], tmp_path / "engine")
    manifest = engine.manifest
    reply = agent_of(engine).act(SCREEN, "Click the red star.", kv_policy=KvPolicy(STAR_KV, Budget(1.0)))
    rows, new = reply.timings.kv_tokens_full, SamplingParameters().max_new_tokens
    side = manifest.vision.patch_size * manifest.vision.spatial_merge_size
    image = VisionSizes.of_grid(reply.resized.height // side, reply.resized.width // side, manifest.vision)
    monkeypatch.setattr("starkv.memory_plan.plan.most_sizes", lambda *_: image)
    assert manifest.tensorrt
    wanted = Wanted(rows, new, manifest.tensorrt.prefill_rows, (1.0,), (1,))
    plan = plan_memory(PlannedModel.of(manifest), wanted, manifest.tensorrt)
    planned = plan.scenarios[0].total - plan.weights.device - CONTEXT_BYTES
    # Vision, prefill and decoding do not meet in a single session.
    assert 0.6 * planned < state.cuda.peak <= planned
