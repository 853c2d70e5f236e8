# SPDX-License-Identifier: Apache-2.0
"""Compression in the engine: what decode sees afterwards, what memory holds, what a trajectory remembers."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ChatModel, TinyModel
from decoder_reference import DecoderReference
from PIL import Image
from test_ort_engine import LAYERS, assert_close, positions, prefilled, random_embeds, rope

from starkv.errors import EngineError, UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, PYRAMIDKV, STAR_KV
from starkv.methods.rows import ROW_FRAME, ROW_PROTECTED, ROW_TOKEN, PromptRows, prompt_rows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.agent import Agent
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy
from starkv.runtime.kv.prompt import describe_prompt
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.session import Session

ROWS, WINDOW = 90, 8
PROMPT = prompt_rows(ROWS, [(5, 35), (40, 80)], [(5, 6), (5, 8)], (0, 1, 2, 3, 81, 82, 36))
MODES = {"native": StarKVConfig(), "official": StarKVConfig.official()}


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> OrtEngine:
    return OrtEngine(tiny.engine, threads=1)


def policy_of(method: str, share: float, mode: str = "native") -> KvPolicy:
    return KvPolicy(method, Budget(share), MODES[mode])


def compressed(
    engine: OrtEngine, policy: KvPolicy, prompt: PromptRows = PROMPT
) -> tuple[Arena, Pool, Compressed]:
    arena, _ = prefilled(engine, prompt.length)
    pool = engine.new_pool(1, engine.most_kept_rows(prompt.length, policy) + 20)
    return arena, pool, engine.compress(arena, pool, pool.acquire(), prompt, policy)


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_budget_decodes_bit_for_bit_as_no_compression(engine: OrtEngine, mode: str) -> None:
    _, full, _ = compressed(engine, KvPolicy())
    _, pool, result = compressed(engine, policy_of(STAR_KV, 1.0, mode))
    assert result.scores is not None
    np.testing.assert_array_equal(pool.kv.lengths, full.kv.lengths)
    for step in range(6):
        embeds, tables = random_embeds(1, step), rope(engine, positions(1, ROWS + step))
        np.testing.assert_array_equal(
            engine.decode(pool, embeds, tables), engine.decode(full, embeds, tables)
        )


@pytest.mark.parametrize("method", ENGINE_METHODS)
def test_decode_after_compression_equals_transformers_on_the_kept_rows(
    tiny: TinyModel, engine: OrtEngine, method: str
) -> None:
    """Layers keep different rows and different numbers of them; positions stay the true ones."""
    reference = DecoderReference(tiny.model)
    reference.step(random_embeds(ROWS)[None], positions(ROWS)[:, None], WINDOW)
    policy = KvPolicy() if method == FULL else policy_of(method, 0.4)
    _, pool, result = compressed(engine, policy)
    for layer, cached in enumerate(reference.cache.layers):
        sets = result.rows[layer]
        heads = cached.keys.shape[1]
        kept = [torch.from_numpy(sets[min(head, len(sets) - 1)]) for head in range(heads)]
        kept = [rows[rows >= 0] for rows in kept]
        for name in ("keys", "values"):
            tensor = getattr(cached, name)
            rows = torch.stack([tensor[:, head, kept[head]] for head in range(heads)], 1)
            setattr(cached, name, rows)
    for step in range(4):
        embeds, values = random_embeds(1, 50 + step), positions(1, ROWS + step)
        expected = reference.step(embeds[None], values[:, None], WINDOW)
        assert_close(engine.decode(pool, embeds, rope(engine, values)), expected.logits)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("method", [name for name in ENGINE_METHODS if name != FULL])
def test_bytes_held_are_exactly_the_budget(engine: OrtEngine, method: str, share: float) -> None:
    _, pool, result = compressed(engine, policy_of(method, share))
    kept = int(share * ROWS)
    if method != PYRAMIDKV:  # larger than its budget, as its authors' code makes it
        assert pool.kv.bytes_held == kept * engine.info.kv_bytes_per_row
    counts = (result.rows >= 0).sum(-1)
    np.testing.assert_array_equal(counts, np.broadcast_to(pool.kv.lengths, counts.shape))
    assert int(pool.kv.lengths.max()) <= engine.most_kept_rows(ROWS, policy_of(method, share))
    # The last row is always there: the next token attends to the one before it.
    assert all((rows[rows >= 0][-1] == ROWS - 1) for layer in result.rows for rows in layer)


def test_metadata_travel_with_the_rows(engine: OrtEngine) -> None:
    _, pool, result = compressed(engine, policy_of(STAR_KV, 0.4))
    for layer in range(LAYERS):
        count = pool.kv.lengths[layer, 0]
        rows = result.rows[layer, 0, :count]
        meta = pool.kv.row_meta[layer, 0, :count]
        np.testing.assert_array_equal(meta[:, ROW_TOKEN], rows)
        np.testing.assert_array_equal(meta[:, ROW_FRAME], PROMPT.row_meta[rows, ROW_FRAME])
        protected = PROMPT.protected(36, WINDOW)
        assert set(rows[meta[:, ROW_PROTECTED] == 1].tolist()) == set(protected)


def test_a_trajectory_is_remembered_and_a_new_one_is_not(engine: OrtEngine) -> None:
    arena, _ = prefilled(engine, ROWS)
    policy = policy_of(STAR_KV, 0.4)

    def once(memory: object) -> Compressed:
        pool = engine.new_pool(1, 80)
        return engine.compress(arena, pool, pool.acquire(), PROMPT, policy, memory)  # type: ignore[arg-type]

    first = once(None)
    again = once(None)
    assert first.scores is not None
    assert again.scores is not None
    np.testing.assert_array_equal(first.scores, again.scores)
    second = once(first.memory)
    assert second.memory is not None
    assert second.memory.progress.temporal_step == 2
    assert second.scores is not None
    # Attention that stays where it was discounts the older screenshot, and nothing else.
    older = PROMPT.row_meta[:, ROW_FRAME] == 0
    assert (second.scores[..., older] < first.scores[..., older]).all()
    np.testing.assert_array_equal(second.scores[..., 40:80], first.scores[..., 40:80])


def test_screenshots_of_changing_size_are_remembered_as_far_as_they_can(engine: OrtEngine) -> None:
    memory = None
    for spans, grids in (
        ([(5, 35), (40, 80)], [(5, 6), (5, 8)]),
        ([(5, 35), (40, 60)], [(5, 6), (4, 5)]),
        ([(5, 35), (40, 80)], [(5, 6), (8, 5)]),
    ):
        arena, _ = prefilled(engine, ROWS)
        pool = engine.new_pool(1, 80)
        prompt = prompt_rows(ROWS, spans, grids)
        result = engine.compress(arena, pool, pool.acquire(), prompt, policy_of(STAR_KV, 0.4), memory)
        memory = result.memory
        assert memory is not None
        assert memory.progress.pattern_cells == grids[1][0] * grids[1][1]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("method", [name for name in ENGINE_METHODS if name != FULL])
def test_prompts_of_a_few_rows_survive_any_budget(engine: OrtEngine, method: str, rows: int) -> None:
    _, pool, _ = compressed(engine, policy_of(method, 0.01), prompt_rows(rows, [], []))
    assert pool.kv.lengths.max() <= rows
    assert pool.kv.lengths.min() >= min(rows, 2)
    engine.decode(pool, random_embeds(1), rope(engine, positions(1, rows)))


def test_a_capacity_leaves_shorter_prompts_alone(engine: OrtEngine) -> None:
    _, pool, result = compressed(engine, KvPolicy(STAR_KV, Budget(capacity=ROWS + 1)))
    assert (pool.kv.lengths == ROWS).all()
    assert result.scores is None
    assert result.memory is not None
    assert result.memory.progress.temporal_step == 1
    _, pool, _ = compressed(engine, KvPolicy(STAR_KV, Budget(capacity=30)))
    assert int(pool.kv.lengths.sum()) == LAYERS * 30


@pytest.mark.parametrize("method", ["star_kv", "snapkv", "gui_kv"])
def test_keys_that_are_not_numbers_are_an_error(engine: OrtEngine, method: str) -> None:
    arena, _ = prefilled(engine, ROWS)
    arena.kv.keys[1, 0, :, 50] = np.nan
    pool = engine.new_pool(1, 80)
    with pytest.raises(EngineError, match="KV scores of layer 1 are not numbers"):
        engine.compress(arena, pool, pool.acquire(), PROMPT, policy_of(method, 0.4))


def test_misuse_is_refused(engine: OrtEngine) -> None:
    arena, _ = prefilled(engine, ROWS)
    small = engine.new_pool(1, 20)
    handle = small.acquire()
    with pytest.raises(UsageError, match="do not fit a slot of 64"):
        engine.compress(arena, small, handle, PROMPT, policy_of(STAR_KV, 0.9))
    with pytest.raises(UsageError, match="do not fit a slot of 64"):
        engine.compress(arena, small, handle, PROMPT, policy_of("snapkv", 0.9))
    with pytest.raises(UsageError, match="the arena holds 90 rows, the prompt 89"):
        engine.compress(arena, small, handle, prompt_rows(89, [], []), policy_of(STAR_KV, 0.2))
    wide = KvPolicy(STAR_KV, Budget(0.5), replace(StarKVConfig(), window=9))
    with pytest.raises(
        UsageError, match="window of 9 rows is asked for, but the engine was exported with an"
    ):
        engine.compress(arena, small, handle, PROMPT, wide)


# --- through a session ---


@pytest.fixture(scope="module")
def agent(babbling: ChatModel) -> Agent:
    return Agent.load(babbling.engine, threads=1)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (150, 200, 3), np.uint8))


def reply(session: Session, images: Sequence[Image.Image], tokens: int = 5) -> str:
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "click the red star"}]
    message: Message = {"role": "user", "content": content}
    return "".join(session.reply([message], images, SamplingParameters(tokens)))


@pytest.mark.parametrize("mode", MODES)
def test_a_session_answers_from_several_compressed_screenshots(agent: Agent, mode: str) -> None:
    session = Session(agent.engine, agent.tokenizer, policy_of(STAR_KV, 0.3, mode))
    full = Session(agent.engine, agent.tokenizer)
    images = [noise(0), noise(1), noise(2)]
    reply(session, images)
    reply(full, images)
    timings, row_bytes = session.timings, agent.engine.info.kv_bytes_per_row
    kept = int(0.3 * timings.prompt_tokens)
    assert timings.kv_tokens_full == timings.prompt_tokens == full.timings.kv_tokens_kept
    assert timings.kv_tokens_kept == kept
    assert timings.kv_bytes_kept == kept * row_bytes
    assert timings.kv_bytes_full == timings.prompt_tokens * row_bytes == full.timings.kv_bytes_kept
    assert timings.kv_bytes_held == (kept + timings.generated_tokens - 1) * row_bytes
    assert session.prompt is not None
    assert len(session.prompt.spans) == 3
    assert session.kv_memory is not None
    assert session.kv_memory.progress.temporal_step == 1


def test_a_whole_budget_says_the_same(agent: Agent) -> None:
    said = [
        reply(Session(agent.engine, agent.tokenizer, policy), [noise(0), noise(1)], 24)
        for policy in (KvPolicy(), policy_of(STAR_KV, 1.0), policy_of(STAR_KV, 1.0, "official"))
    ]
    assert said[0] == said[1] == said[2]
    small = reply(Session(agent.engine, agent.tokenizer, policy_of(STAR_KV, 0.1)), [noise(0), noise(1)], 24)
    assert small != said[0]


def test_replies_of_a_session_are_one_trajectory(agent: Agent) -> None:
    session = Session(agent.engine, agent.tokenizer, policy_of(STAR_KV, 0.3))
    for step in range(1, 4):
        reply(session, [noise(0), noise(step)])
        assert session.kv_memory is not None
        assert session.kv_memory.progress.profile_step == step


def test_what_is_worth_keeping_is_known_from_the_turns(agent: Agent) -> None:
    messages: list[Message] = [
        {"role": "system", "content": "star"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "click"}]},
        {"role": "assistant", "content": "button"},
        {"role": "user", "content": "the red star"},
    ]
    tokenizer, manifest = agent.tokenizer, agent.engine.manifest
    ids = tokenizer.encode(tokenizer.render(messages))
    rows = describe_prompt(ids, [(1, 1)], manifest, tokenizer)
    order = rows.protect_order
    starts = [row for row, token in enumerate(ids) if token == tokenizer.token_id("<|im_start|>")]
    turns = [range(start, end) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    system, first, answer, last = turns[:4]
    # The first sink before everything else, the others behind it.
    assert order[0] == 0
    assert order[-3:] == (1, 2, 3)
    rest = list(order[1:-3])
    image = ids.index(manifest.tokens.image_pad)
    expected = [*last, *(row for row in first if row != image), *(row for row in system if row > 3)]
    assert rest == [row for row in expected if row > 3]
    assert not set(answer) & set(order) - {0, 1, 2, 3}


@pytest.mark.parametrize("method", [FULL, STAR_KV, "snapkv"])
def test_the_prompts_memory_goes_back_before_the_reply(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Otherwise a reply would hold the full cache beside the compressed one."""
    arenas: list[weakref.ref[np.ndarray]] = []
    original = agent.engine.new_arena

    def remembering(rows: int) -> Arena:
        arena = original(rows)
        arenas.append(weakref.ref(arena.kv.keys))
        return arena

    monkeypatch.setattr(agent.engine, "new_arena", remembering)
    policy = KvPolicy() if method == FULL else policy_of(method, 0.3)
    session = Session(agent.engine, agent.tokenizer, policy)
    pieces = session.reply([{"role": "user", "content": "click the star"}], [], SamplingParameters(12))
    next(pieces)
    gc.collect()
    assert [arena() for arena in arenas] == [None]
    assert "".join(pieces)
