# SPDX-License-Identifier: Apache-2.0
"""The benchmark that looks for what a stream loses changes one thing at a time."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.rows import ROW_FRAME, ROW_TOKEN
from starkv.runtime.agent import Agent
from starkv.runtime.kv.policy import KvPolicy
from starkv.synthetic.samples import Sample
from starkv.synthetic.suite import trajectory_samples

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TOKENS = 24
LESS_THAN_EVERYTHING = {
    "behind all text",
    "behind all text and the first screenshot",
    "behind all text and the screenshot before",
}


@pytest.fixture
def causes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stream_causes

    return stream_causes


@pytest.fixture
def transplanter(causes: Any, gui_tiny_engine: Path) -> Any:
    return causes.Transplanter(Agent.load(gui_tiny_engine, threads=1), TOKENS)


@pytest.fixture(scope="module")
def questions() -> list[Sample]:
    """The first of two episodes, with three and with more screenshots."""
    return list(islice(trajectory_samples("validation", 0, 13), 0, 13, 12))


def test_where_nothing_is_lost_transplants_change_nothing(
    causes: Any, transplanter: Any, questions: list[Sample]
) -> None:
    for sample in questions:
        asked = transplanter.question(sample, KvPolicy())
        replies = {name: variant(transplanter, asked) for name, variant in causes.VARIANTS.items()}
        assert set(replies) > LESS_THAN_EVERYTHING
        assert len({text for name, text in replies.items() if name not in LESS_THAN_EVERYTHING}) == 1


def test_only_what_a_variant_names_is_another(
    causes: Any, transplanter: Any, questions: list[Sample]
) -> None:
    asked = transplanter.question(questions[0], KvPolicy(STAR_KV, Budget(0.1)))
    mixed = causes.same_tokens(asked.exact, asked.kept)
    drawn = causes.as_many_at_random(asked)
    text = len(asked.history())
    for layer, meta in enumerate(asked.kept.row_meta):
        np.testing.assert_array_equal(mixed.row_meta[layer][:, ROW_TOKEN], meta[:, ROW_TOKEN])
        last = meta[:, ROW_TOKEN] >= asked.first
        difference = np.abs(mixed.keys[layer] - asked.kept.keys[layer]).max((0, 2))
        # The first layer's keys know nothing of what came before; values of deeper layers do.
        assert (difference[last].max() > 1e-3) == (layer > 0)
        before = drawn.row_meta[layer]
        assert len(before) == max(text, asked.state.rows.lengths[layer])
        assert (before[:, ROW_FRAME] < 0).sum() == text
        assert before[:, ROW_TOKEN].max() < asked.first
