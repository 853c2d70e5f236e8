# SPDX-License-Identifier: Apache-2.0
"""The CPU benchmark of compressed caches runs at small sizes, and its quantized layer is the engine's."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from starkv.lowrank.quantized_rows import QuantizedRows
from starkv.lowrank.rotary import rotate

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = 40


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by plain names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def heads():
    from low_rank_cpu_cases import Heads

    return Heads(6, 2, {"50 %": (8, 16), "25 %": (4, 10)}, dim=16, sections=(2, 3, 3), tail=4)


def test_the_benchmark_runs(heads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import low_rank_attention_cpu as benchmark

    out = tmp_path / "figures.json"
    for name in benchmark.SHAPES:
        monkeypatch.setitem(benchmark.SHAPES, name, heads)
    sizes = ["--shape", "gqa", "mha", "--rows", "30", str(ROWS), "--layers", "2", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *sizes, "--out", str(out)])
    benchmark.main()
    shapes = json.loads(out.read_text())["shapes"]
    assert {name: list(by_rows) for name, by_rows in shapes.items()} == {
        "gqa": ["30", str(ROWS)],
        "mha": ["30", str(ROWS)],
    }
    figures = shapes["mha"]["30"]
    assert len(figures) == 1 + 4 + 6
    assert figures[benchmark.DENSE] == {"bytes_per_row": 256, "times_dense": 1.0} | {
        "milliseconds": figures[benchmark.DENSE]["milliseconds"]
    }
    assert figures["int8, as an engine runs it"]["bytes_per_row"] == 64 + 12
    # Key lanes come in tiles of 16.
    assert figures["rank 50 %, float"]["bytes_per_row"] == 4 * (2 * 16 + 16)
    assert all(own["milliseconds"] > 0 and own["times_dense"] > 0 for own in figures.values())


def test_rows_that_are_all_tail_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import low_rank_attention_cpu as benchmark

    monkeypatch.setattr(sys, "argv", ["benchmark", "--rows", "8192", "64"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--rows must be more than 64" in capsys.readouterr().err


def test_memory_bounds_the_layers(heads) -> None:
    """One layer, if not even that fits."""
    from low_rank_attention_cpu import fitting_layers
    from low_rank_cpu_cases import dense_case

    case = dense_case(heads, 32)
    assert [fitting_layers(case, 2**20, 14, memory) for memory in (0.1, 0.5, 1.1, 8)] == [1, 2, 4, 14]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_quantized_layer_attends_to_rows_with_their_bias(heads, bits: int) -> None:
    from low_rank_attention_cpu import Layers
    from low_rank_cpu_cases import cells
    from low_rank_cpu_layer import packed_layer_case, quantization

    layers = Layers(packed_layer_case(heads, bits), ROWS, 1, 1)
    layers.step()
    inputs, constants, positions = layers.inputs[0], quantization(heads, bits), cells(ROWS)[0]
    cosines, sines = (table[:, None] for table in heads.rotary.tables(positions))
    # The new row's codes, too: they were written in place.
    codes = (inputs[f"past_{kind}_codes.0"][0].transpose(1, 0, 2) for kind in "kv")
    rows = QuantizedRows(*codes, positions)
    k, v = (inputs[kind].reshape(1, heads.kv_heads, heads.dim) for kind in "kv")
    newest = constants.quantize(rotate(k, cosines[-1:], sines[-1:]), v, positions[-1:], heads.rotary)
    np.testing.assert_array_equal(rows.keys[-1:], newest.keys)
    np.testing.assert_array_equal(rows.values[-1:], newest.values)
    keys = constants.stored_keys(rows) + rotate(constants.key_bias, cosines, sines)
    values = constants.stored_values(rows) + constants.value_bias
    query = inputs["q"].reshape(heads.kv_heads, -1, heads.dim)
    weights = np.exp(np.einsum("hqd,rhd->hqr", query, keys) / np.sqrt(heads.dim))
    expected = np.einsum("hqr,rhd->hqd", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(layers.output().reshape(expected.shape), expected, atol=1e-4)
