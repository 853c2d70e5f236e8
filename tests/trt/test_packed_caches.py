# SPDX-License-Identifier: Apache-2.0
"""Int8 and int4 caches on a TensorRT engine: gui-tiny on the strict fakes, whose plugins are references."""

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from kernel_library import built_for_the_processor
from packed_cases import (
    LENGTH,
    PROMPT,
    PackedEngines,
    admitted,
    behind,
    decoded,
    placed,
    pool_with,
    prefilled,
    relative,
)
from runtime_cases import Engines, Kernels, open_on, tokens

from starkv.errors import EngineError, UsageError
from starkv.kernels.c_abi import KernelAbi
from starkv.kernels.library_paths import KERNELS
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import read_manifest, seal
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.device_codes import DeviceCodes
from starkv.runtime.engines.device_kv import copy_rows, device_kv
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.generation import Sampler, SamplingParameters
from starkv.runtime.kv.policy import KvPolicy

WHOLE = KvPolicy()
HALF = KvPolicy(STAR_KV, Budget(0.5))
POLICIES = pytest.mark.parametrize("policy", [WHOLE, HALF], ids=["all rows", "half of them"])
BITS = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture
def packed(engines: Engines, host: OrtEngine) -> PackedEngines:
    return PackedEngines(engines, host)


@POLICIES
@BITS
def test_codes_answer_as_the_floats_they_stand_for(
    packed: PackedEngines, bits: Bits, policy: KvPolicy
) -> None:
    engine = packed.open(bits)
    codes = pool_with(engine, policy, True)
    floats = engine.new_pool(1, LENGTH + 40)
    floats.acquire()
    arena = engine.new_arena(LENGTH)
    arena.kv.load(0, codes.kv.park(0))
    copy_rows(device_kv(arena.kv), 0, device_kv(floats.kv), 0, LENGTH)
    floats.kv.lengths[:] = arena.kv.lengths
    # One token: floats do not round the rows that come behind. Both replies are rounded to bfloat16.
    assert relative(decoded(engine, codes, 1), decoded(engine, floats, 1)) < 0.05


def test_eight_bits_answer_nearly_as_floats(packed: PackedEngines) -> None:
    """As nearly as on the processor, within what 16 bits leave: random tokens amplify every rounding."""
    engine = packed.open(8)
    logits = [decoded(engine, pool_with(engine, HALF, codes), 4) for codes in (True, False)]
    assert 0 < relative(*logits) < 0.05


def test_floats_are_those_of_an_engine_without_codes(packed: PackedEngines, engines: Engines) -> None:
    logits = []
    for open_engine in (lambda: packed.open(8), engines.open):
        engine = open_engine()
        logits.append(decoded(engine, pool_with(engine, HALF, False), 3))
    np.testing.assert_array_equal(*logits)


@BITS
def test_the_same_rows_are_kept_in_fewer_bytes(packed: PackedEngines, bits: Bits) -> None:
    engine = packed.open(bits)
    codes, floats = (pool_with(engine, HALF, each) for each in (True, False))
    np.testing.assert_array_equal(codes.kv.lengths, floats.kv.lengths)
    row = engine.manifest.text.kv_heads * engine.manifest.text.head_dim
    assert codes.kv.bytes_held == codes.kv.lengths.sum() * (2 * row * bits // 8 + 12)
    assert floats.kv.bytes_held == floats.kv.lengths.sum() * 4 * row
    assert engine.info.kv_packing is not None
    assert engine.info.kv_packing.name == f"int{bits}"


def test_a_batch_is_each_alone(packed: PackedEngines) -> None:
    """One leaves, so that the last takes its slot, and another comes: positions move with the rows."""
    engine = packed.open(8)
    pool = pool_with(engine, HALF, True, (1, 2, 3))
    alone = [decoded(engine, pool_with(engine, HALF, True, (seed,)), 4)[:, 0] for seed in (3, 2)]
    decoded(engine, pool, 1)
    pool = pool_with(engine, HALF, True, (1, 2, 3))
    pool.release(pool.handles[0])
    both = [decoded_like(engine, pool, step) for step in range(4)]
    for slot, expected in enumerate(alone):
        assert relative(np.stack([logits[slot] for logits in both]), expected) < 1e-5
    admitted(engine, pool, HALF, 2)
    again = decoded_like(engine, pool, 0, LENGTH + 4)
    assert np.isfinite(again).all()


def decoded_like(engine: TrtEngine, pool: Any, step: int, position: int | None = None) -> np.ndarray:
    """A step in which every sequence gets the token that it would get alone."""
    token = tokens(1, 50 + step) * pool.active
    at = LENGTH + step if position is None else position
    return engine.decode(pool, engine.embed(token), behind(engine, at, pool.active))


def test_a_token_costs_one_upload(packed: PackedEngines) -> None:
    """Positions of the reply's rows are on the card before the rows are."""
    cuda = FakeCuda()
    engine = packed.open(8, cuda)
    pool = pool_with(engine, HALF, True)
    samplers = [Sampler(SamplingParameters())]
    costs = []
    for step in range(4):
        with cuda.counted():
            engine.decode_tokens(pool, engine.embed([7]), behind(engine, LENGTH + step), samplers)
            costs.append((cuda.downloads, len(cuda.uploads), cuda.launches))
    # The first step runs plainly, the second is captured.
    assert costs == [([4], 1, 0), ([4], 1, 1), ([4], 1, 1), ([4], 1, 1)]


def test_a_reply_may_begin_anywhere(packed: PackedEngines) -> None:
    """Positions that were not foreseen are sent late."""
    engine, steps = packed.open(8), []
    for far in (0, 300):
        pool = pool_with(engine, HALF, True)
        steps.append(decoded(engine, pool, 2, LENGTH + far))
        assert (pool.kv.positions[0, 0, pool.kv.lengths[0, 0] - 1] == LENGTH + far + 1).all()
    assert relative(*steps) > 0.01, "another position is another query"


def test_a_session_goes_on_from_codes(packed: PackedEngines) -> None:
    """Codes become floats, more is prefilled behind them, and all is packed again: the codes that were there
    stay what they were."""
    engine = packed.open(8)
    pool = pool_with(engine, WHOLE, True)
    parked = pool.kv.park(0)
    assert parked.packed
    arena = engine.new_arena(LENGTH + 30)
    arena.kv.load(0, parked)
    np.testing.assert_array_equal(arena.kv.positions[:, 0, :LENGTH], pool.kv.positions[:, 0, :LENGTH])
    assert (arena.kv.row_meta[:, 0, :LENGTH] == pool.kv.row_meta[:, 0, :LENGTH]).all()
    engine.prefill(arena, engine.embed(tokens(30, 9)), placed(30, engine, LENGTH))
    longer = engine.new_pool(1, LENGTH + 30, packed=True)
    longer.acquire()
    assert isinstance(longer.kv, DeviceCodes)
    longer.kv.pack(0, arena.kv)
    again = longer.kv.park(0)
    for layer, codes in enumerate(parked.keys):
        # 16 bits lie between: a code on the border of two may move by one.
        moved = np.abs(again.keys[layer][:, :LENGTH].astype(int) - codes.astype(int))
        assert moved.max() <= 1
        assert (moved > 0).mean() < 0.02


def test_rows_of_another_packing_are_refused(packed: PackedEngines) -> None:
    engine = packed.open(4)
    pool = pool_with(engine, WHOLE, True)
    parked = pool.kv.park(0)
    with pytest.raises(UsageError, match="130 parked KV rows do not fit 64 rows"):
        engine.new_arena(60).kv.load(0, parked)
    other = packed.open(8)
    for kv in (other.new_arena(LENGTH).kv, other.new_pool(1, LENGTH, packed=True).kv):
        with pytest.raises(UsageError, match="another model or dtype, or packed otherwise"):
            kv.load(0, parked)


def test_pools_of_floats_and_codes_are_kept_apart(packed: PackedEngines) -> None:
    engine = packed.open(8)
    for codes in (True, False, True):
        pool = engine.new_pool(1, LENGTH, packed=codes)
        assert isinstance(pool.kv, DeviceCodes) == codes
        del pool
        gc.collect()


def test_a_pool_that_is_used_again_has_the_new_rows_positions(packed: PackedEngines) -> None:
    engine = packed.open(8)
    first = decoded(engine, pool_with(engine, HALF, True, (1,)), 3)
    gc.collect()
    decoded(engine, pool_with(engine, HALF, True, (2,)), 3)
    gc.collect()
    np.testing.assert_array_equal(decoded(engine, pool_with(engine, HALF, True, (1,)), 3), first)


def test_memory_goes_back(packed: PackedEngines) -> None:
    cuda = FakeCuda()
    engine = packed.open(8, cuda)
    pool = pool_with(engine, HALF, True)
    decoded(engine, pool, 3)
    assert cuda.in_use > 0
    del engine, pool
    gc.collect()
    assert cuda.in_use == 0


def test_what_is_no_number_is_not_packed(packed: PackedEngines) -> None:
    engine = packed.open(8)
    arena = engine.new_arena(LENGTH)
    embeds = engine.embed(tokens(LENGTH)).copy()
    embeds[40] = np.nan
    engine.prefill(arena, embeds, placed(LENGTH, engine))
    pool = engine.new_pool(1, LENGTH, packed=True)
    with pytest.raises(EngineError, match="keys or values of layer 0 are not numbers"):
        engine.compress(arena, pool, pool.acquire(), PROMPT, WHOLE)


def test_positions_must_be_known_and_within_the_tables(packed: PackedEngines) -> None:
    engine = packed.open(8)
    pool = pool_with(engine, WHOLE, True)
    embeds, rope = engine.embed([7]), behind(engine, LENGTH)
    with pytest.raises(UsageError, match="rows without a position can't be packed"):
        engine.decode(pool, embeds, Rope(rope.cos, rope.sin))
    build = read_manifest(packed.directory(8)).tensorrt
    assert build is not None
    last = build.position_rows
    with pytest.raises(UsageError, match=f"position {last} is beyond the {last} that"):
        engine.decode(pool, embeds, behind(engine, last))
    assert (pool.kv.lengths == LENGTH).all(), "a refused step leaves nothing"
    arena = engine.new_arena(LENGTH)
    engine.prefill(arena, engine.embed(tokens(LENGTH)), placed(LENGTH, engine, last - 10))
    with pytest.raises(UsageError, match="start the session anew"):
        engine.compress(arena, pool, pool.handles[0], PROMPT, WHOLE)


def test_an_engine_without_codes_packs_nothing(engines: Engines) -> None:
    with pytest.raises(UsageError, match="for TensorRT build it with `--kv-quant int8`"):
        engines.open().new_pool(1, LENGTH, packed=True)


def test_kernels_and_bits_must_fit(packed: PackedEngines, tmp_path: Path) -> None:
    directory = packed.directory(8)
    state = packed.engines.install()
    with pytest.raises(EngineError, match=r"libstarkv_kernels\.so is missing or does not load here"):
        TrtEngine(directory, False, 1, state.cuda)
    copy = shutil.copytree(directory, tmp_path / "engine")
    shutil.copyfile(packed.directory(4) / "kv_packing.safetensors", copy / "kv_packing.safetensors")
    with pytest.raises(EngineError, match="packs its cache as int4, but its plan was built for codes of 8"):
        open_on(state, copy)
    manifest = read_manifest(directory)
    assert manifest.tensorrt is not None
    build = manifest.tensorrt.model_copy(update={"kv_bits": None})
    (copy / "manifest.json").write_text(seal(manifest.model_copy(update={"tensorrt": build})))
    with pytest.raises(EngineError, match="another starkv built it, build it again"):
        open_on(state, copy)


def test_prefill_is_exact_whatever_is_packed(packed: PackedEngines, engines: Engines) -> None:
    keys = []
    for open_engine in (lambda: packed.open(8), engines.open):
        on_host = prefilled(open_engine()).on_host(packed.host.manifest.text)
        keys.append(on_host.host_kv.keys)
    np.testing.assert_array_equal(*keys)


@BITS
def test_the_real_kernels_pack_as_their_reference(packed: PackedEngines, bits: Bits) -> None:
    """The library that is built for the processor takes the fake card's memory as it is."""
    parked = []
    built = built_for_the_processor("starkv_kernels_cpu", KERNELS["cpu"])
    for library in (None, KernelAbi(built)):
        state = packed.engines.install(cuda=FakeCuda())
        kernels: Any = Kernels(state.cuda, library)
        engine = open_on(state, packed.directory(bits), kernels=kernels)
        pool = pool_with(engine, HALF, True)
        codes = pool.kv.park(0)
        arena = engine.new_arena(LENGTH)
        arena.kv.load(0, codes)
        parked.append((codes, arena.kv.park(0)))
    (ours, our_floats), (theirs, their_floats) = parked
    for mine, other in ((ours, theirs), (our_floats, their_floats)):
        for name in ("keys", "values"):
            for layer in zip(getattr(mine, name), getattr(other, name), strict=True):
                np.testing.assert_array_equal(*layer)
