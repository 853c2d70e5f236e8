# SPDX-License-Identifier: Apache-2.0
"""Compression factors from stores of true sizes, and how many sessions fit into the same memory."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from starkv.runtime.engines.opening import open_engine

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def kv_bytes() -> ModuleType:
    return imported("kv_bytes")


@pytest.fixture(scope="module")
def kv_sessions() -> ModuleType:
    return imported("kv_sessions")


def imported(name: str) -> ModuleType:
    """A benchmark's module; the scripts import each other by plain names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


def lines_of(kv_bytes: ModuleType, model: str) -> dict[tuple[float, str], object]:
    text, rows = kv_bytes.geometries()[model]
    return {(line.kept, line.format): line for line in kv_bytes.lines_of(model, text, rows)}


@pytest.mark.parametrize(
    ("model", "form", "row_bytes", "nominal"),
    [
        ("7B", "16 bits", 2048, 1),
        ("7B", "int4, static scales", 512, 4),
        # 256 bytes of keys and 256 of values, two scales of 2 bytes for each of 4 heads and for the values.
        ("7B", "int4, scales per token", 532, 4),
        ("7B", "rank 50 %, int4", 284, 8),
        ("3B", "int8, static scales", 512, 2),
        ("gui-tiny", "rank 50 %, int8", 140, 4),
        ("LLaMA-2-7B", "rank 25 %, 4/3 bits as published", 1156, 20),
    ],
)
def test_bytes_of_a_row(kv_bytes: ModuleType, model: str, form: str, row_bytes: int, nominal: float) -> None:
    line = lines_of(kv_bytes, model)[1.0, form]
    assert line.row_bytes == row_bytes
    assert line.nominal == pytest.approx(nominal)
    assert lines_of(kv_bytes, model)[0.2, form].nominal == pytest.approx(5 * nominal)


def test_whole_caches_by_hand(kv_bytes: ModuleType) -> None:
    lines = lines_of(kv_bytes, "7B")
    rows = 5 * 2691 + 190
    whole = 2048 * (rows + 32)
    quantized = lines[1.0, "int8, static scales"]
    assert quantized.whole == pytest.approx(whole / ((1024 + 12) * (rows + 32)))
    assert quantized.whole_of_float32 == pytest.approx(2 * quantized.whole)
    kept = round(0.2 * rows)
    # The newest 16 rows and those of the reply are raw: 2048 bytes in 16 bits, 4096 on a processor.
    both = lines[0.2, "rank 50 %, int4"]
    packed = (284 + 12) * (kept - 16)
    assert both.whole == pytest.approx(whole / (packed + 48 * 2048))
    assert both.whole_of_float32 == pytest.approx(2 * whole / (packed + 48 * 4096))
    left = 24 / 28 * (packed + 48 * 2048) + 4 / 28 * 2048 * (kept + 32)
    assert both.with_untouched == pytest.approx(whole / left)
    assert both.with_untouched < both.whole < both.rows < both.nominal


def test_more_sessions_fit_into_the_same_memory(
    kv_sessions: ModuleType,
    gui_tiny_engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kv_sessions, "tiny_engine", lambda home: gui_tiny_engine)
    options = "--model gui-tiny --rows 256 --tokens 1 --rounds 1 --reply 16 --most 3 --threads 1"
    kv_sessions.main([*options.split(), "--scratch", str(tmp_path), "--out", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())
    by_name = {way["name"]: way for way in figures["ways"]}
    assert list(by_name) == [way.name for way in kv_sessions.WAYS]
    for way in by_name.values():
        assert way["fitting"] == figures["kv_memory_bytes"] // way["slot_bytes"]
        assert way["decoded_together"] == min(3, way["fitting"])
        assert len(way["seconds"]) == 1
    order = ["whole, float", "20 % of the rows, float", "20 %, int8", "20 %, int4"]
    sizes = [by_name[name]["slot_bytes"] for name in order]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == (256 + 16) * open_engine(gui_tiny_engine, device="cpu").info.kv_bytes_per_row
    assert "times the whole cache's" in capsys.readouterr().out


def test_rows_lie_where_a_prompt_left_them(
    kv_sessions: ModuleType, gui_tiny_engine: Path, tmp_path: Path
) -> None:
    way = kv_sessions.WAYS[-1]
    engine = open_engine(kv_sessions.packed_engine(gui_tiny_engine, way, tmp_path), device="cpu")
    crowd = kv_sessions.gather(engine, way, 1, 300, 8, most=5)
    assert (crowd.pool.active, crowd.rows) == (1, 60)
    crowd.decode(2, 300)
    assert crowd.pool.kv.lengths.tolist() == [[62]] * engine.manifest.text.layers
    assert len(crowd.seconds) == 2
