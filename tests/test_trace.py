# SPDX-License-Identifier: Apache-2.0
"""The traced decoder and the built one share no code but agree on names, shapes and numbers."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import TinyModel
from decoder_runner import DecoderRunner, open_session
from tiny_families import make_tiny_opencua
from tiny_model import HIDDEN, tiny_card

from starkv.errors import UsageError
from starkv.export.build.ort import build_ort_engine
from starkv.export.build.pack import attention_weights
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import PRESETS
from starkv.export.record import read_record

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def traced(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trace") / "export"
    export_model(tiny.checkpoint, tiny_card(), out, PRESETS["fp32"], route="trace")
    return out


@pytest.fixture(scope="module")
def traced_engine(traced: Path) -> Path:
    build_ort_engine(traced, traced.with_name("engine"))
    return traced.with_name("engine")


def signature(path: Path) -> tuple[dict[str, tuple[str, list[object]]], dict[str, tuple[str, int]]]:
    """Inputs with dtype and shape; of outputs only the rank, because tracing names dimensions its own way."""
    session = open_session(path)
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    return inputs, {value.name: (value.type, len(value.shape)) for value in session.get_outputs()}


def test_traced_graph_is_valid_onnx(traced: Path) -> None:
    onnx.checker.check_model(traced / "decoder.onnx", full_check=True)


def test_traced_graph_has_the_same_interface(traced: Path, tiny: TinyModel) -> None:
    assert signature(traced / "decoder.onnx") == signature(tiny.exports["fp32"] / "decoder.onnx")


@pytest.mark.parametrize("dialect", ["standard", "onnxruntime"])
def test_traced_decoder_equals_the_built_one(
    dialect: str, traced: Path, traced_engine: Path, tiny: TinyModel
) -> None:
    folders = (traced, tiny.exports["fp32"]) if dialect == "standard" else (traced_engine, tiny.engine)
    shape = read_record(traced).text
    # Prefill in two chunks, then a step that no trace example had the size of.
    runners = [DecoderRunner(folder / "decoder.onnx", shape) for folder in folders]
    random = np.random.default_rng(1)
    for tokens in (17, 6, 1, 1):
        embeds = random.standard_normal((1, tokens, HIDDEN))
        angles = random.uniform(0, 6, (1, tokens, shape.head_dim // 2))
        steps = [runner.step(embeds, np.cos(angles), np.sin(angles)) for runner in runners]
        for field in ("logits", "q_window", "hidden_norm"):
            actual, expected = (getattr(step, field) for step in steps)
            assert actual.shape == expected.shape
            assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_traced_decoder_steps_a_batch(traced_engine: Path, tiny: TinyModel) -> None:
    shape = read_record(tiny.exports["fp32"]).text
    random = np.random.default_rng(2)
    caches = random.standard_normal((2 * shape.layers, 3, shape.kv_heads, 32, shape.head_dim)).astype(
        np.float32
    )
    embeds = random.standard_normal((3, 1, HIDDEN))
    angles = random.uniform(0, 6, (3, 1, shape.head_dim // 2))
    logits = []
    for folder in (traced_engine, tiny.engine):
        runner = DecoderRunner(folder / "decoder.onnx", shape, batch=3, capacity=32)
        runner.cache = {name: rows.copy() for name, rows in zip(runner.cache, caches, strict=True)}
        runner.kv_len[:] = [[4, 19, 30], [11, 2, 7]]
        logits.append(runner.step(embeds, np.cos(angles), np.sin(angles)).logits)
    assert np.abs(logits[0] - logits[1]).max() <= TOLERANCE * np.abs(logits[1]).max()


def test_vision_tower_comes_from_the_builder(traced: Path, tiny: TinyModel) -> None:
    for name in ("vision.onnx", "vision.data"):
        assert (traced / name).read_bytes() == (tiny.exports["fp32"] / name).read_bytes()


def test_trace_route_refuses_quantization(tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trace route exports fp32 only, not int4"):
        export_model(tiny.checkpoint, tiny_card(), tmp_path / "out", PRESETS["int4"], route="trace")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("remote_code", [False, True])
def test_a_model_that_transformers_doesnt_know_is_refused(tmp_path: Path, remote_code: bool) -> None:
    make_tiny_opencua(tmp_path / "checkpoint")
    if remote_code:
        path = tmp_path / "checkpoint" / "config.json"
        classes = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes}))
        (tmp_path / "checkpoint" / "evil.py").write_text("raise SystemExit('this must not be run')")
    with pytest.raises(UsageError, match=r"transformers can't load .*; use --route build"):
        export_model(tmp_path / "checkpoint", tiny_card(), tmp_path / "out", PRESETS["fp32"], route="trace")


def test_the_cache_of_a_traced_decoder_cant_be_packed(traced_engine: Path) -> None:
    """Nobody knows where its biases are."""
    with pytest.raises(UsageError, match=r"not written by starkv's builder.*no --route trace"):
        attention_weights(traced_engine)
