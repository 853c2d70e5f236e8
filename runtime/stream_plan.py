# SPDX-License-Identifier: Apache-2.0
"""What a conversation adds to a stream: a turn behind a compacted history."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from starkv.manifest import Manifest
from starkv.methods.rows import ROW_FRAME, PromptRows
from starkv.methods.stream_rows import StreamRows
from starkv.runtime.kv.parked import ParkedRows, stacked
from starkv.runtime.kv.prompt import ATTENTION_SINKS, describe_prompt
from starkv.runtime.preprocess.positions import prompt_positions
from starkv.runtime.preprocess.prepared import PreparedImage
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, Message, expand_image_tokens
from starkv.runtime.stream import FrameInView, StreamState, continuation
from starkv.runtime.turn_plan import TurnPlan, grids_of, whole_prompt

SHORTEST_INSTRUCTION = 8
"""Rows of text in a user's later turn from which on it says something: a template's own marks are fewer."""


def plan_stream(
    manifest: Manifest,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    images: Sequence[PreparedImage],
    state: StreamState | None,
    screenshots: int | None = None,
    newest_whole: bool = True,
) -> TurnPlan:
    """What a conversation adds to a stream; the whole of it where it is another one.

    Args:
        manifest: of the engine.
        tokenizer: the engine's.
        messages: the whole conversation; its oldest screenshots may be left out.
        images: its screenshots, in order.
        state: of the stream so far.
        screenshots: most of them in view; older ones are evicted first.
        newest_whole: keep the newest screenshot's rows until the next one was read behind them.

    Raises:
        UsageError: as for ``plan_prompt``.
    """
    text = tokenizer.render(messages)
    keys = tuple(image.facts.key for image in images)
    found = state and continuation(
        state, text, keys, tokenizer.decode([manifest.tokens.image_pad], skip_special_tokens=False)
    )
    if state is None or not found:
        return replace(begin_stream(manifest, tokenizer, text, images), newest_whole=newest_whole)
    plan = append_to_stream(manifest, tokenizer, state, found.text, images[found.first_image :], screenshots)
    assert plan.state is not None
    # As this client writes it, who may have left out old screenshots.
    return replace(plan, state=replace(plan.state, text=text), newest_whole=newest_whole)


def begin_stream(
    manifest: Manifest, tokenizer: ChatTokenizer, text: str, images: Sequence[PreparedImage]
) -> TurnPlan:
    """A stream's first prompt.

    Args:
        manifest: of the engine.
        tokenizer: the engine's.
        text: the prompt as the template renders it, to its end or to any place between two tokens.
        images: its screenshots, in order.

    Raises:
        UsageError: images and placeholders differ in number.
    """
    plan = whole_prompt(manifest, tokenizer, text, images)
    frames = tuple(FrameInView(number, r * c) for number, (r, c) in enumerate(plan.grids))
    assert isinstance(plan.rows, PromptRows)
    begun = StreamState(
        rows=ParkedRows.none(),
        text=text,
        image_keys=tuple(image.facts.key for image in images),
        pending=(),
        next_position=plan.positions.next_position,
        tokens=len(plan.ids),
        frames=frames,
        protect_order=plan.rows.protect_order,
    )
    return replace(plan, state=begun)


def append_to_stream(
    manifest: Manifest,
    tokenizer: ChatTokenizer,
    state: StreamState,
    text: str,
    images: Sequence[PreparedImage],
    screenshots: int | None = None,
) -> TurnPlan:
    """What comes next in a stream.

    Args:
        manifest: of the engine.
        tokenizer: the engine's.
        state: of the stream so far.
        text: that goes on from ``state.text``.
        images: the new screenshots, in order.
        screenshots: most of them in view; older ones are evicted first.

    Raises:
        UsageError: images and placeholders differ in number.
    """
    new_images = tuple(images)
    rendered = [*state.pending, *tokenizer.encode(text)]
    grids = grids_of(new_images)
    counts = [rows * columns for rows, columns in grids]
    ids = expand_image_tokens(rendered, manifest.tokens.image_pad, counts)
    positions = prompt_positions(ids, manifest.tokens.image_pad, grids, manifest.text, state.next_position)
    appended = describe_prompt(ids, grids, manifest, tokenizer)
    first_frame = len(state.image_keys)
    frames = (*state.frames, *(FrameInView(first_frame + i, n) for i, n in enumerate(counts)))
    gone = frames[: max(0, len(frames) - screenshots)] if screenshots else ()
    gone = tuple(frame for frame in gone if frame.number < first_frame)
    frames = frames[len(gone) :]
    history, waiting = state.rows, state.waiting
    if gone:
        history = history.without_frames_before(gone[-1].number + 1)
        waiting = waiting and waiting.without_frames_before(gone[-1].number + 1)
    metas = history.row_meta if waiting is None else history.merged_meta(waiting)
    first_token = state.tokens - len(state.pending)
    order = _protect_order(state.protect_order, appended, first_token)
    after = replace(
        state,
        text=state.text + text,
        image_keys=(*state.image_keys, *(image.facts.key for image in new_images)),
        pending=(),
        next_position=positions.next_position,
        tokens=first_token + len(ids),
        frames=frames,
        protect_order=order,
        evicted_tokens=state.evicted_tokens + sum(frame.tokens for frame in gone),
        waiting=None,
    )
    rows = StreamRows(
        history_meta=stacked(metas),
        history_lengths=np.array([len(meta) for meta in metas], np.int32),
        appended=appended,
        first_frame=first_frame,
        first_token=first_token,
        full_rows=after.tokens - after.evicted_tokens,
        protect_order=order,
    )
    return TurnPlan(
        tuple(ids),
        new_images,
        positions,
        rows,
        history,
        after,
        reused_tokens=first_token - after.evicted_tokens,
        waiting=waiting,
    )


def _protect_order(order: tuple[int, ...], appended: PromptRows, first_token: int) -> tuple[int, ...]:
    """The first token, then the newest words of the user, then what was worth keeping before.

    Turns that bring a screenshot and no words say nothing that is worth a row for good.
    """
    text_rows = [row for row in appended.protect_order if appended.row_meta[row, ROW_FRAME] < 0]
    # describe_prompt takes its first rows for sinks; these are in the middle of a stream.
    words = [row for row in text_rows if row >= ATTENTION_SINKS]
    if len(words) < SHORTEST_INSTRUCTION:
        return order
    return (*order[:1], *(first_token + row for row in words), *order[1:])
