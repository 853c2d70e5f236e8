# SPDX-License-Identifier: Apache-2.0
"""gui-tiny as a TensorRT engine on the strict fakes, its plugin nodes run by the real plugins: on the
processor, or with ``STARKV_TRT_PLUGINS=cuda`` on a GPU."""

from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import install
from fake_tensorrt.state import State
from packed_cases import PackedEngines, decoded, pool_with, relative
from plugin_executor import PluginExecutor, plugin_driver
from runtime_cases import Engines, open_on
from small_engines import Small, check_packing
from trt_engines import SCREEN, Exports, agent_of, open_tensorrt_engine

from starkv.kernels.plugin_driver import PluginDriver
from starkv.lowrank.quantized_rows import Bits
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.kv.policy import KvPolicy

pytestmark = pytest.mark.slow
PROMPTS = ("Click the red star.", "Click the black star.")
"""Icons: where words are on so small a screen the model hardly knows; rounding to 16 bits moves the click."""
HALF = KvPolicy(STAR_KV, Budget(0.5))
SEEDS = (0, 1)
"""Of two prompts that are decoded together."""
POLICIES = {"all rows": KvPolicy(), "half of them": HALF}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> PluginDriver:
    return plugin_driver(tmp_path_factory.getbasetemp() / "plugins-end-to-end")


@pytest.fixture(scope="module")
def on_processor(exports: Exports) -> Agent:
    """ONNX Runtime in float32."""
    return agent_of(OrtEngine(exports.processor_engine, threads=1))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
def test_the_real_plugins_say_what_the_processor_says(
    compute_dtype: str,
    policy: KvPolicy,
    driver: PluginDriver,
    exports: Exports,
    on_processor: Agent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = PluginExecutor(driver)
    state = install(monkeypatch, cuda=FakeCuda(), execute=executor)
    exported = exports.folders["fp32"]
    agent = agent_of(open_tensorrt_engine(state, exported, tmp_path / "engine", compute_dtype=compute_dtype))
    for prompt in PROMPTS:
        reply = agent.act(SCREEN, prompt, kv_policy=policy)
        expected = on_processor.act(SCREEN, prompt, kv_policy=policy)
        points = [each.action_json[0]["model_xy"] for each in (reply, expected)]
        # Rounding to 16 bits may move the last digit.
        assert np.abs(np.subtract(*points)).max() <= 2
        assert reply.timings.kv_tokens_kept == expected.timings.kv_tokens_kept
    ran = {"KVAttention", "FullAttention"} | ({"KVCompress"} if policy.method == STAR_KV else set())
    assert set(executor.calls) == ran


def test_the_real_plugin_writes_floats_or_codes(driver: PluginDriver, packable: Small, state: State) -> None:
    executor = PluginExecutor(driver)
    state.execute = executor
    check_packing(packable)
    assert executor.calls == {"PackableKVAttention": 2}


@pytest.mark.parametrize("bits", [8, 4])
def test_the_real_plugins_answer_from_codes(
    bits: Bits, driver: PluginDriver, engines: Engines, host: OrtEngine
) -> None:
    """As the plugins' references do, which other tests compare with more."""
    packed = PackedEngines(engines, host)
    expected = decoded(engine := packed.open(bits), pool_with(engine, HALF, True, SEEDS), 3)
    executor = PluginExecutor(driver)
    state = engines.install(cuda=FakeCuda(), execute=executor)
    engine = open_on(state, packed.directory(bits))
    actual = decoded(engine, pool_with(engine, HALF, True, SEEDS), 3)
    assert relative(actual, expected) < 0.05
    assert set(executor.calls) == {"PackableKVAttention", "KVCompress"}
