# SPDX-License-Identifier: Apache-2.0
"""Packed rows: exact bytes, ragged ranks, zero tokens, and what each format loses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starkv.lowrank.hadamard import block_rotation, hadamard, random_rotation, rotated_parts
from starkv.lowrank.latent_format import (
    FLOAT16,
    FORMATS,
    INT8,
    NIBBLES,
    NIBBLES_4_3,
    KeyLanes,
    LatentFormat,
    key_bytes,
    outliers,
    value_bytes,
)
from starkv.lowrank.pack import (
    pack_keys,
    pack_nibbles,
    pack_values,
    quantize_block,
    unpack_keys,
    unpack_nibbles,
    unpack_values,
)

QUANTIZED = [NIBBLES_4_3, NIBBLES, INT8]
RAGGED = [(1, 16, 17, 128), (5,), (4, 4), (26, 37, 16, 48)]


def named(latent: LatentFormat) -> str:
    return latent.name


@pytest.mark.parametrize("latent", QUANTIZED, ids=named)
@pytest.mark.parametrize("ranks", RAGGED, ids=str)
def test_keys_come_back_within_half_a_step(latent: LatentFormat, ranks: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    latents = [rng.normal(size=(3, 6, rank)).astype(np.float32) for rank in ranks]
    rows = pack_keys(latents, latent)
    assert rows.codes.shape[:2] == (3, 6)
    assert rows.bytes_per_row == key_bytes(ranks, latent)
    unpacked = unpack_keys(rows, KeyLanes(ranks), latent)
    for group, (before, after) in enumerate(zip(latents, unpacked, strict=True)):
        scales = rows.scales[..., group, :].astype(np.float32)
        first = outliers(ranks[group])
        steps = np.repeat(scales, [first, ranks[group] - first], axis=-1)
        # Half a step, and what rounding the scale to bfloat16 moves the largest code by.
        assert (np.abs(after - before) <= steps * 0.5 + np.abs(before) * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("latent", QUANTIZED, ids=named)
@pytest.mark.parametrize("rank", [1, 4, 5, 16, 17, 128, 154, 512])
def test_values_come_back_within_half_a_step(latent: LatentFormat, rank: int) -> None:
    values = np.random.default_rng(0).normal(size=(7, rank)).astype(np.float32)
    rows = pack_values(values, latent)
    assert rows.bytes_per_row == value_bytes(rank, latent)
    assert rows.codes.shape[-1] % 8 == 0
    first = outliers(rank)
    steps = np.repeat(rows.scales.astype(np.float32), [first, rank - first], axis=-1)
    error = np.abs(unpack_values(rows, rank, latent) - values)
    assert (error <= steps * 0.5 + np.abs(values) * 2**-8 + 1e-6).all()


def test_a_zero_token_has_code_8_and_the_least_scale() -> None:
    keys = pack_keys([np.zeros((1, 20), np.float32)], NIBBLES_4_3)
    assert (keys.codes == 0x88).all()
    np.testing.assert_allclose(keys.scales[0, 0].astype(float), [1e-5 / 7, 1e-5 / 3], rtol=2**-8)
    values = pack_values(np.zeros((1, 20), np.float32), NIBBLES)
    assert (values.codes == 0x88).all()
    np.testing.assert_allclose(values.scales[0].astype(float), [1e-5 / 7, 1e-5 / 7], rtol=2**-8)
    whole = pack_values(np.zeros((1, 20), np.float32), INT8)
    assert (whole.codes == 0).all()
    np.testing.assert_allclose(whole.scales[0].astype(float), [1e-5 / 127] * 2, rtol=2**-8)


@pytest.mark.parametrize(
    ("key_rank", "value_rank", "stored"), [(26, 154, 164), (64, 256, 284), (128, 512, 532)], ids=str
)
def test_bytes_of_a_qwen_row(key_rank: int, value_rank: int, stored: int) -> None:
    """Four KV heads of 128 channels, 2048 bytes in 16 bits: at a quarter, half and all of their rank."""
    assert key_bytes([key_rank] * 4, NIBBLES) + value_bytes(value_rank, NIBBLES) == stored


def test_bytes_of_other_formats() -> None:
    assert key_bytes([26] * 4, FLOAT16) + value_bytes(154, FLOAT16) == 2 * (4 * 32 + 154)
    assert key_bytes([26] * 4, INT8) + value_bytes(154, INT8) == 128 + 16 + 160 + 4


def test_lanes_know_their_group_and_scale() -> None:
    lanes = KeyLanes((17, 3))
    assert lanes.widths == (32, 16)
    assert lanes.offsets == (0, 32)
    assert lanes.group_of_tile.tolist() == [0, 0, 1]
    assert lanes.scale_of_lane.tolist() == [0] * 3 + [1] * 29 + [3] * 16


def test_a_latent_does_not_say_another_rank() -> None:
    with pytest.raises(ValueError, match="4 channels where the rank is 3"):
        KeyLanes((3,)).join([np.zeros((1, 4))])
    with pytest.raises(ValueError, match="at least 1"):
        KeyLanes((16, 0))


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_nibbles_round_trip(codes: list[int]) -> None:
    signed = np.array(codes, np.int8)
    stored = pack_nibbles(signed)
    assert len(stored) == (len(codes) + 1) // 2
    np.testing.assert_array_equal(unpack_nibbles(stored, len(codes)), signed)
    assert int(stored[0]) & 15 == codes[0] + 8


def test_what_can_not_be_packed() -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantize_block(np.array([1.0, np.nan]), 4)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack_values(np.zeros((1, 4)), FLOAT16)
    assert set(FORMATS) == {"4/3", "4/4", "int8", "float16", "float32"}


@pytest.mark.parametrize("rank", [1, 4, 16, 17, 37, 128, 154])
def test_rotations_are_orthogonal_and_seeded(rank: int) -> None:
    rotation = random_rotation(rank, seed=7)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(rank), atol=1e-12)
    np.testing.assert_array_equal(rotation, random_rotation(rank, seed=7))
    first = outliers(rank)
    assert not rotation[:first, first:].any()
    assert not rotation[first:, :first].any()


def test_rotated_parts_are_powers_of_two() -> None:
    assert rotated_parts(26) == [(0, 4), (5, 16)]
    assert rotated_parts(9) == [(1, 8)]
    assert rotated_parts(1) == []
    np.testing.assert_allclose(block_rotation(9, np.ones(8))[1:, 1:], hadamard(8))


def test_four_bits_for_all_and_rotation_pay() -> None:
    """Latents with heavy tails: 4/4 beats 4/3 at the same bytes, rotated beats plain, 8 bits beat all."""
    rng = np.random.default_rng(3)
    rank = 160
    latents = rng.standard_t(3, size=(400, rank)) * np.exp(-np.arange(rank) / 50)

    def error(latent: LatentFormat, rotation: np.ndarray) -> float:
        rows = pack_values(latents @ rotation, latent)
        back = unpack_values(rows, rank, latent) @ rotation.T
        return float(np.linalg.norm(back - latents) / np.linalg.norm(latents))

    rotated, plain = random_rotation(rank), np.eye(rank)
    assert error(NIBBLES, rotated) < 0.8 * error(NIBBLES_4_3, rotated)
    assert error(NIBBLES, rotated) < 0.9 * error(NIBBLES, plain)
    assert error(INT8, rotated) < 0.1 * error(NIBBLES, rotated)
    assert value_bytes(rank, NIBBLES) == value_bytes(rank, NIBBLES_4_3)
