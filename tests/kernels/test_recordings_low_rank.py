# SPDX-License-Identifier: Apache-2.0
"""Low-rank decode attention against recordings: of the official kernel, and of an independent reference.

The recordings hold rotated queries, factors, latents (plain or packed) and what comes out.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decode_checks import assert_close
from numpy.typing import NDArray
from torch import Tensor

from starkv.kernels.cached_positions import CachedPositions
from starkv.kernels.low_rank_call import LowRankCall
from starkv.kernels.low_rank_factors import LatentForm, LowRankFactors
from starkv.kernels.low_rank_reference import key_latents, reference_low_rank_attention, value_latents
from starkv.kernels.triton_low_rank import low_rank_attention
from starkv.kernels.triton_low_rank_scores import ScoreTiles, tile_scores

RECORDINGS = Path(__file__).parents[1] / "golden" / "lowrank"
Recorded = dict[str, NDArray[Any]]


def recorded(name: str) -> Recorded:
    with np.load(RECORDINGS / f"{name}.npz") as file:
        return dict(file)


def tensor(array: NDArray[Any], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)


def places(
    positions: NDArray[Any],
    inverse_frequencies: NDArray[Any],
    sections: tuple[int, int, int],
    device: torch.device,
) -> CachedPositions:
    """``positions [B, rows, 3]``."""
    angles = np.arange(positions.max() + 1)[:, None] * inverse_frequencies
    return CachedPositions(
        tensor(positions, device, torch.int32),
        tensor(np.cos(angles), device),
        tensor(np.sin(angles), device),
        sections,
    )


def padded_latents(latents: list[NDArray[Any]]) -> NDArray[Any]:
    """Latents of the key factors side by side, each filled up to a multiple of 16 lanes."""
    widths = [-(-latent.shape[-1] // 16) * 16 for latent in latents]
    parts = zip(latents, widths, strict=True)
    return np.concatenate(
        [np.pad(latent, [(0, 0)] * 2 + [(0, width - latent.shape[-1])]) for latent, width in parts], -1
    )


@pytest.mark.parametrize("name", ["mha", "gqa7"])
def test_logits_of_the_official_kernel(name: str, device: torch.device) -> None:
    """Positions count from 0 there, logits are not scaled and there is no bias."""
    recording = recorded("06_abx_rope")
    q, up, latents = (recording[f"{name}_{part}"] for part in ("q", "UT", "x"))
    batch, groups, rows, rank = latents.shape
    positions = np.broadcast_to(np.arange(rows)[:, None], (batch, rows, 3))
    zeros = torch.zeros(groups, 128, device=device)
    factors = [tensor(head.T, device) for head in up]
    call = LowRankCall(
        q=tensor(q, device),
        keys=tensor(padded_latents(list(latents.swapaxes(0, 1))), device),
        values=torch.zeros(batch, rows, 1, device=device),
        n_valid=torch.full((batch,), rows, dtype=torch.int32, device=device),
        where=places(positions, recording["inv_freq"], (64, 0, 0), device),
        factors=LowRankFactors.of(
            "float", factors, torch.zeros(groups * 128, 1, device=device), zeros, zeros
        ),
    )
    assert factors[0].shape == (128, rank)
    call.check()
    scores = tile_scores(call, ScoreTiles())
    by_tile = scores.mass.unflatten(-1, (scores.largest.shape[-1], -1)).log() + scores.largest[..., None]
    logits = by_tile.flatten(-2)[..., :rows] * 128**0.5
    exact = torch.from_numpy(recording[f"{name}_logits_fp64"])
    assert_close(logits, exact, 1e-5 * float(exact.abs().max()))
    official = torch.from_numpy(recording[f"{name}_logits_kernel_fp32"])
    assert_close(logits, official, 1e-4)


def qwen_call(form: LatentForm, dtype: torch.dtype, device: torch.device) -> tuple[LowRankCall, NDArray[Any]]:
    """28/4 heads of 128, M-RoPE, biases, ragged ranks, 96 rows that eviction left; and what must come out."""
    plain, packed = recorded("09b_qwen7b_heads"), recorded("11_onnx_packed")
    borders = np.cumsum(plain["ranks"])[:-1]
    call = LowRankCall(
        q=tensor(plain["q_rot"][None], device, dtype),
        keys=tensor(plain["ck"][None], device, dtype),
        values=tensor(plain["cv"][None], device, dtype),
        n_valid=torch.tensor([96], dtype=torch.int32, device=device),
        where=places(plain["pos"].T[None], plain["inv_freq"], (16, 24, 24), device),
        factors=LowRankFactors.of(
            form,
            [tensor(up, device, dtype) for up in np.split(plain["Uk"], borders, 1)],
            tensor(plain["Uv"], device, dtype),
            tensor(plain["bk"], device),
            tensor(plain["bv"].reshape(4, 128), device),
        ),
    )
    if form == "float":
        return call, plain["heads"]
    call.keys = tensor(packed["k_bytes"][None], device, torch.uint8)
    call.values = tensor(packed["v_bytes"][None], device, torch.uint8)
    call.key_scales = tensor(packed["k_scales"][None], device, torch.bfloat16)
    call.value_scales = tensor(packed["v_scales"][None], device, torch.bfloat16)
    return call, packed["heads"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["float", "int4"])
def test_heads_at_the_shape_of_qwen(form: LatentForm, dtype: torch.dtype, device: torch.device) -> None:
    call, heads = qwen_call(form, dtype, device)
    expected = torch.from_numpy(heads)[None]
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype] * float(expected.abs().max())
    assert_close(reference_low_rank_attention(call).out, expected, tolerance)
    assert_close(low_rank_attention(call).out, expected, tolerance)


def test_the_packed_format() -> None:
    """Ranks 26, 37, 16 and 48 for keys, 154 for values; the fourth token is zero."""
    packed, cpu = recorded("08_kv_quant_format"), torch.device("cpu")
    ranks = [int(rank) for rank in packed["ranks"]]
    zeros = torch.zeros(4, 64)
    factors = LowRankFactors.of(
        "int4", [torch.zeros(64, rank) for rank in ranks], torch.zeros(256, 154), zeros, zeros
    )
    rows = len(packed["k_bytes"])
    positions = np.zeros((1, rows, 3), np.int64)
    call = LowRankCall(
        q=torch.zeros(1, 4, 64),
        keys=tensor(packed["k_bytes"][None], cpu, torch.uint8),
        values=tensor(packed["v_bytes"][None], cpu, torch.uint8),
        n_valid=torch.tensor([rows], dtype=torch.int32),
        where=places(positions, np.ones(32), (32, 0, 0), cpu),
        factors=factors,
        key_scales=tensor(packed["k_scales"][None], cpu, torch.bfloat16),
        value_scales=tensor(packed["v_scales"][None], cpu, torch.bfloat16),
    )
    call.check()
    for latent, first, rank in zip(key_latents(call), packed["offsets"], ranks, strict=True):
        assert np.array_equal(latent[0].numpy(), packed["k_dequant"][:, first : first + rank])
    assert np.array_equal(value_latents(call)[0].numpy(), packed["v_dequant"])
    assert factors.lanes[:, 2].tolist() == packed["n_outlier_k"].tolist()
    assert factors.value_outliers == packed["n_outlier_v"]
