# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the benchmarks against other systems and of the real size; the systems are not needed."""

import importlib
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from starkv.export.models.qwen2_5_vl_config import parse_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a benchmark's module by name; the scripts import each other by plain names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load_module(name: str) -> ModuleType:
        found = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    yield load_module
    for name in list(sys.modules):
        if name.startswith(("peers_", "real_size")):
            del sys.modules[name]


def test_sizes_count_weights_as_their_configs_describe_them(load) -> None:
    shapes = load("peers_shapes")
    for size in shapes.SIZES.values():
        text = parse_config(shapes.checkpoint_config(size), Path("config.json")).text
        assert (text.layers, text.hidden, text.heads, text.kv_heads) == (
            size.layers,
            size.hidden,
            size.heads,
            size.kv_heads,
        )
        assert sum(text.mrope_section) == size.head_dim // 2
        assert text.tied_embedding == size.tied
    # Published numbers of non-embedding parameters: 0.36, 1.31 and 6.53 billion.
    layers = [size.layers * size.layer_weights / 1e9 for size in shapes.SIZES.values()]
    assert layers == pytest.approx([0.36, 1.31, 6.53], rel=0.01)


def test_ratio_compares_within_a_round(load) -> None:
    report = load("peers_report")
    # A slow second round doubles both: the ratio doesn't see it, a ratio of medians over rounds of one would.
    assert report.ratio([1.0, 2.0, 1.0], [3.0, 6.0, 3.0]) == 3.0


def test_compacted_test_is_compared_with_the_peers_full_cache(load) -> None:
    report = load("peers_report")
    tests = report.plan_tests([0, 100], prefill=8, tokens=4, compacted=(100, 20))
    full, compacted = tests[-2:]
    samples = {
        full.name: {"starkv": [4.0], "llama.cpp": [4.0], "ORT GenAI": [2.0]},
        compacted.name: {"starkv": [1.0]},
    }
    found = report.figures(tests, samples)
    assert found[full.name]["ratios"]["llama.cpp"] == {
        "median": 1.0,
        "of_minima": 1.0,
        "bar": 1.0,
        "met": True,
    }
    assert not found[full.name]["ratios"]["ORT GenAI"]["met"]
    assert found[compacted.name]["ratios"]["llama.cpp"]["median"] == 4.0
    assert found[compacted.name]["systems"]["starkv"]["tokens_per_second_median"] == 4.0
    assert len(report.markdown("x", found)) == 2 + len(found) == 4  # what nobody measured has no row


def sequence_state(keys: np.ndarray, values: np.ndarray) -> bytes:
    """A saved sequence as llama.cpp's source lays it out: keys and values [layers,rows,width] float16."""
    layers, rows, width = keys.shape
    state = struct.pack("<IiII", 0xAF143CD8, 0, 1, rows)
    state += b"".join(struct.pack("<iIi", position, 1, 0) for position in range(rows))
    state += struct.pack("<II", 0, layers)
    for tensor in (keys, values):
        for layer in tensor:
            state += struct.pack("<iQ", 1, 2 * width) + layer.tobytes()
    return state


def test_lengthened_state_repeats_the_rows_of_every_layer(load) -> None:
    lengthen = load("peers_llama_state").lengthen_state
    random = np.random.default_rng(0)
    keys, values = (random.standard_normal((3, 5, 8)).astype(np.float16) for _ in range(2))
    wanted = np.arange(12) % 5
    assert bytes(lengthen(sequence_state(keys, values), 12)) == sequence_state(
        keys[:, wanted], values[:, wanted]
    )
    assert bytes(lengthen(sequence_state(keys, values), 5)) == sequence_state(keys, values)


@pytest.mark.parametrize("offset", [0, 4, 8, 12, 16, 20, 24, 76])
def test_state_of_another_layout_is_refused(load, offset: int) -> None:
    module = load("peers_llama_state")
    keys = np.zeros((3, 5, 8), np.float16)
    state = bytearray(sequence_state(keys, keys))
    state[offset] ^= 0x41
    with pytest.raises(module.UnknownStateError):
        module.lengthen_state(bytes(state), 12)
    with pytest.raises(module.UnknownStateError):
        module.lengthen_state(sequence_state(keys, keys) + b"more", 12)


def test_worker_carries_answers_and_errors(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = load("peers_protocol")
    script = tmp_path / "worker.py"
    script.write_text(
        "from peers_protocol import private_stdout, serve\n"
        "import sys\n"
        "class System:\n"
        "    def describe(self): print('chatter'); return {'arguments': sys.argv[1:]}\n"
        "    def prefill(self, tokens): return 1 / tokens\n"
        "serve(System(), private_stdout())\n"
    )
    monkeypatch.setattr(protocol, "WORKER", script)
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    log = tmp_path / "log"
    worker = protocol.Worker("any", Path(sys.executable), Path("model"), 2, 64, log)
    try:
        assert worker.description == {"arguments": ["any", "model", "2", "64"]}
        assert worker.ask("prefill", tokens=4) == 0.25
        with pytest.raises(protocol.SystemFailedError, match="ZeroDivisionError"):
            worker.ask("prefill", tokens=0)
        assert worker.ask("prefill", tokens=2) == 0.5  # an error ends no worker
    finally:
        worker.close()
    assert "chatter" in log.read_text()
    with pytest.raises(protocol.SystemFailedError, match="ended"):
        protocol.Worker("any", Path("false"), Path("model"), 2, 64, log)


def test_a_steps_memory_and_failure_are_seen(load, tmp_path: Path) -> None:
    memory = load("real_size_memory")
    code = "import time; block = bytearray(b'x') * (200 << 20); time.sleep(0.3); print(len(block))"
    output, cost = memory.run_measured([sys.executable, "-c", code], tmp_path / "log")
    assert int(output) == 200 << 20
    assert 200 < cost.peak_anonymous_mib < 300
    assert cost.peak_resident_mib >= cost.peak_anonymous_mib
    assert cost.seconds > 0.3
    # The peak is that of one child, not the highest of all so far.
    assert memory.run_measured([sys.executable, "-c", "pass"], tmp_path / "log")[1].peak_resident_mib < 100
    with pytest.raises(memory.StepFailedError, match="log"):
        memory.run_measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")


def test_steps_whose_product_is_gone_are_done_again(load, tmp_path: Path) -> None:
    module = load("real_size_steps")
    steps = module.Steps("0.5b", tmp_path, module.Options("int4", 8, 4, (0,), 1))
    assert steps.with_products_for(["bench"]) == ["checkpoint", "export", "build", "bench"]
    (tmp_path / "engine").mkdir()
    assert steps.with_products_for(["bench"]) == ["bench"]
    (tmp_path / "export").mkdir()
    assert steps.with_products_for(["build", "load"]) == ["build", "load"]
    steps.clean()
    assert not list(tmp_path.iterdir())
    tiny = module.Steps("gui-tiny", tmp_path, module.Options("int4", 8, 4, (0,), 1))
    assert tiny.with_products_for(["build"]) == ["export", "build"]
    tiny.clean()
    assert (BENCHMARKS.parent / "models" / "gui-tiny" / "model.safetensors").is_file()
