# SPDX-License-Identifier: Apache-2.0
"""Scores of the baselines against naive loops, and against the engines' own arithmetic."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from random_prefill import LENGTH, prefill_for, random_prefill, two_screenshots

from starkv.errors import UsageError
from starkv.methods.budget import Budget
from starkv.methods.gui_kv import GuiKV
from starkv.methods.h2o import H2O
from starkv.methods.method import compress_with
from starkv.methods.prefill import Prefill
from starkv.methods.random import RandomRows
from starkv.methods.registry import StarKV, make_method
from starkv.methods.rows import prompt_rows
from starkv.methods.snapkv import SnapKV
from starkv.methods.streaming_llm import StreamingLLM
from starkv.methods.vl_cache import VLCache, attention_sparsity, shared_rows
from starkv.runtime.kv import baselines
from starkv.runtime.kv.policy import KvPolicy

LAST_TEXT = 15
"""Rows behind the last screenshot of ``two_screenshots``."""


def naive_attention(prefill: Prefill, layer: int, head: int, count: int) -> np.ndarray:
    """``[count, C]``: attention of the last queries of one head of the first sequence, row by row."""
    groups, heads = prefill.keys.shape[2], prefill.queries.shape[2]
    keys = prefill.keys[layer, 0, head * groups // heads].double().numpy()
    weights = np.zeros((count, len(keys)))
    for query in range(count):
        seen = len(keys) - count + query + 1
        logits = keys[:seen] @ prefill.queries[layer, 0, head, -count + query].double().numpy()
        exponentials = np.exp(logits / np.sqrt(keys.shape[1]))
        weights[query, :seen] = exponentials / exponentials.sum()
    return weights


def naive_scores(prefill: Prefill, layer: int, head: int, window: int) -> np.ndarray:
    """``[C − W]``: SnapKV's pooled scores of one head."""
    mass = naive_attention(prefill, layer, head, window).sum(0)[:-window]
    padded = np.pad(mass, 2)
    return np.array([padded[row : row + 5].sum() / 5 for row in range(len(mass))])


@pytest.mark.parametrize("rows", [9, 30, 70])
def test_gui_kv_boosts_and_prunes_as_described(rows: int) -> None:
    method = GuiKV(heads="attention", boost=1.5, rank=20)
    prefill = prefill_for(method, rows)
    assert prefill.hidden_norm is not None
    scores = method.score(prefill, rows)
    (old_start, old_end), (start, end) = two_screenshots().spans
    for layer in range(3):
        norms = prefill.hidden_norm[layer, 0, start:end].double().numpy()
        z = (norms - norms.mean()) / norms.std(ddof=1)
        boost = 1.5 * np.exp(z / 3.5) / np.exp(z / 3.5).sum()
        for head in range(6):
            expected = naive_scores(prefill, layer, head, prefill.window)
            expected[start:end] += boost
            keys = prefill.keys[layer, 0, head // 3].double().numpy()
            spanning = keys[start : start + 20].T
            distances = []
            for row in range(old_start, old_end):
                solution = np.linalg.lstsq(spanning, keys[row], rcond=None)[0]
                distances.append((float(np.linalg.norm(keys[row] - spanning @ solution)), row))
            for _, row in sorted(distances)[: int((1.0 - rows / LENGTH) * len(distances))]:
                expected[row] = 0.0
            np.testing.assert_allclose(scores[layer, 0, head, : len(expected)], expected, rtol=1e-5)


def test_vl_cache_windows_follow_the_layers_budgets() -> None:
    method = VLCache(layer_budgets=(40, LAST_TEXT, 2))
    prefill = prefill_for(method, 20)
    scores = method.score(prefill, 20)
    kept = compress_with(method, prefill, 20, LENGTH)
    assert kept is not None
    assert kept.kv_len[:, 0].tolist() == [40, LAST_TEXT, 2]
    for layer, (window, competing) in enumerate([(LAST_TEXT, 25), (LAST_TEXT - 1, 1), (1, 1)]):
        for head in range(6):
            expected = naive_scores(prefill, layer, head, window)
            np.testing.assert_allclose(scores[layer, 0, head, : LENGTH - window], expected, rtol=1e-5)
            best = sorted(np.argsort(-expected, kind="stable")[:competing].tolist())
            rows = kept.rows[layer, 0, head, : competing + window].tolist()
            assert rows == [*best, *range(LENGTH - window, LENGTH)]


def test_vl_cache_gives_rows_to_layers_whose_attention_counts() -> None:
    prefill = random_prefill(1)
    sparsity = attention_sparsity(prefill).numpy()
    for layer in range(3):
        shares = []
        for head in range(6):
            weights = naive_attention(prefill, layer, head, LAST_TEXT)
            shares.append(np.mean(weights[weights > 0] <= 0.01))
        assert sparsity[layer] == pytest.approx(np.mean(shares), abs=1e-6)
    assert shared_rows(torch.tensor([0.75, 0.5, 0.25]), 20).tolist() == [10, 20, 30]
    assert shared_rows(torch.full((28,), 0.9), 121).tolist() == [121] * 28
    assert shared_rows(torch.tensor([1.0, 0.0]), 2000).tolist() == [4, 4000]
    # 90 · 0.7 is 62.99…9 in binary fractions.
    assert shared_rows(torch.tensor([0.625, 0.125]), 45).tolist() == [27, 63]
    assert shared_rows(torch.ones(2), 20).tolist() == [2, 2]
    assert VLCache().queries_for(two_screenshots(), 20) == LAST_TEXT
    assert VLCache().queries_for(prompt_rows(50, [], []), 20) == 8


def test_vl_cache_without_a_screenshot_has_the_usual_window() -> None:
    text = prompt_rows(50, [], [])
    method = VLCache(layer_budgets=(20, 20, 20))
    prefill = prefill_for(method, 20, rows=text)
    expected = naive_scores(prefill, 2, 5, 8)
    np.testing.assert_allclose(method.score(prefill, 20)[2, 0, 5, :42], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(2, [0, 89]), (4, [0, 1, 2, 89]), (5, [0, 1, 2, 3, 89]), (7, [0, 1, 2, 3, 87, 88, 89])],
)
def test_streaming_llm_keeps_sinks_and_the_end(rows: int, expected: list[int]) -> None:
    method = StreamingLLM()
    kept = compress_with(method, prefill_for(method, rows), rows, LENGTH)
    assert kept is not None
    assert kept.rows[:, 0, 0].tolist() == [expected] * 3


def test_random_rows_depend_on_seed_and_layer_alone() -> None:
    prefill = random_prefill(8)
    drawn = RandomRows(seed=3).score(prefill, 20)
    assert torch.equal(drawn, RandomRows(seed=3).score(random_prefill(8, seed=1), 40))
    assert not torch.equal(drawn, RandomRows(seed=4).score(prefill, 20))
    assert not torch.equal(drawn[0], drawn[1])
    assert 0.4 < float(drawn.mean()) < 0.6


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "gui_kv", "streaming_llm", "random"])
@pytest.mark.parametrize("ratio", [0.08, 0.3, 1.0])
def test_engines_keep_the_same_rows(name: str, ratio: float) -> None:
    """The engines' host arithmetic, with the attention that their graphs put out."""
    policy = KvPolicy(name, Budget(ratio), seed=5)
    rows, prompt = policy.kept_rows(LENGTH), two_screenshots()
    method = make_method(name, **({"seed": 5} if name == "random" else {}))
    assert not isinstance(method, StarKV)
    prefill = prefill_for(method, rows)
    kept = compress_with(method, prefill, rows, LENGTH)
    assert kept is not None
    assert prefill.hidden_norm is not None
    kv = SimpleNamespace(keys=prefill.keys.numpy(), capacity=LENGTH)
    arena: Any = SimpleNamespace(kv=kv, host_kv=kv, hidden_norm=prefill.hidden_norm.numpy())

    def score_window(window: int) -> np.ndarray:
        return SnapKV().score(random_prefill(window), rows)[:, 0].numpy()

    choice = baselines.choose(policy, prompt, arena, score_window)
    assert [*choice.keep] == kept.kv_len[:, 0].tolist()
    priorities = baselines.priorities(choice, LENGTH)
    for (layer, _, index), _ in np.ndenumerate(priorities[..., 0]):
        best = np.argsort(-priorities[layer, 0, index], kind="stable")[: choice.keep[layer]]
        assert kept.rows[layer, 0, index, : choice.keep[layer]].tolist() == sorted(best.tolist())


def test_methods_say_what_a_prefill_lacks() -> None:
    prefill = random_prefill(8)
    bare = Prefill.of_prompt(
        prefill.keys, prefill.values, prefill.queries[:, :, :, -8:], two_screenshots(), window=8
    )
    with pytest.raises(UsageError, match="h2o needs the attention"):
        H2O().score(bare, 20)
    with pytest.raises(UsageError, match="with_sparsity"):
        VLCache().score(bare, 20)
    with pytest.raises(UsageError, match="asks the 15 queries behind the last screenshot"):
        VLCache(layer_budgets=(30, 30, 30)).score(bare, 20)
    # Budgets of 9 rows have windows of 8.
    VLCache(layer_budgets=(9, 9, 9)).score(bare, 20)
    with pytest.raises(UsageError, match="2 layer budgets for 3 layers"):
        VLCache(layer_budgets=(30, 30)).score(prefill, 20)
    assert torch.equal(GuiKV().score(bare, 20), SnapKV().score(bare, 20))
