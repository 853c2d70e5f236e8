# SPDX-License-Identifier: Apache-2.0
"""The memory plan of engines that keep codes, against what gui-tiny's engine allocates, byte for byte."""

import numpy as np
import pytest
from fake_cuda import FakeCuda
from packed_cases import PackedEngines, behind, placed
from runtime_cases import CHUNK, SESSIONS, Engines
from test_memory_buffers import Meter, picture
from trt_engines import SCREEN, agent_of

from starkv.export.build.trt_vision_bounds import VisionSizes
from starkv.kv_packing.quantized import code_bytes_per_row
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import TensorRTBuild, read_manifest
from starkv.memory_plan.buffers import compress_bytes, decode_bytes, prefill_bytes
from starkv.memory_plan.codes import code_bytes, packing_bytes
from starkv.memory_plan.plan import CONTEXT_BYTES, MemoryPlan, PlannedModel, Wanted, plan_memory
from starkv.memory_plan.rows import cache_bytes, kept_rows, slot_rows
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.rows import prompt_rows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.engines.base import kv_bytes_per_row
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.engines.trt_memory import check_memory
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.buffers import Arena, Pool, round_up_rows
from starkv.runtime.kv.policy import KvPolicy

ROWS, NEW, GRID = 300, 20, (4, 4)
"""Enough rows for those that are kept to take more memory, as floats, than anything that comes and goes."""
PROMPT = prompt_rows(ROWS, [(100, 116)], [GRID])
POLICIES = {1.0: KvPolicy(), 0.5: KvPolicy(STAR_KV, Budget(0.5))}
"""By the budget that a plan says; a whole one is the method that keeps all rows."""
BITS = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture
def packed(engines: Engines, host: OrtEngine) -> PackedEngines:
    return PackedEngines(engines, host)


def build_of(engine: TrtEngine) -> TensorRTBuild:
    build = engine.manifest.tensorrt
    assert build is not None
    return build


def prefilled(engine: TrtEngine) -> Arena:
    arena = engine.new_arena(ROWS)
    engine.prefill(arena, np.zeros((ROWS, engine.manifest.text.hidden), np.float32), placed(ROWS, engine))
    return arena


def pool_that_decoded(engine: TrtEngine, rows: int) -> Pool:
    """A pool of codes in which every number of sequences was decoded."""
    pool = engine.new_pool(SESSIONS, rows, packed=True)
    for used in range(1, SESSIONS + 1):
        pool.acquire()
        engine.decode(pool, engine.embed([7] * used), behind(engine, 0, used))
    return pool


def planned(engine: TrtEngine, bits: Bits, rows: int, new: int, budget: float, sessions: int) -> MemoryPlan:
    wanted = Wanted(rows, new, build_of(engine).prefill_rows, (budget,), (sessions,), bits)
    return plan_memory(PlannedModel.of(engine.manifest), wanted, build_of(engine))


@BITS
def test_an_engine_that_is_open(packed: PackedEngines, bits: Bits) -> None:
    """Its scratch, and scales and tables, though nothing is cached yet."""
    cuda = FakeCuda()
    engine = packed.open(bits, cuda)
    build = build_of(engine)
    packing = packing_bytes(engine.manifest.text, build.sessions, bits, build.position_rows)
    assert cuda.in_use == max(build.scratch_bytes.values()) + packing


def test_weights_that_are_streamed_leave_room(packed: PackedEngines) -> None:
    """For a prompt, what is chosen of it as floats, and as codes."""
    manifest = read_manifest(packed.directory(8))
    assert manifest.tensorrt is not None
    build = manifest.tensorrt.model_copy(update={"weight_streaming": True})
    cached = manifest.max_context * (2 * kv_bytes_per_row(manifest) + code_bytes_per_row(manifest.text, 8))
    card = FakeCuda(total=max(build.scratch_bytes.values()) + cached + (1 << 20))
    assert check_memory(manifest, build, card, None) == 1 << 20


@BITS
def test_a_pool_and_its_steps(packed: PackedEngines, bits: Bits) -> None:
    cuda = FakeCuda()
    engine = packed.open(bits, cuda)
    meter, text = Meter(cuda), engine.manifest.text
    pool = pool_that_decoded(engine, 600)
    capacity = slot_rows(600, build_of(engine).cache_rows)
    assert pool.kv.capacity == capacity == 1024
    slots = code_bytes(text, SESSIONS, capacity, bits)
    assert pool.kv.bytes_reserved == slots
    assert meter.held == meter.peak == slots + decode_bytes(text, SESSIONS)


@BITS
def test_a_row_is_what_the_engine_says(packed: PackedEngines, bits: Bits) -> None:
    engine = packed.open(bits)
    assert engine.info.kv_packing is not None
    assert code_bytes_per_row(engine.manifest.text, bits) == engine.info.kv_packing.bytes_per_row


def test_chosen_rows_are_floats_for_a_moment(packed: PackedEngines) -> None:
    cuda = FakeCuda()
    engine = packed.open(8, cuda)
    text, window = engine.manifest.text, engine.manifest.observation_window
    pool = engine.new_pool(SESSIONS, ROWS, packed=True)
    before = Meter(cuda)
    arena = prefilled(engine)
    cuda.peak = cuda.in_use
    engine.compress(arena, pool, pool.acquire(), PROMPT, POLICIES[0.5])
    kept, windows = kept_rows(ROWS, 0.5, window), (window, StarKVConfig().window)
    staged = cache_bytes(text, 1, kept)
    operands = compress_bytes(text, windows, arena.kv.capacity, 1, round_up_rows(kept), GRID[0] * GRID[1])
    assert before.peak == arena.kv.bytes_reserved + staged + operands
    assert before.held < arena.kv.bytes_reserved + operands, "they go when they are codes"


def test_a_whole_prompt_becomes_codes_where_it_is(packed: PackedEngines) -> None:
    cuda = FakeCuda()
    engine = packed.open(8, cuda)
    text, window = engine.manifest.text, engine.manifest.observation_window
    pool = engine.new_pool(SESSIONS, ROWS, packed=True)
    before = Meter(cuda)
    arena = prefilled(engine)
    cuda.peak = cuda.in_use
    engine.compress(arena, pool, pool.acquire(), PROMPT, POLICIES[1.0])
    assert arena.kv.bytes_reserved < before.peak
    assert before.peak <= arena.kv.bytes_reserved + prefill_bytes(text, window, ROWS, CHUNK)


@pytest.mark.parametrize("budget", POLICIES)
@BITS
def test_the_plan_is_what_the_card_holds_at_most(
    packed: PackedEngines, bits: Bits, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sessions decode, and the largest image and prompt come in."""
    cuda = FakeCuda()
    engine = packed.open(bits, cuda)
    # No image has the most of all sizes that the plan reckons with.
    image = VisionSizes.of_grid(*GRID, engine.manifest.vision)
    monkeypatch.setattr("starkv.memory_plan.plan.most_sizes", lambda *_: image)
    plan = planned(engine, bits, ROWS, NEW, budget, SESSIONS)
    (scenario,) = plan.scenarios
    pool = pool_that_decoded(engine, scenario.kept_rows + NEW)
    engine.encode_image(picture(*GRID))
    engine.compress(prefilled(engine), pool, pool.handles[0], PROMPT, POLICIES[budget])
    assert cuda.peak == scenario.total - plan.weights.device - CONTEXT_BYTES
    assert (scenario.staged > 0) == (budget < 1)


def test_a_reply_stays_within_the_plan(packed: PackedEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a screenshot to a click."""
    cuda = FakeCuda()
    engine = packed.open(8, cuda)
    manifest = engine.manifest
    reply = agent_of(engine).act(SCREEN, "Click the red star.", kv_policy=POLICIES[0.5])
    assert reply.timings.kv_bytes_kept == reply.timings.kv_tokens_kept * code_bytes_per_row(manifest.text, 8)
    side = manifest.vision.patch_size * manifest.vision.spatial_merge_size
    image = VisionSizes.of_grid(reply.resized.height // side, reply.resized.width // side, manifest.vision)
    monkeypatch.setattr("starkv.memory_plan.plan.most_sizes", lambda *_: image)
    rows, new = reply.timings.kv_tokens_full, SamplingParameters().max_new_tokens
    plan = planned(engine, 8, rows, new, 0.5, 1)
    held = plan.scenarios[0].total - plan.weights.device - CONTEXT_BYTES
    # Vision, prefill and decoding do not meet in a single session.
    assert 0.6 * held < cuda.peak <= held
