# SPDX-License-Identifier: Apache-2.0
"""A whole model with STaR-KV in official mode against recordings of the official code in transformers.

The prompts of a trajectory, their compressed caches, and the replies decoded from them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import Recording, assert_relative, recordings

from starkv.manifest import TextShape
from starkv.methods.prefill import Prefill
from starkv.methods.rows import official_rows
from starkv.methods.star_kv import compress
from starkv.methods.star_kv_config import official_flags
from starkv.methods.star_kv_state import StarKVState
from starkv.runtime.engines.torch_decoder import DecoderStep, TorchCache, TorchDecoder
from starkv.runtime.preprocess.positions import rope_tables

LOGITS, CACHE = 1e-4, 1e-5
SCORES = 1e-4
"""Relative; wider than for the other recordings, since here queries and keys are worked out as well."""


class RecordedModel:
    """The decoder with a recording's weights."""

    def __init__(self, recording: Recording) -> None:
        config = recording.config
        self.shape = TextShape(
            layers=config["layers"],
            hidden=config["hidden"],
            intermediate=config["intermediate"],
            heads=config["n_heads"],
            kv_heads=config["n_kv"],
            head_dim=config["head_dim"],
            vocab=config["vocab"],
            rope_theta=config["rope_theta"],
            mrope_section=config["mrope_section"],
            max_positions=4096,
            tied_embedding=False,
        )
        weights = {
            name.removeprefix("w/"): torch.from_numpy(array)
            for name, array in recording.arrays.items()
            if name.startswith("w/")
        }
        self.decoder = TorchDecoder(self.shape, config["rms_eps"], weights)
        self.embedding = weights["embed_tokens.weight"]

    def step(self, embeds: torch.Tensor, positions: np.ndarray, cache: TorchCache) -> DecoderStep:
        """Append embeddings ``[S, hidden]`` at positions ``[3, S]``."""
        cos, sin = (torch.from_numpy(table) for table in rope_tables(positions, self.shape))
        return self.decoder.step(embeds[None], cos, sin, cache)

    def decode(self, tokens: np.ndarray, positions: np.ndarray, cache: TorchCache) -> np.ndarray:
        """Logits ``[T, vocab]`` behind each of T tokens, fed one by one at positions ``[T, 3]``."""
        embeds = self.embedding[torch.from_numpy(tokens).long()]
        steps = [
            self.step(embeds[index : index + 1], place[:, None], cache)
            for index, place in enumerate(positions)
        ]
        return torch.cat([step.logits for step in steps]).numpy()


def with_room(cache: torch.Tensor, rows: int) -> torch.Tensor:
    """``[L, B, M, K, D]`` with ``rows`` more rows."""
    return torch.nn.functional.pad(cache, (0, 0, 0, rows))


def assert_reply(logits: np.ndarray, expected: np.ndarray, generated: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS, err_msg=name)
    np.testing.assert_array_equal(logits.argmax(-1), generated, err_msg=name)


@pytest.mark.parametrize("path", recordings("e2e"), ids=lambda path: path.stem)
def test_a_trajectory_is_decoded_as_recorded(path: Path) -> None:
    recording = Recording.read(path)
    model, config = RecordedModel(recording), official_flags(recording.config["flags"])
    shape = model.shape
    state = StarKVState.initial(shape.layers, 1, shape.kv_heads)
    for index, expected in enumerate(recording.config["calls"]):
        call = recording.call(index)
        prompt, positions = torch.from_numpy(call["inputs_embeds"][0]), call["decode_position_ids"]
        length, window, steps = len(prompt), expected["window"], len(positions)
        full = TorchCache.allocate(shape, 1, length + steps, torch.float32)
        first = model.step(prompt, call["position_ids"][:, 0], full)
        prefill = Prefill.of_prompt(
            keys=full.keys[:, :, :, :length].clone(),
            values=full.values[:, :, :, :length].clone(),
            queries=first.queries,
            rows=official_rows(length, [(int(a), int(b)) for a, b in call["spans"]], window),
            window=window,
            hidden_norm=first.hidden_norm,
        )

        logits = model.decode(call["full_generated"][:-1], positions, full)
        logits = np.concatenate([first.logits.numpy(), logits])
        assert_reply(logits, call["full_logits"], call["full_generated"], f"call {index}, full cache")

        kept, scores, state = compress(prefill, state, config, expected["capacity"], length)
        assert kept is not None
        assert scores is not None
        assert state.progress.profile_step == expected["profile_step"]
        assert state.progress.temporal_step == expected["temporal_step"]
        for layer in range(shape.layers):
            name = f"call {index}, layer {layer}"
            stored = {key.removeprefix(f"L{layer}_"): array for key, array in call.items()}
            np.testing.assert_array_equal(kept.rows[layer, 0, 0], stored["cache_positions"], err_msg=name)
            for cache, key in ((kept.keys, "k_cache"), (kept.values, "v_cache")):
                np.testing.assert_allclose(cache[layer, 0], stored[key], rtol=CACHE, atol=CACHE, err_msg=name)
            past = scores.final[layer, 0, : length - window]
            assert_relative(past, stored["score_final"], SCORES, name)
            if "state_mi_ema" in stored:
                assert_relative(state.mi_ema[layer, 0], stored["state_mi_ema"], SCORES, name)
            if "state_pattern_ema" in stored:
                assert_relative(state.pattern_ema[layer, 0], stored["state_pattern_ema"], SCORES, name)

        small = TorchCache(
            with_room(kept.keys, steps), with_room(kept.values, steps), kept.kv_len.to(torch.int32)
        )
        logits = np.concatenate(
            [first.logits.numpy(), model.decode(call["generated"][:-1], positions, small)]
        )
        assert_reply(logits, call["logits"], call["generated"], f"call {index}, compressed")
