# SPDX-License-Identifier: Apache-2.0
"""Packed low-rank decode attention gives what was recorded, and what the numpy reference gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from low_rank_cases import Arrays, random_case
from low_rank_session import run
from recordings import recordings

from starkv.export.lower.low_rank_attention import stacked_key_factors
from starkv.lowrank.attend import LatentRows, Tail, attend_low_rank
from starkv.lowrank.factor import Factor
from starkv.lowrank.latent_format import INT8, NIBBLES, LatentFormat
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.pack import pack_keys, pack_values, unpack_keys, unpack_values
from starkv.lowrank.rotary import Rotary
from starkv.onnx_low_rank_shape import LaneStorage, LowRankShape


@pytest.mark.parametrize(("storage", "latent"), [("int4", NIBBLES), ("int8", INT8)], ids=["int4", "int8"])
def test_rows_that_the_numpy_reference_packs(storage: LaneStorage, latent: LatentFormat) -> None:
    """Packed by ``starkv.lowrank`` and attended to there and here."""
    sizes: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 16, "mrope_section": (2, 3, 3)}
    sizes |= {"key_ranks": (17, 32), "value_rank": 51}
    shape, exact = (LowRankShape(**sizes, storage=kind) for kind in (storage, "float"))
    feeds, exact_keys, exact_values = random_case(exact, [9], [3])
    keys = pack_keys(shape.key_lanes.split(exact_keys), latent)
    values = pack_values(exact_values, latent)
    layer = LowRankLayer(
        tuple(Factor(up, np.zeros(up.T.shape)) for up in shape.key_lanes.split(feeds["up_k"].T)),
        Factor(feeds["up_v"], np.zeros(feeds["up_v"].T.shape)),
        feeds["k_bias"].reshape(4, 16),
        feeds["v_bias"].reshape(4, 16),
    )
    history = LatentRows(
        [rows[0] for rows in unpack_keys(keys, shape.key_lanes, latent)],
        unpack_values(values, shape.value_rank, latent)[0],
        feeds["positions"][0],
    )
    stored = {
        "k_codes": keys.codes,
        "k_scales": keys.scales,
        "v_codes": values.codes,
        "v_scales": values.scales,
    }
    kept = {name: array for name, array in feeds.items() if name not in ("k_latent", "v_latent")}
    scales = {name: stored[name].astype(np.float32) for name in ("k_scales", "v_scales")}
    out, tail_k, tail_v = run(shape, kept | stored | scales)
    tail = Tail(*(rows[0, :, :4].transpose(1, 0, 2) for rows in (tail_k, tail_v)))
    rotary = Rotary(100.0 ** (-2 * np.arange(8) / 16), shape.mrope_section)
    expected = attend_low_rank(feeds["q"].reshape(8, 16), history, tail, layer, rotary).heads
    np.testing.assert_allclose(out.reshape(8, 16), expected, rtol=0, atol=1e-5)


def recorded_feeds(heads: Arrays) -> Arrays:
    """Inputs of one sequence, all but the packed rows. The new row's key and value are zero."""
    ranks = heads["ranks"].tolist()
    shape = recorded_shape(heads, "float")
    factors = np.split(heads["Uk"], np.cumsum(ranks)[:-1], axis=1)
    angles = np.arange(heads["pos"].max() + 1)[:, None] * heads["inv_freq"]
    row = np.zeros((1, 1, 4 * 128), np.float32)
    tail = np.zeros((1, 4, 1, 128), np.float32)
    return {
        "q": heads["q_rot"].reshape(1, 1, -1),
        "k": row,
        "v": row,
        "packed_len": np.array([heads["pos"].shape[1]], np.int32),
        "positions": heads["pos"].T[None],
        "tail_k": tail,
        "tail_v": tail,
        "tail_len": np.zeros(1, np.int32),
        "up_k": stacked_key_factors(shape, factors),
        "k_bias": heads["bk"].reshape(-1),
        "up_v": heads["Uv"],
        "v_bias": heads["bv"],
        "cos_table": np.cos(angles).astype(np.float32),
        "sin_table": np.sin(angles).astype(np.float32),
    }


def recorded_shape(heads: Arrays, storage: LaneStorage) -> LowRankShape:
    ranks = tuple(heads["ranks"].tolist())
    return LowRankShape(28, 4, 128, ranks, heads["cv"].shape[1], (16, 24, 24), storage)


def assert_recorded(shape: LowRankShape, feeds: Arrays, recorded: Arrays) -> None:
    """The new row scores 0 and adds nothing, so it takes a known share of the weights and that is all."""
    exponents = np.exp(recorded["logits"]).sum(axis=1, keepdims=True)
    expected = recorded["heads"] * (exponents / (exponents + 1))
    out = run(shape, feeds)[0].reshape(28, 128)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def load(path: Path) -> Arrays:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.parametrize("path", recordings("lowrank", "09b*.npz"), ids=lambda path: path.stem)
def test_recorded_latents(path: Path) -> None:
    heads = load(path)
    shape = recorded_shape(heads, "float")
    keys = np.zeros((1, 96, shape.key_lanes.lanes), np.float32)
    parts = np.split(heads["ck"], np.cumsum(shape.key_ranks)[:-1], axis=1)
    for offset, part in zip(shape.key_lanes.offsets, parts, strict=True):
        keys[0, :, offset : offset + part.shape[1]] = part
    feeds = recorded_feeds(heads) | {"k_latent": keys, "v_latent": heads["cv"][None]}
    assert_recorded(shape, feeds, heads)


@pytest.mark.parametrize("path", recordings("lowrank", "11*.npz"), ids=lambda path: path.stem)
def test_recorded_packed_rows(path: Path) -> None:
    heads, packed = load(next(path.parent.glob("09b*.npz"))), load(path)
    stored = {
        "k_codes": packed["k_bytes"][None],
        "k_scales": packed["k_scales"][None],
        "v_codes": packed["v_bytes"][None],
        "v_scales": packed["v_scales"][None],
    }
    assert_recorded(recorded_shape(heads, "int4"), recorded_feeds(heads) | stored, packed)
