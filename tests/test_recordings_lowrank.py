# SPDX-License-Identifier: Apache-2.0
"""starkv.lowrank against recordings of STAR-KV's official code and of independent references.

A recording's number says what it holds; its name is free otherwise. Factors are unique only up to a rotation
of the latents, so that products, logits and heads are compared, never factors.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from recordings import read_arrays, recordings

from starkv.lowrank.attend import LatentRows, Tail, attend_low_rank, softmax
from starkv.lowrank.factor import (
    Decomposition,
    Factor,
    key_metric,
    output_pca,
    split_groups,
    weight_svd,
)
from starkv.lowrank.hadamard import block_rotation, fold, rotated_parts
from starkv.lowrank.latent_format import (
    NIBBLES_4_3,
    KeyLanes,
    key_bytes,
    outliers,
    value_bytes,
)
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.objective import kept_ranks, threshold_pressure, weight_parameters
from starkv.lowrank.pack import PackedRows, pack_keys, pack_values, unpack_keys, unpack_nibbles, unpack_values
from starkv.lowrank.plan import greedy_ranks
from starkv.lowrank.rotary import Rotary, rotate
from starkv.lowrank.soft_threshold import soft_threshold

Arrays = dict[str, np.ndarray]


def each(prefix: str) -> Any:
    """One test per recording of this number."""
    return pytest.mark.parametrize(
        "path", recordings("lowrank", f"{prefix}_*.npz"), ids=lambda path: path.stem
    )


def assert_close(actual: Any, expected: np.ndarray, tolerance: float) -> None:
    """No element differs by more than this share of the largest expected one."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.1e}"


@each("01")
def test_soft_threshold(path: Path) -> None:
    recorded = read_arrays(path)
    for case in range(len(recorded["alpha"])):
        values = torch.from_numpy(recorded["x"]).requires_grad_()
        threshold = torch.tensor(float(recorded["alpha"][case]), requires_grad=True)
        result = soft_threshold(
            values, threshold, sharpness=float(recorded["s"][case]), leak=float(recorded["c"][case])
        )
        result.backward(torch.from_numpy(recorded["grad_out"][case]))
        assert values.grad is not None
        assert threshold.grad is not None
        np.testing.assert_allclose(result.detach().numpy(), recorded["y"][case], atol=2e-5)
        np.testing.assert_allclose(values.grad.numpy(), recorded["grad_x"][case], atol=3e-3)
        np.testing.assert_allclose(threshold.grad.numpy(), recorded["grad_alpha"][case], rtol=1e-4, atol=3e-3)
        np.testing.assert_array_equal(
            recorded["x"] > np.float32(recorded["alpha"][case]), recorded["kept"][case]
        )


def check_thresholded(parts: list[Decomposition], thresholds: np.ndarray, recorded: Arrays) -> None:
    """Soft thresholds on every part's singular values give the recorded weight and outputs; what the official
    export made of them is further from the weight."""
    weights = np.split(recorded["W"].astype(np.float64), len(parts))
    factors = [part.softly_above(float(alpha)) for part, alpha in zip(parts, thresholds, strict=True)]
    pairs = list(zip(factors, weights, strict=True))
    weight = np.concatenate([factor.up @ (factor.down @ part) for factor, part in pairs])
    # Just above the threshold the cut is 50 times as steep as a strength is long: float32 shows there.
    assert_close(weight, recorded["W_thresholded"], 1e-4)
    assert_close(recorded["x"] @ weight.T, recorded["y_thresholded"], 1e-4)
    outputs = [factor.lift(factor.compress(recorded["x"] @ part.T)) for factor, part in pairs]
    assert_close(np.concatenate(outputs, axis=-1), recorded["y_thresholded"], 1e-4)
    exported_error = np.linalg.norm(recorded["official_export_W"] - recorded["W"])
    assert np.linalg.norm(weight - recorded["W"]) < exported_error


@each("02")
def test_keys_head_by_head(path: Path) -> None:
    recorded = read_arrays(path)
    heads = int(recorded["heads"])
    assert recorded["W"].shape[0] == heads * int(recorded["head_dim"])
    parts = [weight_svd(part) for part in split_groups(recorded["W"], heads, 1)]
    for part, strengths in zip(parts, recorded["singular_values"], strict=True):
        assert_close(part.strengths, strengths, 1e-5)
    thresholds = np.broadcast_to(recorded["alpha"], heads)
    ranks = [part.rank_above(float(alpha)) for part, alpha in zip(parts, thresholds, strict=True)]
    assert ranks == recorded["ranks"].tolist()
    counted = kept_ranks(
        torch.from_numpy(recorded["singular_values"]),
        torch.from_numpy(thresholds.astype(np.float32))[:, None],
    )
    assert counted.tolist() == ranks
    assert_close(recorded["x"] @ recorded["W"].T, recorded["y_full"], 1e-5)
    check_thresholded(parts, thresholds, recorded)


@each("03")
def test_values_jointly(path: Path) -> None:
    recorded = read_arrays(path)
    whole = weight_svd(recorded["W"])
    assert_close(whole.strengths, recorded["singular_values"], 1e-5)
    alpha = float(recorded["alpha"])
    hard = whole.above(alpha)
    assert hard.rank == int(recorded["rank"])
    assert int(kept_ranks(torch.from_numpy(recorded["singular_values"]), torch.tensor([alpha]))) == hard.rank
    assert_close(hard.up @ (hard.down @ recorded["W"]), recorded["W_hard"], 1e-5)
    check_thresholded([whole], np.array([alpha]), recorded)


@each("04")
def test_budget_losses(path: Path) -> None:
    recorded = read_arrays(path)
    shape = (int(recorded["in_features"]), int(recorded["out_features"]))
    for part in ("k", "v"):
        thresholds = torch.from_numpy(np.atleast_1d(recorded[f"alpha_{part}"]).astype(np.float32))
        assert float(threshold_pressure(thresholds)) == pytest.approx(
            float(recorded[f"comp_loss_{part}"]), rel=1e-6
        )
        rank = int(recorded[f"rank_{part}"])
        assert weight_parameters(rank, *shape) == int(recorded[f"weight_params_{part}"])


@each("06")
@pytest.mark.parametrize("name", ["mha", "gqa7"])
def test_lifted_keys_against_the_official_kernel(path: Path, name: str) -> None:
    recorded = read_arrays(path)
    queries = recorded[f"{name}_q"].astype(np.float64)
    ups = recorded[f"{name}_UT"].astype(np.float64).transpose(0, 2, 1)
    latents = recorded[f"{name}_x"].astype(np.float64)
    heads, head_dim, rank = ups.shape
    rotary = Rotary(recorded["inv_freq"], (head_dim // 2,))
    width = heads * head_dim
    layer = LowRankLayer(
        keys=tuple(Factor(up, np.zeros((rank, head_dim))) for up in ups),
        values=Factor(np.eye(width), np.eye(width)),
        key_bias=np.zeros((heads, head_dim)),
        value_bias=np.zeros((heads, head_dim)),
    )
    for sequence in range(len(queries)):
        rows = latents.shape[2]
        history = LatentRows(
            keys=list(latents[sequence]),
            values=np.zeros((rows, width)),
            positions=np.arange(rows, dtype=np.int32)[:, None],
        )
        attended = attend_low_rank(queries[sequence], history, no_tail(layer), layer, rotary)
        logits = attended.logits * head_dim**0.5
        assert_close(logits, recorded[f"{name}_logits_fp64"][sequence], 1e-9)
        assert_close(logits, recorded[f"{name}_logits_kernel_fp32"][sequence], 1e-4)
        np.testing.assert_allclose(logits, recorded[f"{name}_logits_kernel_fp16"][sequence], atol=0.05)


def no_tail(layer: LowRankLayer) -> Tail:
    empty = np.zeros((0, *layer.key_bias.shape))
    return Tail(empty, empty)


@each("07")
def test_values_of_the_official_integer_kernel(path: Path) -> None:
    """Two blocks of nibbles, each with one scale per token, weighted by probabilities."""
    recorded = read_arrays(path)
    first, rank = int(recorded["upper_rank"]), int(recorded["rank"])
    latents = np.concatenate(
        [
            unpack_nibbles(recorded[f"x_{block}"], count) * recorded[f"scale_{block}"].astype(np.float64)
            for block, count in (("upper", first), ("lower", rank - first))
        ],
        axis=-1,
    )
    result = recorded["p"].astype(np.float64) @ latents
    assert_close(result, recorded["out"], 2e-3)
    assert_close(result, recorded["out_kernel"], 1e-2)


@each("08")
def test_packed_rows_bit_by_bit(path: Path) -> None:
    recorded = read_arrays(path)
    lanes = KeyLanes(tuple(recorded["ranks"].tolist()))
    assert lanes.widths == tuple(recorded["widths"])
    assert lanes.offsets == tuple(recorded["offsets"])
    assert [outliers(rank) for rank in lanes.ranks] == recorded["n_outlier_k"].tolist()
    keys = pack_keys(lanes.split(recorded["k"]), NIBBLES_4_3)
    np.testing.assert_array_equal(keys.codes, recorded["k_bytes"])
    np.testing.assert_array_equal(keys.scales.astype(np.float32), recorded["k_scales"])
    unpacked = lanes.join(unpack_keys(keys, lanes, NIBBLES_4_3))
    np.testing.assert_array_equal(unpacked, recorded["k_dequant"])
    assert keys.bytes_per_row == key_bytes(lanes.ranks, NIBBLES_4_3)

    rank = recorded["v"].shape[1]
    assert outliers(rank) == int(recorded["n_outlier_v"])
    values = pack_values(recorded["v"], NIBBLES_4_3)
    np.testing.assert_array_equal(values.codes, recorded["v_bytes"])
    np.testing.assert_array_equal(values.scales.astype(np.float32), recorded["v_scales"])
    np.testing.assert_array_equal(unpack_values(values, rank, NIBBLES_4_3), recorded["v_dequant"])
    assert values.bytes_per_row == value_bytes(rank, NIBBLES_4_3)


@each("08")
def test_block_rotations(path: Path) -> None:
    """With the recorded signs, read off the first column, where Hadamard's matrix is positive."""
    recorded = read_arrays(path)
    for group, rank in enumerate(recorded["ranks"].tolist()):
        expected = recorded[f"T{group}"]
        signs = [np.sign(expected[start : start + size, start]) for start, size in rotated_parts(rank)]
        rotation = block_rotation(rank, np.concatenate(signs))
        np.testing.assert_allclose(rotation, expected, atol=1e-12)
        factor = fold(Factor(np.eye(rank), np.eye(rank)), rotation)
        np.testing.assert_allclose(factor.up @ factor.down, np.eye(rank), atol=1e-12)


@each("09")
def test_qwen_attention_with_eviction(path: Path) -> None:
    recorded = read_arrays(path)
    queries, hidden = recorded["q_rot"], recorded["hidden"].astype(np.float64)
    heads, rank = recorded["Uk"].shape[0], recorded["Uk"].shape[2]
    weights = [recorded[name].astype(np.float64) for name in ("Wk", "Wv")]
    moments = [
        second_moments(weight, hidden, parts) for weight, parts in zip(weights, (heads, 1), strict=True)
    ]
    layer = LowRankLayer(
        keys=tuple(output_pca(moment).truncated(rank) for moment in moments[0]),
        values=output_pca(moments[1][0]).truncated(recorded["Uv"].shape[1]),
        key_bias=recorded["bk"].reshape(heads, -1),
        value_bias=recorded["bv"].reshape(heads, -1),
    )
    rotary = Rotary(recorded["inv_freq"], tuple(recorded["mrope_section"].tolist()))
    positions = recorded["pos"].T
    cosines, sines = rotary.tables(positions)
    keys, values = (
        (hidden @ weight.T + recorded[bias]).reshape(len(hidden), heads, -1)
        for weight, bias in zip(weights, ("bk", "bv"), strict=True)
    )
    keys = rotate(keys, cosines[:, None], sines[:, None])
    for factor, up, down, weight in zip(
        layer.keys, recorded["Uk"], recorded["VSk"], np.split(weights[0], heads), strict=True
    ):
        assert_close(factor.up @ factor.down @ weight, up @ down, 1e-5)

    kept = recorded["keep"]
    exact = Tail(keys[kept], values[kept])
    nothing = LatentRows([np.zeros((0, rank))] * heads, np.zeros((0, layer.values.rank)), positions[:0])
    attended = attend_low_rank(queries, nothing, exact, layer, rotary)
    assert_close(attended.logits, recorded["logits_evicted"], 1e-6)
    assert_close(attended.heads, recorded["heads_evicted"], 1e-6)

    for name, rows in (("lowrank", np.arange(len(hidden))), ("lowrank_evicted", kept)):
        history = LatentRows(
            keys=layer.key_latents(keys[rows], cosines[rows], sines[rows]),
            values=layer.value_latents(values[rows]),
            positions=positions[rows],
        )
        attended = attend_low_rank(queries, history, no_tail(layer), layer, rotary)
        assert_close(attended.logits, recorded[f"logits_{name}"], 1e-5)
        assert_close(attended.heads, recorded[f"heads_{name}"], 1e-5)


def second_moments(weight: np.ndarray, hidden: np.ndarray, parts: int) -> list[np.ndarray]:
    outputs = np.split(hidden @ weight.T, parts, axis=-1)
    return [part.T @ part / len(part) for part in outputs]


def ragged_layer(recorded: Arrays) -> LowRankLayer:
    """Layer of 09b: factors as recorded. Nothing is compressed with it, so that ``down`` is not needed."""
    ups = np.split(recorded["Uk"].astype(np.float64), np.cumsum(recorded["ranks"])[:-1], axis=1)
    value_up = recorded["Uv"].astype(np.float64)
    return LowRankLayer(
        keys=tuple(Factor(up, np.zeros(up.shape[::-1])) for up in ups),
        values=Factor(value_up, np.zeros(value_up.shape[::-1])),
        key_bias=recorded["bk"].astype(np.float64),
        value_bias=recorded["bv"].astype(np.float64).reshape(recorded["bk"].shape),
    )


def ragged_rotary(recorded: Arrays) -> Rotary:
    pairs = len(recorded["inv_freq"])
    return Rotary(recorded["inv_freq"], (pairs // 4, 3 * pairs // 8, 3 * pairs // 8))


def split_by_rank(recorded: Arrays) -> list[np.ndarray]:
    return np.split(recorded["ck"], np.cumsum(recorded["ranks"])[:-1], axis=1)


@each("09b")
def test_ragged_heads_of_real_size(path: Path) -> None:
    recorded = read_arrays(path)
    layer = ragged_layer(recorded)
    history = LatentRows(split_by_rank(recorded), recorded["cv"], recorded["pos"].T)
    attended = attend_low_rank(recorded["q_rot"], history, no_tail(layer), layer, ragged_rotary(recorded))
    assert_close(attended.logits, recorded["logits"], 1e-6)
    assert_close(attended.heads, recorded["heads"], 1e-6)


@each("10")
def test_output_components_and_ranks(path: Path) -> None:
    recorded = read_arrays(path)
    rank = int(recorded["rank"])
    plain = output_pca(recorded["C"])
    assert_close(plain.energies, recorded["eigenvalues"], 1e-9)
    metric = key_metric(recorded["q_pair_weight"][None])
    for decomposition, name in ((plain, "W_r"), (output_pca(recorded["C"], metric), "W_r_weighted")):
        factor = decomposition.truncated(rank)
        assert_close(factor.up @ factor.down @ recorded["W"], recorded[name], 1e-5)
    ranks = greedy_ranks(list(recorded["spectra"]), recorded["weights"].tolist(), int(recorded["budget"]))
    assert ranks == recorded["ranks"].tolist()


@each("11")
def test_packed_rows_of_real_size(path: Path) -> None:
    """Latents, factors and positions are those of 09b beside it."""
    recorded = read_arrays(path)
    for geometry in map(read_arrays, sorted(path.parent.glob("09b_*.npz"))):
        layer = ragged_layer(geometry)
        lanes = KeyLanes(tuple(geometry["ranks"].tolist()))
        keys = pack_keys(split_by_rank(geometry), NIBBLES_4_3)
        values = pack_values(geometry["cv"], NIBBLES_4_3)
        for packed, part in ((keys, "k"), (values, "v")):
            np.testing.assert_array_equal(packed.codes, recorded[f"{part}_bytes"])
            np.testing.assert_array_equal(packed.scales.astype(np.float32), recorded[f"{part}_scales"])
        stored = PackedRows(recorded["k_bytes"], recorded["k_scales"].astype(ml_dtypes.bfloat16))
        history = LatentRows(
            unpack_keys(stored, lanes, NIBBLES_4_3),
            unpack_values(values, layer.values.rank, NIBBLES_4_3),
            geometry["pos"].T,
        )
        attended = attend_low_rank(geometry["q_rot"], history, no_tail(layer), layer, ragged_rotary(geometry))
        assert_close(attended.logits, recorded["logits"], 1e-6)
        assert_close(attended.heads, recorded["heads"], 1e-6)
        assert_close(softmax(attended.logits).sum(axis=-1), np.ones(len(attended.logits)), 1e-9)
