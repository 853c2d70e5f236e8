# SPDX-License-Identifier: Apache-2.0
"""The kernels against recordings of the official STaR-KV: kept rows exactly, scores and state closely."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import Recording, assert_relative, recordings

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.cuda_library import KernelLibrary
from starkv.methods.prefill import Prefill
from starkv.methods.rows import official_rows
from starkv.methods.star_kv_config import official_flags
from starkv.methods.star_kv_plan import layer_limits, plan_step, skipped_call
from starkv.methods.star_kv_state import StarKVState

SCORES = 1e-5
HEAD_DIM = 64
"""The recordings have 16, which no model has: zeros fill up to what the kernels take."""
INTERPRETED_CALLS = 1
"""Calls of a recording that Triton's interpreter has time for."""


def widened(array: np.ndarray, scale: float = 1.0) -> torch.Tensor:
    """``[B, heads, rows, D]`` → ``[1, B, heads, rows, 64]``."""
    tensor = torch.from_numpy(array)[None] * scale
    return torch.nn.functional.pad(tensor, (0, HEAD_DIM - tensor.shape[-1]))


def prefill_of(call: dict[str, np.ndarray], window: int, with_hidden: bool) -> Prefill:
    length, dim = call["key"].shape[2:]
    rows = official_rows(length, [(int(a), int(b)) for a, b in call["spans"]], window)
    return Prefill.of_prompt(
        keys=widened(call["key"]),
        values=widened(call["value"]),
        # A power of two, so exact: scores are divided by the root of the wider dimension.
        queries=widened(call["query_tail"], (HEAD_DIM / dim) ** 0.5),
        rows=rows,
        window=window,
        hidden_norm=torch.from_numpy(call["hidden"])[None].norm(dim=-1) if with_hidden else None,
    )


def check_recording(
    compress: Callable[[CompressCall], CompressResult], path: Path, device: torch.device, calls: int | None
) -> None:
    recording = Recording.read(path)
    flags = recording.config["flags"], recording.config["pooling"], recording.config["kernel_size"]
    config = official_flags(*flags)
    state = StarKVState.initial(1, 1, recording.config["n_kv"], device)
    for index, expected in enumerate(recording.config["calls"][:calls]):
        recorded = recording.call(index)
        if expected["reset_before"]:
            state = state.next_sample()
        length = recorded["key"].shape[2]
        if expected["noop"]:
            state = replace(state, progress=skipped_call(config, state.progress))
            continue
        window = expected["window"]
        prefill = prefill_of(recorded, window, expected["hidden_states_given"])
        plan, progress = plan_step(config, state.progress, prefill.frame)
        if prefill.hidden_norm is None:
            plan = replace(plan, boost=0.0)
        limits = layer_limits(plan, expected["capacity"], window, length - window, 0)
        on_device = {
            name: getattr(prefill, name).to(device)
            for name in ("keys", "values", "queries", "kv_len", "row_meta")
        }
        norm = prefill.hidden_norm
        prefill = replace(prefill, **on_device, hidden_norm=None if norm is None else norm.to(device))
        keys = torch.empty(1, 1, recorded["key"].shape[1], length, HEAD_DIM, device=device)
        meta = torch.empty(1, 1, length, 4, dtype=torch.int32, device=device)
        slot = torch.zeros(1, dtype=torch.int32)
        parts = (config.pooling, config.kernel)
        call = CompressCall.of(
            prefill, state, plan, limits, (keys, torch.empty_like(keys), meta), slot, *parts
        )
        result = compress(call)
        kept = recorded["cache_positions"]
        count = kept.shape[1]
        np.testing.assert_array_equal(result.rows[0, :, 0, :count].cpu().numpy(), kept)
        assert result.new_len.tolist() == [[count]]
        wanted = call.k[0, 0, :, torch.from_numpy(kept[0]).to(device)]
        assert torch.equal(keys[0, 0, :, :count], wanted)
        past = length - window
        if "score_final" in recorded:
            scores = result.scores[0, :, :past].cpu().numpy()
            assert_relative(scores, recorded["score_final"].reshape(scores.shape), SCORES, "scores")
        state = StarKVState(progress, result.mi_ema, result.pattern_ema, result.temperature)
        if "state_mi_ema" in recorded:
            assert_relative(state.mi_ema[0, 0].cpu().numpy(), recorded["state_mi_ema"], SCORES, "mi_ema")
        if "state_pattern_ema" in recorded:
            pattern = state.pattern_ema[0, 0, :, : progress.pattern_cells].cpu().numpy()
            assert_relative(pattern, recorded["state_pattern_ema"], SCORES, "pattern_ema")


@pytest.mark.parametrize("path", recordings("starkv"), ids=lambda path: path.stem)
def test_cuda_reproduces_the_recording(path: Path, kernels: KernelLibrary, device: torch.device) -> None:
    check_recording(kernels.compress, path, device, None)


@pytest.mark.parametrize("path", recordings("starkv"), ids=lambda path: path.stem)
def test_triton_reproduces_the_recording(path: Path, device: torch.device) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from starkv.kernels.triton_compress import compress

    check_recording(compress, path, device, None if device.type == "cuda" else INTERPRETED_CALLS)
