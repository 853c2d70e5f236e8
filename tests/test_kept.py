# SPDX-License-Identifier: Apache-2.0
"""Which tokens were kept, and where they are drawn: the right ones, at the right pixels."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from starkv.cli.kept import Inspection
from starkv.cli.kept_picture import _HEADER, _arrange, draw_kept, veiled
from starkv.cli.kept_scores import outlines
from starkv.cli.kept_style import CAPTION, DOTS_PER_INCH, MARGIN, MARK
from starkv.errors import UsageError
from starkv.methods.budget import Budget
from starkv.methods.rows import PromptRows, prompt_rows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.kv.kept import always_kept, kept_json, kept_tokens, row_mask, stage_changes
from starkv.runtime.kv.policy import Compressed, KvPolicy
from starkv.runtime.timings import Timings

LENGTH = 24
BUDGET = Budget(0.5)


@pytest.fixture
def prompt() -> PromptRows:
    """Two screenshots of 2 x 3 tokens in a prompt of 24 rows; the sinks come first in what to protect."""
    return prompt_rows(LENGTH, [(3, 9), (10, 16)], [(2, 3), (2, 3)], (0, 1, 9, 16, 17))


def policy(method: str, budget: Budget = BUDGET) -> KvPolicy:
    return KvPolicy(method, budget)


def compressed(rows: list[list[list[int]]], stages: bool = False) -> Compressed:
    """An outcome with these rows, and scores that fall from row to row."""
    kept = np.array(rows, np.int64)
    layers, sets, _ = kept.shape
    scores = np.broadcast_to(np.linspace(1, 0, LENGTH, dtype=np.float32), (layers, sets, LENGTH)).copy()
    return Compressed(kept, scores, np.repeat(scores[:, :1], 4, axis=1) if stages else None)


def test_rows_become_a_mask() -> None:
    mask = row_mask(np.array([[[0, 2, -1]], [[1, 2, 3]]]), 4)
    assert mask.astype(int).tolist() == [[[1, 0, 1, 0]], [[0, 1, 1, 1]]]
    assert not row_mask(np.array([[[-1, -1]]]), 2).any()


def test_tokens_of_a_screenshot_lie_on_its_grid(prompt: PromptRows) -> None:
    """The cells are counted by hand: row 3 is the first token of the first screenshot, in reading order."""
    kept = kept_tokens(compressed([[[0, 3, 8]], [[3, 7, 10]]]), prompt, policy("snapkv"))
    first, second = (kept.screenshot(index, kept.share).sum(axis=0).tolist() for index in (0, 1))
    assert first == [[2, 0, 0], [0, 1, 1]]
    assert second == [[1, 0, 0], [0, 0, 0]]
    numbers = kept_json(kept)
    shots: Any = numbers["screenshots"]
    assert [shot["kept_per_layer"] for shot in shots] == [[2, 2], [0, 1]]
    assert [(shot["tokens"], shot["kept"], shot["share"]) for shot in shots] == [
        (6, 2, 0.3333),
        (6, 0.5, 0.0833),
    ]
    assert shots[0]["kept_in_layers"] == first
    assert numbers["text"] == {"tokens": 12, "kept": 0.5, "share": 0.0417, "kept_per_layer": [1, 0]}
    assert numbers["rows_per_layer"] == [3, 3]


def test_heads_count_as_parts_of_a_layer(prompt: PromptRows) -> None:
    outcome = compressed([[[3, 4], [3, 5]]])
    kept = kept_tokens(outcome, prompt, policy("snapkv"))
    assert kept.share[0, 3:6].tolist() == [1.0, 0.5, 0.5]
    assert kept.cut is None
    one = kept_tokens(outcome, prompt, policy("snapkv"), head=1)
    assert one.share[0, 3:6].tolist() == [1.0, 0.0, 1.0]
    assert one.cut is not None


def test_one_layer_is_shown_alone(prompt: PromptRows) -> None:
    kept = kept_tokens(compressed([[[0]], [[5]]], stages=True), prompt, policy("star_kv"), layer=1)
    assert kept.layers == (1,)
    assert np.flatnonzero(kept.share[0]).tolist() == [5]
    assert {values.shape for values in kept.scores.values()} == {(1, LENGTH)}


def test_the_cut_is_the_highest_score_of_a_dropped_row(prompt: PromptRows) -> None:
    kept = kept_tokens(compressed([[[0, 1, 23]]], stages=True), prompt, policy("star_kv"))
    assert kept.cut == pytest.approx([1 - 2 / 23])


@pytest.mark.parametrize("method", ["streaming_llm", "random"])
def test_methods_without_scores_show_none(prompt: PromptRows, method: str) -> None:
    kept = kept_tokens(compressed([[[0, 1]]]), prompt, policy(method))
    assert (dict(kept.scores), kept.cut, kept.always.any()) == ({}, None, False)


@pytest.mark.parametrize(
    ("layer", "head", "rows", "words"),
    [
        (2, None, [[[0]], [[0]]], "no layer 2; this model has layers 0 to 1"),
        (-1, None, [[[0]], [[0]]], "no layer -1"),
        (None, 0, [[[0]]], "same rows for all heads"),
        (None, 2, [[[0], [1]]], "no KV head 2; this model has KV heads 0 to 1"),
    ],
)
def test_what_is_not_there_is_refused(
    prompt: PromptRows, layer: int | None, head: int | None, rows: list[list[list[int]]], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        kept_tokens(compressed(rows), prompt, policy("snapkv"), layer, head)


def test_rows_that_are_kept_in_any_case(prompt: PromptRows) -> None:
    # Of 24 rows 12 are kept: a window of 8, or in native STaR-KV of 3, and of the 9 others 2 protected ones.
    window = list(range(16, 24))
    assert np.flatnonzero(always_kept(prompt, policy("snapkv"))).tolist() == window
    assert np.flatnonzero(always_kept(prompt, policy("star_kv"))).tolist() == [0, 1, *window[-3:]]
    official = KvPolicy("star_kv", BUDGET, StarKVConfig.official())
    assert np.flatnonzero(always_kept(prompt, official)).tolist() == window
    # A window leaves two rows to compete for.
    assert always_kept(prompt, policy("snapkv", Budget(capacity=5))).sum() == 3
    assert not always_kept(prompt, policy("full", Budget())).any()
    assert not always_kept(prompt, policy("snapkv", Budget(capacity=LENGTH + 1))).any()


def test_stages_that_did_nothing_are_told_from_those_that_did() -> None:
    before = np.array([[1.0, 0.5], [4.0, 2.0]], np.float32)
    after = before + np.array([[0.0, 0.25], [0.0, 0.5]], np.float32)
    assert stage_changes({"a": before, "b": after, "c": after}) == {"b": 0.25, "c": 0.0}
    assert stage_changes({"a": np.zeros((1, 2), np.float32), "b": np.ones((1, 2), np.float32)}) == {"b": 1.0}
    assert stage_changes({}) == {}


def test_veil_leaves_kept_pixels_alone_and_thins_with_the_share() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    share = np.zeros((4, 5), np.float32)
    share[1], share[2] = 0.5, 1.0
    shown = veiled(pixels, share, (40, 50, 60))
    np.testing.assert_array_equal(shown[2], pixels[2])
    distance = np.abs(shown.astype(int) - pixels).sum(axis=(1, 2))
    assert distance[1] > 0
    flat = veiled(np.full((1, 3, 3), 255, np.uint8), np.array([[0, 0.5, 1]], np.float32), (40, 50, 60))
    assert np.all(np.diff(flat[0].astype(int), axis=0) > 20)


def test_outlines_surround_the_kept_tokens() -> None:
    mask = np.zeros((3, 4), np.bool_)
    mask[1, 1:3] = True
    lines = {tuple(map(tuple, line)) for line in outlines(mask).astype(int).tolist()}
    assert lines == {
        ((1, 1), (2, 1)), ((2, 1), (3, 1)), ((1, 2), (2, 2)), ((2, 2), (3, 2)),
        ((1, 1), (1, 2)), ((3, 1), (3, 2)),
    }  # fmt: skip
    assert outlines(np.zeros((2, 2), np.bool_)).shape == (0, 2, 2)


@pytest.mark.parametrize("aspect", [0.005, 0.45, 1.0, 16 / 9, 200.0])
@pytest.mark.parametrize("pictures", [0, 1, 4, 28, 80])
def test_pictures_fit_the_sheet_and_do_not_overlap(aspect: float, pictures: int) -> None:
    row = _arrange(aspect, pictures, 3.7)
    assert 0 < row.width <= 9.21
    assert row.width / row.height == pytest.approx(aspect)
    boxes = [(0.0, 0.0, row.width, row.height)]
    for position in range(pictures):
        left, top = row.corner(position)
        boxes.append((left, top, left + row.small, top + row.small_height))
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0
        assert right <= row.total_width + 1e-6
        assert bottom <= row.total_height + 1e-6
        for other in boxes[:index]:
            apart = left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1]
            assert apart, (boxes[index], other)


def drawn_screenshot(
    pixels: NDArray[np.uint8], kept_row: int, click: tuple[int, int] | None = None
) -> NDArray[np.int64]:
    """A screenshot of 2 x 3 tokens, one of them kept, cut out of the picture that is drawn of it."""
    outcome = Compressed(np.array([[[kept_row]]]))
    kept = kept_tokens(outcome, prompt_rows(8, [(0, 6)], [(2, 3)]), policy("random"))
    actions = ({"type": "click", "screen_xy": list(click)},) if click else ()
    seen = Inspection("tiny", "x", [Image.fromarray(pixels)], kept, policy("random"), Timings(), actions)
    row = _arrange(1.5, 0, 3.7)
    sides = (MARGIN, _HEADER + CAPTION, MARGIN + row.width, _HEADER + CAPTION + row.height)
    part = draw_kept(seen).crop(tuple(round(side * DOTS_PER_INCH) for side in sides))
    return np.asarray(part).astype(np.int64)


def test_kept_tokens_are_drawn_where_they_lie() -> None:
    """Of tokens that all have colours of their own, only the kept one shows its colour, in its place."""
    pixels = np.full((200, 300, 3), 245, np.uint8)
    pixels[100:, 200:] = (255, 0, 0)  # the last token
    pixels[:100, :100] = (0, 0, 255)  # the first one
    drawn = drawn_screenshot(pixels, kept_row=5)
    height, width, _ = drawn.shape
    red = np.argwhere((drawn[..., 0] > 250) & (drawn[..., 1:] < 5).all(axis=-1))
    assert np.abs(red.min(axis=0) - (height / 2, width * 2 / 3)).max() < 3
    assert np.abs(red.max(axis=0) - (height, width)).max() < 3
    assert not ((drawn[..., 2] > 250) & (drawn[..., :2] < 5).all(axis=-1)).any()


def test_the_click_is_marked_where_it_is() -> None:
    drawn = drawn_screenshot(np.full((200, 300, 3), 245, np.uint8), kept_row=5, click=(60, 150))
    ring = np.argwhere(np.abs(drawn - ImageColor.getrgb(MARK)).sum(axis=-1) < 20)
    middle = (ring.min(axis=0) + ring.max(axis=0)) / 2
    assert np.abs(middle / drawn.shape[:2] - (0.75, 0.2)).max() < 0.01
