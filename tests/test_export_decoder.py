# SPDX-License-Identifier: Apache-2.0
"""The exported decoder computes what transformers computes, whichever bodies its custom operators have."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import PLAIN_PRESETS, TinyModel
from decoder_reference import DecoderReference
from decoder_runner import DecoderRunner, StepResult, open_session
from tiny_model import HIDDEN, LAYERS, VOCAB, make_tiny_model, tiny_card

from starkv.export.build.ort import build_ort_engine
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import PRESETS
from starkv.export.record import read_record

WINDOW = 8
TOLERANCE = 1e-4


@pytest.fixture(params=["standard bodies", "onnxruntime bodies"])
def decoder(request: pytest.FixtureRequest, tiny: TinyModel) -> Path:
    folder = tiny.exports["fp32"] if request.param == "standard bodies" else tiny.engine
    return folder / "decoder.onnx"


def runner(decoder: Path, tiny: TinyModel, batch: int = 1) -> DecoderRunner:
    return DecoderRunner(decoder, read_record(tiny.exports["fp32"]).text, batch)


def random_embeds(batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, tokens, HIDDEN)).astype(np.float32)


def image_like_positions(tokens: int, start: int = 0) -> np.ndarray:
    """Positions [3,1,S] whose t, h and w differ, so that mixed up sections show."""
    row = np.arange(start, start + tokens)
    return np.stack([row, row // 3 + 5, row % 7 + 2])[:, None]


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def assert_same_step(actual: StepResult, expected: StepResult) -> None:
    assert_close(actual.logits, expected.logits)
    assert_close(actual.q_window, expected.q_window)
    assert_close(actual.hidden_norm, expected.hidden_norm)


@pytest.mark.parametrize("preset", PLAIN_PRESETS)
def test_canonical_graph_is_valid_onnx(tiny: TinyModel, preset: str) -> None:
    onnx.checker.check_model(tiny.exports[preset] / "decoder.onnx", full_check=True)


def test_interface_is_the_documented_one(decoder: Path, tiny: TinyModel) -> None:
    session = open_session(decoder)
    lengths = {
        tiny.exports["fp32"]: {
            "kv_len": ("tensor(int32)", [LAYERS, "B"]),
            "past_extent": ("tensor(int8)", ["P"]),
        },
        tiny.engine: {"last_rows": ("tensor(int32)", ["L*B"]), "longest": ("tensor(int32)", [1])},
    }
    cache = ["B", 2, "C", 64]
    floats = {
        "inputs_embeds": ["B", "S", HIDDEN],
        "rope_cos": ["B", "S", 32],
        "rope_sin": ["B", "S", 32],
        **{f"past_{kind}.{layer}": cache for kind in "kv" for layer in range(LAYERS)},
    }
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    assert inputs == {
        **{name: ("tensor(float)", shape) for name, shape in floats.items()},
        "last_index": ("tensor(int32)", ["B"]),
        **lengths[decoder.parent],
    }
    assert {value.name: value.shape for value in session.get_outputs()} == {
        "logits": ["B", VOCAB],
        "q_window": [LAYERS, "B", 4, "window", 64],
        "hidden_norm": [LAYERS, "B", "S"],
        **{f"present_{kind}.{layer}": cache for kind in "kv" for layer in range(LAYERS)},
    }


def test_prefill_and_sixteen_steps_equal_transformers(decoder: Path, tiny: TinyModel) -> None:
    reference, ours = DecoderReference(tiny.model), runner(decoder, tiny)
    tokens = [20] + [1] * 16
    for index, count in enumerate(tokens):
        embeds = random_embeds(1, count, seed=index)
        positions = image_like_positions(count, start=sum(tokens[:index]))
        expected = reference.step(embeds, positions, WINDOW)
        assert_same_step(ours.step(embeds, *reference.rope(positions)), expected)
    assert expected.q_window.shape[3] == 1


def test_prefill_in_chunks_equals_whole_prefill(decoder: Path, tiny: TinyModel) -> None:
    reference = DecoderReference(tiny.model)
    embeds, positions = random_embeds(1, 30), image_like_positions(30)
    cos, sin = reference.rope(positions)
    whole, chunked = runner(decoder, tiny), runner(decoder, tiny)
    expected = whole.step(embeds, cos, sin)
    for start, stop in ((0, 11), (11, 12), (12, 20), (20, 30)):
        last = chunked.step(embeds[:, start:stop], cos[:, start:stop], sin[:, start:stop])
    assert_close(last.logits, expected.logits)
    assert_close(last.q_window, expected.q_window)
    assert_close(last.hidden_norm, expected.hidden_norm[:, :, 20:])
    for name, rows in whole.cache.items():
        assert_close(chunked.cache[name][:, :, :30], rows[:, :, :30])


def test_last_index_picks_the_row(decoder: Path, tiny: TinyModel) -> None:
    reference = DecoderReference(tiny.model)
    embeds, positions = random_embeds(1, 9), image_like_positions(9)
    expected = reference.step(embeds[:, :4], positions[:, :, :4], WINDOW)
    padded = runner(decoder, tiny).step(embeds, *reference.rope(positions), last_index=np.array([3]))
    assert_close(padded.logits, expected.logits)


def test_sequences_of_different_length_decode_together(decoder: Path, tiny: TinyModel) -> None:
    lengths = (13, 5)
    together = runner(decoder, tiny, batch=2)
    references = []
    for slot, length in enumerate(lengths):
        reference, alone = DecoderReference(tiny.model), runner(decoder, tiny)
        embeds, positions = random_embeds(1, length, seed=slot), image_like_positions(length)
        reference.step(embeds, positions, WINDOW)
        alone.step(embeds, *reference.rope(positions))
        for name in together.cache:
            together.cache[name][slot] = alone.cache[name][0]
        references.append(reference)
    together.kv_len[:] = lengths
    for step in range(4):
        embeds = random_embeds(2, 1, seed=10 + step)
        positions = [image_like_positions(1, start=length + step) for length in lengths]
        expected = [
            reference.step(embeds[slot : slot + 1], positions[slot], WINDOW)
            for slot, reference in enumerate(references)
        ]
        actual = together.step(embeds, *references[0].rope(np.concatenate(positions, axis=1)))
        assert_close(actual.logits, np.concatenate([result.logits for result in expected]))
        assert_close(actual.q_window, np.concatenate([result.q_window for result in expected], axis=1))
        assert_close(actual.hidden_norm, np.concatenate([result.hidden_norm for result in expected], axis=1))


def test_layers_with_different_numbers_of_rows(decoder: Path, tiny: TinyModel) -> None:
    reference, ours = DecoderReference(tiny.model), runner(decoder, tiny)
    embeds, positions = random_embeds(1, 21), image_like_positions(21)
    reference.step(embeds, positions, WINDOW)
    ours.step(embeds, *reference.rope(positions))
    kept = {0: [0, 1, 4, 9, 12, 13, 20], 1: [0, 2, 3, 5, 8, 10, 11, 14, 15, 19, 20]}
    for layer, rows in kept.items():
        cache = reference.cache.layers[layer]
        cache.keys, cache.values = cache.keys[:, :, rows], cache.values[:, :, rows]
        for kind in "kv":
            stored = ours.cache[f"{kind}.{layer}"]
            stored[:, :, : len(rows)] = stored[:, :, rows]
        ours.kv_len[layer] = len(rows)
    for step in range(4):
        embeds, positions = random_embeds(1, 1, seed=30 + step), image_like_positions(1, start=21 + step)
        expected = reference.step(embeds, positions, WINDOW)
        assert_same_step(ours.step(embeds, *reference.rope(positions)), expected)


def test_tied_embedding_makes_the_logits(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "checkpoint", tied=True)
    record = export_model(tmp_path / "checkpoint", tiny_card(), tmp_path / "export", PRESETS["fp32"])
    build_ort_engine(tmp_path / "export", tmp_path / "engine")
    reference = DecoderReference(model)
    embeds, positions = random_embeds(1, 6), image_like_positions(6)
    expected = reference.step(embeds, positions, WINDOW)
    ours = DecoderRunner(tmp_path / "engine" / "decoder.onnx", record.text)
    assert_same_step(ours.step(embeds, *reference.rope(positions)), expected)
