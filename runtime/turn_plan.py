# SPDX-License-Identifier: Apache-2.0
"""One turn of a conversation, settled before anything is computed: which tokens are prefilled, where, and
behind what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.manifest import Manifest
from starkv.methods.rows import ROW_FRAME, PromptRows
from starkv.methods.stream_rows import CacheRows, StreamRows
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.prompt import ATTENTION_SINKS, describe_prompt
from starkv.runtime.preprocess.positions import Positions, prompt_positions
from starkv.runtime.preprocess.prepared import PreparedImage
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, Message, expand_image_tokens
from starkv.runtime.stream import FrameInView, StreamState, continuation

SHORTEST_INSTRUCTION = 8
"""Rows of text in a user's later turn from which on it says something: a template's own marks are fewer."""


@dataclass(frozen=True)
class TurnPlan:
    """A turn's prompt, or what it adds to a stream."""

    ids: tuple[int, ...]
    """Tokens to prefill, one placeholder per image token."""
    images: tuple[PreparedImage, ...]
    """Screenshots among them."""
    positions: Positions
    rows: CacheRows
    history: ParkedRows | None
    """Rows that come before; None: nothing does."""
    state: StreamState | None
    """Of the stream once the prompt is in the cache; its rows and the reply are missing. None in prompt
    mode."""
    reused_tokens: int
    """Tokens of the conversation that need no prefill."""

    @property
    def arena_rows(self) -> int:
        """Rows that the arena must hold."""
        return self.rows.length

    @property
    def image_tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def grids(self) -> list[tuple[int, int]]:
        return _grids(self.images)


def plan_prompt(
    manifest: Manifest, tokenizer: ChatTokenizer, messages: Sequence[Message], images: Sequence[PreparedImage]
) -> TurnPlan:
    """A whole conversation as one prompt: the papers' protocol.

    Raises:
        UsageError: images and placeholders differ in number, or the template refuses the messages.
    """
    return _prompt_of(manifest, tokenizer, tokenizer.render(messages), images)


def plan_stream(
    manifest: Manifest,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    images: Sequence[PreparedImage],
    state: StreamState | None,
    screenshots: int | None = None,
) -> TurnPlan:
    """What a conversation adds to a stream; the whole of it where it is another one.

    Args:
        manifest: of the engine.
        tokenizer: the engine's.
        messages: the whole conversation; its oldest screenshots may be left out.
        images: its screenshots, in order.
        state: of the stream so far.
        screenshots: most of them in view; older ones are evicted first.

    Raises:
        UsageError: as for :func:`plan_prompt`.
    """
    text = tokenizer.render(messages)
    keys = tuple(image.facts.key for image in images)
    found = state and continuation(
        state, text, keys, tokenizer.decode([manifest.tokens.image_pad], skip_special_tokens=False)
    )
    if state is None or not found:
        plan = _prompt_of(manifest, tokenizer, text, images)
        frames = tuple(FrameInView(number, r * c) for number, (r, c) in enumerate(plan.grids))
        assert isinstance(plan.rows, PromptRows)
        begun = StreamState(
            rows=ParkedRows.none(),
            text=text,
            image_keys=keys,
            pending=(),
            next_position=plan.positions.next_position,
            tokens=len(plan.ids),
            frames=frames,
            protect_order=plan.rows.protect_order,
        )
        return replace(plan, state=begun)
    new_images = tuple(images[found.first_image :])
    rendered = [*state.pending, *tokenizer.encode(found.text)]
    grids = _grids(new_images)
    counts = [rows * columns for rows, columns in grids]
    ids = expand_image_tokens(rendered, manifest.tokens.image_pad, counts)
    positions = prompt_positions(ids, manifest.tokens.image_pad, grids, manifest.text, state.next_position)
    appended = describe_prompt(ids, grids, manifest, tokenizer)
    first_frame = len(state.image_keys)
    frames = (*state.frames, *(FrameInView(first_frame + i, n) for i, n in enumerate(counts)))
    gone = frames[: max(0, len(frames) - screenshots)] if screenshots else ()
    gone = tuple(frame for frame in gone if frame.number < first_frame)
    frames = frames[len(gone) :]
    history = state.rows
    if gone:
        history = history.without_frames_before(gone[-1].number + 1)
    first_token = state.tokens - len(state.pending)
    order = _protect_order(state.protect_order, appended, first_token)
    after = replace(
        state,
        text=text,
        image_keys=(*state.image_keys, *keys[found.first_image :]),
        pending=(),
        next_position=positions.next_position,
        tokens=first_token + len(ids),
        frames=frames,
        protect_order=order,
        evicted_tokens=state.evicted_tokens + sum(frame.tokens for frame in gone),
    )
    rows = StreamRows(
        history_meta=history.stacked_meta(),
        history_lengths=history.lengths,
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
    )


def _prompt_of(
    manifest: Manifest, tokenizer: ChatTokenizer, text: str, images: Sequence[PreparedImage]
) -> TurnPlan:
    grids = _grids(images)
    counts = [rows * columns for rows, columns in grids]
    pad = manifest.tokens.image_pad
    ids = expand_image_tokens(tokenizer.encode(text), pad, counts)
    return TurnPlan(
        tuple(ids),
        tuple(images),
        prompt_positions(ids, pad, grids, manifest.text),
        describe_prompt(ids, grids, manifest, tokenizer),
        history=None,
        state=None,
        reused_tokens=0,
    )


def _grids(images: Sequence[PreparedImage]) -> list[tuple[int, int]]:
    """Rows and columns of each image's tokens."""
    return [image.facts.merged_grid for image in images]


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


def check_fits(plan: TurnPlan, new_tokens: int, manifest: Manifest) -> None:
    """Refuse a turn that the engine has no room for.

    Raises:
        UsageError: its rows and the reply's are more than the engine was built for.
    """
    rows = plan.arena_rows + new_tokens
    if rows > manifest.max_context:
        raise UsageError(
            f"{plan.arena_rows} prompt tokens and up to {new_tokens} new ones need {rows} KV rows, but "
            f"{manifest.name} was built for {manifest.max_context}; shorten the prompt, use fewer or smaller "
            "images, or allow fewer new tokens"
        )


def prefill_embeddings(
    ids: Sequence[int], embeds: NDArray[np.float32], encoded: Sequence[NDArray[np.float32]], image_pad: int
) -> NDArray[np.float32]:
    """Token embeddings ``[S, hidden]`` with the encoded images in the places of their placeholders."""
    if encoded:
        embeds[np.asarray(ids) == image_pad] = np.concatenate(encoded)
    return embeds
