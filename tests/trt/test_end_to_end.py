# SPDX-License-Identifier: Apache-2.0
"""gui-tiny as a TensorRT engine, from its weights to a click, on the strict fakes.

Export, lowering, build and runtime are the real ones; TensorRT and CUDA are the fakes, which compute what the
lowered graphs say.
"""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import install
from trt_engines import SCREEN, Exports, agent_of, open_tensorrt_engine

from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.positions import rope_tables, text_positions

PROMPTS = ("Click the red star.", "Click 'Save'.", "Click the black star.")
VERSIONS = ("10.3.0.26", "10.13.3.9", "10.16.1.11", "11.1.0.106")
KEEP_ALL = KvPolicy()


@pytest.fixture(scope="module")
def on_processor(exports: Exports) -> Agent:
    return agent_of(OrtEngine(exports.processor_engine, threads=1))


@pytest.fixture
def engine(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrtEngine:
    """Of TensorRT 10.3, in bfloat16, with float weights."""
    state = install(monkeypatch, cuda=FakeCuda())
    return open_tensorrt_engine(state, exports.folders["fp32"], tmp_path / "engine")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_engine_says_what_the_processor_says(
    version: str, exports: Exports, on_processor: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = install(monkeypatch, version, FakeCuda())
    agent = agent_of(open_tensorrt_engine(state, exports.folders["fp32"], tmp_path / "engine"))
    for prompt in PROMPTS:
        replies = [each.act(SCREEN, prompt, kv_policy=KEEP_ALL) for each in (agent, on_processor)]
        points = [reply.action_json[0]["model_xy"] for reply in replies]
        # Rounding to 16 bits may move the last digit.
        assert np.abs(np.subtract(*points)).max() <= 2


def test_four_bit_weights_click_the_same_place(
    exports: Exports, on_processor: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They round differently than float ones: by a pixel of the model's."""
    state = install(monkeypatch, cuda=FakeCuda())
    agent = agent_of(open_tensorrt_engine(state, exports.folders["int4"], tmp_path / "engine"))
    points = [
        each.act(SCREEN, PROMPTS[0], kv_policy=KEEP_ALL).action_json[0]["model_xy"]
        for each in (agent, on_processor)
    ]
    assert np.abs(np.subtract(*points)).max() <= 2


def test_compression_keeps_what_it_keeps_on_the_processor(engine: TrtEngine, on_processor: Agent) -> None:
    policy = KvPolicy(STAR_KV, Budget(0.5))
    replies = [each.act(SCREEN, PROMPTS[0], kv_policy=policy) for each in (agent_of(engine), on_processor)]
    kept, expected = (reply.timings for reply in replies)
    assert kept.kv_tokens_kept == expected.kv_tokens_kept < expected.kv_tokens_full
    assert replies[0].text == replies[1].text


def test_a_budget_of_everything_changes_no_bit(engine: TrtEngine) -> None:
    agent = agent_of(engine)
    replies = [
        agent.act(SCREEN, PROMPTS[0], kv_policy=policy).text
        for policy in (KEEP_ALL, KvPolicy(STAR_KV, Budget(1.0)))
    ]
    assert replies[0] == replies[1]


def test_a_token_costs_one_upload_and_four_bytes_back(
    engine: TrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda: Any = engine._cuda
    costs: list[tuple[list[int], int, int]] = []
    decode_tokens = engine.decode_tokens

    def counted(*arguments: Any) -> list[int]:
        with cuda.counted():
            tokens = decode_tokens(*arguments)
            costs.append((cuda.downloads, len(cuda.uploads), cuda.launches))
        return tokens

    monkeypatch.setattr(engine, "decode_tokens", counted)
    agent = agent_of(engine)
    agent.act(SCREEN, PROMPTS[0], kv_policy=KEEP_ALL)
    assert len(costs) > 3
    assert all(cost[:2] == ([4], 1) for cost in costs)
    # The first step runs plainly, the second is captured.
    assert [launches for *_, launches in costs] == [0] + [1] * (len(costs) - 1)
    costs.clear()
    agent.act(SCREEN, PROMPTS[0], kv_policy=KEEP_ALL)
    assert [launches for *_, launches in costs] == [1] * len(costs), "the graph serves the next reply too"


def test_memory_goes_back(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = install(monkeypatch, cuda=FakeCuda())
    agent = agent_of(open_tensorrt_engine(state, exports.folders["fp32"], tmp_path / "engine"))
    agent.act(SCREEN, PROMPTS[0])
    assert state.cuda.in_use > 0
    del agent
    gc.collect()
    assert state.cuda.in_use == 0


def test_logits_are_those_of_float32_within_bfloat16(engine: TrtEngine, on_processor: Agent) -> None:
    """Behind a real screenshot's prompt; random tokens amplify rounding beyond all use."""
    ids = engine.manifest.tokens.end_of_text * 4 + [5, 17, 300, 42, 8, 9, 10, 11] * 5
    logits = []
    for each in (engine, on_processor.engine):
        rope = Rope(*rope_tables(text_positions(len(ids)).values, engine.manifest.text))
        logits.append(each.prefill(each.new_arena(len(ids)), each.embed(ids), rope))
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[1]).max()
