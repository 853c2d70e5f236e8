# SPDX-License-Identifier: Apache-2.0
"""STaR-KV in official mode against recordings of the official code: every stage, kept set and state."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import Recording, assert_relative, recordings

from starkv.methods.prefill import Prefill
from starkv.methods.rows import official_rows
from starkv.methods.star_kv import StarKVScores, compress
from starkv.methods.star_kv_config import official_flags
from starkv.methods.star_kv_state import StarKVState

SCORES = 2e-6


def prefill_of(call: dict[str, np.ndarray], window: int) -> Prefill:
    """One layer's prefill from a recorded call."""
    tensors = {
        name: torch.from_numpy(call[name])[None]
        for name in ("key", "value", "query_tail", "hidden")
        if name in call
    }
    length = call["key"].shape[2]
    rows = official_rows(length, [(int(a), int(b)) for a, b in call["spans"]], window)
    hidden = tensors.get("hidden")
    return Prefill.of_prompt(
        keys=tensors["key"],
        values=tensors["value"],
        queries=tensors["query_tail"],
        rows=rows,
        window=window,
        hidden_norm=None if hidden is None else hidden.norm(dim=-1),
    )


def check_stages(scores: StarKVScores, call: dict[str, np.ndarray], past: int) -> None:
    def check(name: str, tensor: torch.Tensor | None) -> None:
        if name in call:
            assert tensor is not None, f"{name} was recorded, but not worked out here"
            expected = call[name]
            actual = tensor[0, ..., :past] if expected.shape[-1] == past else tensor[0]
            assert_relative(actual.numpy(), expected, SCORES, name)

    check("attn_pooled", scores.pooled)
    check("S", scores.groups)
    check("MI", scores.information)
    check("w_g", scores.weights)
    check("score_after_mi", scores.after_mi)
    check("stab", scores.stability)
    check("frame_distance", scores.distance)
    check("D", scores.discount)
    check("score_after_temporal", scores.after_temporal)
    check("score_final", scores.final)


def check_state(state: StarKVState, expected: dict[str, Any], call: dict[str, np.ndarray]) -> None:
    assert state.progress.profile_step == expected["profile_step"]
    assert state.progress.temporal_step == expected["temporal_step"]
    assert state.progress.mi_known == ("state_mi_ema" in call)
    if "state_mi_ema" in call:
        assert_relative(state.mi_ema[0, 0].numpy(), call["state_mi_ema"], 1e-6, "mi_ema")
    assert (state.progress.pattern_cells > 0) == ("state_pattern_ema" in call)
    if "state_pattern_ema" in call:
        assert_relative(state.pattern_ema[0, 0].numpy(), call["state_pattern_ema"], SCORES, "pattern_ema")
    temperature = expected["aeb_temperature_ema"]
    assert state.progress.temperature_known == (temperature is not None)
    if temperature is not None:
        assert float(state.temperature[0, 0]) == pytest.approx(temperature, rel=1e-6)


@pytest.mark.parametrize("path", recordings("starkv"), ids=lambda path: path.stem)
def test_official_mode_reproduces_the_recording(path: Path) -> None:
    recording = Recording.read(path)
    config = official_flags(
        recording.config["flags"], recording.config["pooling"], recording.config["kernel_size"]
    )
    state = StarKVState.initial(1, 1, recording.config["n_kv"])
    for index, expected in enumerate(recording.config["calls"]):
        call = recording.call(index)
        if not expected["hidden_states_given"]:
            call.pop("hidden", None)
        if expected["reset_before"]:
            state = state.next_sample()
        prefill = prefill_of(call, expected["window"])
        length = call["key"].shape[2]
        kept, scores, state = compress(prefill, state, config, expected["capacity"], length)
        positions = call["cache_positions"]
        if expected["noop"]:
            assert kept is None
            assert scores is None
            np.testing.assert_array_equal(positions[0], np.arange(length))
        else:
            assert kept is not None
            assert scores is not None
            np.testing.assert_array_equal(kept.rows[0, :, 0].numpy(), positions)
            batch = np.arange(len(positions))[:, None]
            for name, cache in (("key", kept.keys), ("value", kept.values)):
                expected_rows = call[name].transpose(0, 2, 1, 3)[batch, positions].transpose(0, 2, 1, 3)
                np.testing.assert_array_equal(cache[0].numpy(), expected_rows)
            check_stages(scores, call, length - expected["window"])
            if "lambda_eff" in call:
                assert scores.mi_weight == pytest.approx(call["lambda_eff"][0])
        check_state(state, expected["state_after"], call)
