# SPDX-License-Identifier: Apache-2.0
"""One turn of a conversation, settled before anything is computed: which tokens are prefilled, where, and
behind what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.manifest import Manifest
from starkv.methods.stream_rows import CacheRows, StreamRows
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.prompt import describe_prompt
from starkv.runtime.preprocess.positions import Positions, prompt_positions
from starkv.runtime.preprocess.prepared import PreparedImage
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, Message, expand_image_tokens
from starkv.runtime.stream import StreamState


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
    waiting: ParkedRows | None = None
    """Rows of the screenshot before that belong to the history and were not in the last reply's slot."""
    newest_whole: bool = False
    """Whether the newest screenshot's rows wait for the next turn, those that the reply does without."""

    @property
    def arena_rows(self) -> int:
        """Rows that the arena must hold."""
        return self.rows.length

    @property
    def image_tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def grids(self) -> list[tuple[int, int]]:
        return grids_of(self.images)

    def without_waiting(self) -> "TurnPlan":
        """The same turn behind the rows that the last reply saw, and no others."""
        if self.waiting is None or self.history is None:
            return self
        assert isinstance(self.rows, StreamRows)
        rows = replace(
            self.rows, history_meta=self.history.stacked_meta(), history_lengths=self.history.lengths
        )
        return replace(self, waiting=None, rows=rows)


def plan_prompt(
    manifest: Manifest, tokenizer: ChatTokenizer, messages: Sequence[Message], images: Sequence[PreparedImage]
) -> TurnPlan:
    """A whole conversation as one prompt: the papers' protocol.

    Raises:
        UsageError: images and placeholders differ in number, or the template refuses the messages.
    """
    return whole_prompt(manifest, tokenizer, tokenizer.render(messages), images)


def whole_prompt(
    manifest: Manifest, tokenizer: ChatTokenizer, text: str, images: Sequence[PreparedImage]
) -> TurnPlan:
    """A prompt as the template renders it, to its end or to any place between two tokens.

    Raises:
        UsageError: images and placeholders differ in number.
    """
    grids = grids_of(images)
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


def grids_of(images: Sequence[PreparedImage]) -> list[tuple[int, int]]:
    """Rows and columns of each image's tokens."""
    return [image.facts.merged_grid for image in images]


def fitted(plan: TurnPlan, new_tokens: int, manifest: Manifest) -> TurnPlan:
    """The turn as the engine has room for it: where there is none for rows that waited, they are let go.

    Raises:
        UsageError: its other rows and the reply's are more than the engine was built for.
    """
    if plan.arena_rows + new_tokens > manifest.max_context:
        plan = plan.without_waiting()
    rows = plan.arena_rows + new_tokens
    if rows > manifest.max_context:
        raise UsageError(
            f"{plan.arena_rows} prompt tokens and up to {new_tokens} new ones need {rows} KV rows, but "
            f"{manifest.name} was built for {manifest.max_context}; shorten the prompt, use fewer or smaller "
            "images, or allow fewer new tokens"
        )
    return plan


def prefill_embeddings(
    ids: Sequence[int], embeds: NDArray[np.float32], encoded: Sequence[NDArray[np.float32]], image_pad: int
) -> NDArray[np.float32]:
    """Token embeddings ``[S, hidden]`` with the encoded images in the places of their placeholders."""
    if encoded:
        embeds[np.asarray(ids) == image_pad] = np.concatenate(encoded)
    return embeds
