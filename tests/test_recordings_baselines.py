# SPDX-License-Identifier: Apache-2.0
"""Baselines against recordings of the official code: scores, residuals and the rows that each head keeps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import Recording, assert_relative, recordings

from starkv.methods.budget import pyramid_rows
from starkv.methods.gui_kv import GuiKV, frame_residuals, redundant_rows
from starkv.methods.method import compress_with
from starkv.methods.prefill import Prefill
from starkv.methods.pyramidkv import PyramidKV
from starkv.methods.rows import ROW_FRAME, PromptRows, official_rows
from starkv.methods.snapkv import SnapKV
from starkv.methods.vl_cache import VLCache

SCORES = 2e-6
RESIDUALS = 1e-5


def method_of(config: dict[str, Any]) -> SnapKV:
    """The recorded method, one index set per query head."""
    common = {
        "window": config["window"],
        "pooling": config.get("pooling", "avgpool"),
        "heads": "attention",
    }
    if "kernel_size" in config:
        common["kernel"] = config["kernel_size"]
    by_prefix: dict[str, Callable[[], SnapKV]] = {
        "snapkv": lambda: SnapKV(**common),
        "pyramidkv": lambda: PyramidKV(**common, beta=config["beta"]),
        "vlcache": lambda: VLCache(**common, layer_budgets=(config["layer_budget"],)),
        "guikv": lambda: GuiKV(**common, boost=config["alpha"], boost_temperature=config["temperature"]),
    }
    return by_prefix[config["name"].split("_")[0]]()


def rows_of(config: dict[str, Any], window: int) -> PromptRows:
    return official_rows(config["q_len"], [(int(start), int(end)) for start, end in config["spans"]], window)


def prefill_of(recording: Recording, method: SnapKV) -> Prefill:
    """The recorded layer, as often as the recorded model has layers where their number matters."""
    config = recording.config
    layers = config.get("num_hidden_layers", 1)

    def tensor(name: str) -> torch.Tensor:
        array = recording.arrays[name]
        return torch.from_numpy(array).expand(layers, *array.shape)

    window = method.window_for(rows_of(config, 1), min(config["capacity"], config["q_len"]))
    return Prefill.of_prompt(
        keys=tensor("key"),
        values=tensor("value"),
        queries=tensor("query_tail"),
        rows=rows_of(config, window),
        window=window,
        hidden_norm=tensor("hidden").norm(dim=-1) if "hidden" in recording.arrays else None,
    )


def check_redundancy(recording: Recording, method: GuiKV, prefill: Prefill) -> None:
    """Residuals of older screenshots' keys, per query head, and how many rows they cost."""
    residuals = frame_residuals(prefill, method.rank)
    history = (prefill.row_meta[0, 0, :, ROW_FRAME] >= 0) & prefill.is_past[0, 0]
    history &= prefill.row_meta[0, 0, :, ROW_FRAME] < prefill.frame.index
    repeats = recording.config["n_rep"]
    per_head = residuals[0, :, :, history].repeat_interleave(repeats, 1).flatten(0, 1)
    assert_relative(per_head.numpy(), recording.arrays["residual_norms"], RESIDUALS, "residual_norms")
    redundant = redundant_rows(prefill, residuals, recording.config["capacity"])
    pruned = redundant[0].sum(-1).repeat_interleave(repeats, -1).flatten()
    np.testing.assert_array_equal(pruned.numpy(), recording.arrays["n_pruned_history_per_head"])


@pytest.mark.parametrize("path", recordings("baselines"), ids=lambda path: path.stem)
def test_baseline_reproduces_the_recording(path: Path) -> None:
    recording = Recording.read(path)
    config, arrays = recording.config, recording.arrays
    method, layer = method_of(config), config.get("layer_idx", 0)
    prefill = prefill_of(recording, method)
    positions = np.sort(arrays["cache_positions"], -1)
    kept = compress_with(method, prefill, config["capacity"], config["q_len"])
    if kept is None:
        assert positions.shape[-1] == config["q_len"]
        return
    rows = kept.rows[layer, :, :, : int(kept.kv_len[layer, 0])].numpy()
    np.testing.assert_array_equal(rows, positions)
    batch, head = np.ogrid[: positions.shape[0], : positions.shape[1]]
    for name, cache in (("key", kept.keys), ("value", kept.values)):
        expected = arrays[name].repeat(config["n_rep"], 1)[batch[..., None], head[..., None], positions]
        np.testing.assert_array_equal(cache[layer, :, :, : positions.shape[-1]].numpy(), expected)
    if "score_final" in arrays:
        past = arrays["score_final"].shape[-1]
        assert past == config["q_len"] - config["window_effective"]
        scores = method.score(prefill, config["capacity"])[layer, ..., :past].numpy()
        assert_relative(scores, arrays["score_final"], SCORES, "score_final")
        if "residual_norms" in arrays:
            np.testing.assert_array_equal(scores == 0, arrays["score_final"] == 0)
    if "residual_norms" in arrays:
        assert isinstance(method, GuiKV)
        check_redundancy(recording, method, prefill)


@pytest.mark.parametrize("path", recordings("baselines"), ids=lambda path: path.stem)
def test_an_index_set_per_kv_head_costs_no_more_than_the_cache(path: Path) -> None:
    recording = Recording.read(path)
    config = recording.config
    method = replace(method_of(config), heads="kv")
    kept = compress_with(method, prefill_of(recording, method), config["capacity"], config["q_len"])
    if kept is not None:
        layer = config.get("layer_idx", 0)
        assert kept.keys.shape[2] == config["n_kv"]
        assert int(kept.kv_len[layer, 0]) == recording.arrays["cache_positions"].shape[-1]


@pytest.mark.parametrize("path", recordings("baselines", "*.json"), ids=lambda path: path.stem)
def test_pyramid_has_the_recorded_rows_in_every_layer(path: Path) -> None:
    for recorded in json.loads(path.read_text()).values():
        lengths = recorded["cache_len_per_layer"]
        rows = pyramid_rows(len(lengths), recorded["q_len"], recorded["capacity"], recorded["window"])
        assert list(rows) == lengths
