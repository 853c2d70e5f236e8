# SPDX-License-Identifier: Apache-2.0
"""A training's student is the teacher where nothing is compressed, and the run time's decoder where something
is."""

import numpy as np
import pytest
import torch
from conftest import TinyModel
from kv_training_cases import (
    RECENT,
    biases_of,
    factors_of,
    lessons_of,
    make_sequence,
    make_sequences,
    output_weights_of,
    statistics_of,
    tiny_decoder,
)

from starkv.calibration.kv_packing import make_packing
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.options import KvQuant, PackingOptions
from starkv.kv_packing.positions import POSITION_BYTES
from starkv.kv_packing.retarget import LATENTS, packing_from_factors
from starkv.kv_training import decoder as decoder_module
from starkv.kv_training.decoder import (
    ExactCache,
    Uncompressed,
    exact_pass,
    student_logits,
    teacher_logits,
)
from starkv.kv_training.lessons import Lesson
from starkv.kv_training.pinned import PinnedFactors
from starkv.kv_training.soft import SoftFactors
from starkv.kv_training.start import first_factors
from starkv.manifest import read_manifest
from starkv.runtime.engines.torch_decoder import TorchCache, TorchDecoder
from starkv.runtime.kv.codecs import rotary_of
from starkv.runtime.kv.low_rank import LowRankCodec


@pytest.fixture(scope="module")
def decoder(tiny: TinyModel) -> TorchDecoder:
    return tiny_decoder(tiny)


@pytest.fixture(scope="module")
def first(decoder: TorchDecoder) -> SoftFactors:
    sequences = make_sequences(decoder, 12)
    return first_factors(decoder, factors_of(decoder, sequences), sequences, RECENT, seed=0)


def test_the_exact_pass_is_the_decoder_itself(decoder: TorchDecoder) -> None:
    sequence = make_sequence(decoder, 0)
    rows = sequence.rows
    cache = TorchCache.allocate(decoder.shape, 1, sequence.length, torch.float32)
    expected = decoder.step(rows.embeds[None], rows.cosines[None], rows.sines[None], cache)
    exact = exact_pass(decoder, rows)
    torch.testing.assert_close(decoder.logits(exact.hidden[-1:]), expected.logits, rtol=1e-4, atol=1e-4)
    key_bias, value_bias = biases_of(decoder)[1]
    values = exact.values[1].reshape(-1, *value_bias.shape) + torch.from_numpy(value_bias)
    torch.testing.assert_close(values.transpose(0, 1), cache.values[1, 0], rtol=1e-4, atol=1e-4)
    rotated = rotary_of(decoder.shape)
    assert rotated.sections == tuple(decoder.shape.mrope_section or ())
    # Rotation keeps the length of every pair, so keys can be compared without their angles.
    keys = exact.keys[1].reshape(-1, *key_bias.shape) + torch.from_numpy(key_bias)
    lengths = (
        keys.unflatten(-1, (2, -1)).norm(dim=-2),
        cache.keys[1, 0].transpose(0, 1).unflatten(-1, (2, -1)).norm(dim=-2),
    )
    torch.testing.assert_close(*lengths, rtol=1e-4, atol=1e-4)


def test_switched_off_the_student_is_the_teacher(decoder: TorchDecoder) -> None:
    """In a batch of different lengths and starts, one of them before any row is packed."""
    lessons = lessons_of(decoder, make_sequences(decoder, 4))
    early = lessons[0]
    lessons[0] = Lesson(early.rows, early.exact, RECENT - 2, early.counted)
    student = student_logits(decoder, lessons, RECENT, Uncompressed())
    expected = teacher_logits(decoder, lessons)
    assert len(expected) == sum(int(each.counted[each.start :].sum()) for each in lessons)
    torch.testing.assert_close(student, expected, rtol=1e-4, atol=1e-4)


def test_a_full_rank_with_open_thresholds_is_the_teacher(decoder: TorchDecoder, first: SoftFactors) -> None:
    lessons = lessons_of(decoder, make_sequences(decoder, 3, first=50))
    student = student_logits(decoder, lessons, RECENT, first)
    torch.testing.assert_close(student, teacher_logits(decoder, lessons), rtol=1e-3, atol=1e-3)


def test_a_full_rank_with_thresholds_at_zero_is_the_teacher(
    decoder: TorchDecoder, first: SoftFactors
) -> None:
    """Where strengths are large: at a threshold of 0 those below 0.1 are damped, as published."""
    from dataclasses import replace

    from starkv.kv_training.soft import SoftLayer

    layers = []
    for layer in first.layers:
        parts = [
            replace(part, threshold=torch.tensor(0.0), first_strengths=part.first_strengths.clamp(min=0.2))
            for part in layer.parts
        ]
        layers.append(SoftLayer(tuple(parts[:-1]), parts[-1]))
    lessons = lessons_of(decoder, make_sequences(decoder, 3, first=50))
    student = student_logits(decoder, lessons, RECENT, SoftFactors(layers))
    torch.testing.assert_close(student, teacher_logits(decoder, lessons), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_the_student_is_what_the_run_time_computes(
    decoder: TorchDecoder, tiny: TinyModel, quant: KvQuant
) -> None:
    """Rows cached exactly, packed and unpacked by the run time's codec, and new rows behind them."""
    sequences = make_sequences(decoder, 12)
    statistics, biases = statistics_of(decoder, sequences), biases_of(decoder)
    plain = make_packing(PackingOptions("none", 0.5), statistics, biases, output_weights_of(decoder))
    assert isinstance(plain, LowRankPacking)
    student = PinnedFactors.of_packing(plain, LATENTS[quant])
    deployed = packing_from_factors(plain, quant)
    stored = [deployed.bytes_per_row(layer) - POSITION_BYTES for layer in range(decoder.shape.layers)]
    assert student.row_bytes == sum(stored)

    sequence = make_sequence(decoder, 90)
    rows, start = sequence.rows, sequence.reply
    cache = TorchCache.allocate(decoder.shape, 1, sequence.length, torch.float32)
    decoder.step(rows.embeds[None, :start], rows.cosines[None, :start], rows.sines[None, :start], cache)
    row = np.arange(sequence.length)
    positions = np.stack([row, row // 3 + 5, row % 7 + 2], axis=-1)[: start - RECENT]
    codec = LowRankCodec(deployed, rotary_of(read_manifest(tiny.engine).text), decoder.shape, quant)
    for layer in range(decoder.shape.layers):
        exact = (
            kept[layer, 0, :, : start - RECENT].numpy().astype(np.float64)
            for kept in (cache.keys, cache.values)
        )
        packed = codec.encode(layer, *exact, positions)
        keys, values = codec.decode(layer, packed, positions)
        cache.keys[layer, 0, :, : start - RECENT] = torch.from_numpy(keys)
        cache.values[layer, 0, :, : start - RECENT] = torch.from_numpy(values)
    expected = decoder.step(
        rows.embeds[None, start:], rows.cosines[None, start:], rows.sines[None, start:], cache
    ).logits

    last = torch.zeros(sequence.length, dtype=torch.bool)
    last[-1] = True
    lesson = Lesson(rows, exact_pass(decoder, rows), start, last)
    found = student_logits(decoder, [lesson], RECENT, student)
    teacher = teacher_logits(decoder, [lesson])
    compressed = float((expected - teacher).norm())
    assert compressed > 0.01 * float(teacher.norm())
    # A code at the border of two may fall to either side: a small share of what compression changes.
    assert float((found - expected).norm()) < (0.02 if quant == "none" else 0.1) * compressed


def test_exact_passes_are_kept_while_there_is_room(
    decoder: TorchDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counting(model: TorchDecoder, rows: object) -> object:
        made.append(rows)
        return exact_pass(model, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder_module, "exact_pass", counting)
    sequences = make_sequences(decoder, 2)
    one = exact_pass(decoder, sequences[0].rows)
    room = sum(tensor.nbytes for tensor in (one.keys, one.values, one.hidden))
    cache = ExactCache(decoder, room)
    passes = [cache.of(sequence.rows) for sequence in (*sequences, *sequences)]
    assert len(made) == 3
    assert passes[0] is passes[2]
    assert passes[1] is not passes[3]
    torch.testing.assert_close(passes[1].keys, passes[3].keys)
