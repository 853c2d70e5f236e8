# SPDX-License-Identifier: Apache-2.0
"""One question about several screenshots, asked as a whole prompt or piece by piece as a stream.

Pieced together the tokens and positions of a stream are those of the prompt, to the last one; what differs is
when rows are chosen, and by whose attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
from PIL import Image

from starkv.evaluation.shared_prefill import SharedPrefill
from starkv.methods.rows import ROW_TOKEN, PromptRows
from starkv.methods.stream_rows import StreamRows
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.image_cache import ImageCache
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import KvPolicy, StarKVMemory
from starkv.runtime.preprocess.prepared import ImageFacts, PreparedImage
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.session import PREFILL_ROWS
from starkv.runtime.stream import StreamState
from starkv.runtime.stream_plan import append_to_stream, begin_stream
from starkv.runtime.turn import Turn, decode_step
from starkv.runtime.turn_plan import TurnPlan, whole_prompt
from starkv.synthetic.samples import Sample

Way = Literal["prompt", "stream", "stream, told before", "stream, asked apart"]
"""Whole; one screenshot after the other, the question with the last; the same, but each earlier screenshot is
compressed under the question's attention, whose rows go again; the question after the last screenshot was
compressed."""
STREAMS: tuple[Way, ...] = ("stream", "stream, told before", "stream, asked apart")


@dataclass(frozen=True)
class Reply:
    """What was answered."""

    text: str
    kept: float
    """Rows behind which the reply was decoded, mean over the layers."""
    full: int
    """Rows of the whole prompt."""
    memory: StarKVMemory | None
    """What STaR-KV remembers now."""
    parked: float = 0.0
    """Rows that the session held before the question, mean over the layers."""


class StreamAsker:
    """Asks questions of the synthetic suite, whose prompts hold the screenshots and then the text.

    What several ways and budgets have in common is computed once: whole prompts, first screenshots, and the
    states of streams that differ only in when the question comes.

    Args:
        agent: engine and tokenizer.
        max_new_tokens: longest reply.
    """

    def __init__(self, agent: Agent, max_new_tokens: int) -> None:
        self._agent = agent
        self._whole, self._first = (cast(Engine, SharedPrefill(agent.engine)) for _ in range(2))
        self._parameters = SamplingParameters(max_new_tokens)
        self._images = ImageCache()
        self._asked = ""
        self._states: dict[tuple[KvPolicy, bool, str, int], StreamState] = {}
        """Of the last question: policy, whether the newest screenshot stays whole, tail, and characters
        before the last piece → state behind it."""

    def seen(self, sample: Sample) -> ImageFacts:
        """The screenshot that the question is asked about, as the model sees it."""
        return self._prepared(sample)[-1].facts

    def ask(
        self,
        sample: Sample,
        way: Way,
        policy: KvPolicy,
        memory: StarKVMemory | None = None,
        newest_whole: bool = True,
    ) -> Reply:
        """Ask a question.

        Args:
            sample: the question.
            way: how.
            policy: which rows are kept, at every compression.
            memory: what STaR-KV remembers of earlier prompts; a stream begins without any.
            newest_whole: whether a stream's newest screenshot stays whole until the next one was read.
        """
        if way == "prompt":
            return self._answer(self._whole, self._prompt(sample), policy, memory)
        state, last = self.before_the_last_piece(sample, way, policy, newest_whole)
        reply = self._answer(self._agent.engine, last, policy, state.memory)
        lengths = [rows.lengths for rows in (state.rows, state.waiting) if rows is not None]
        return replace(reply, parked=float(np.sum(lengths, axis=0).mean()))

    def before_the_last_piece(
        self, sample: Sample, way: Way, policy: KvPolicy, newest_whole: bool
    ) -> tuple[StreamState, TurnPlan]:
        """A stream's state before the piece that it answers, and that piece; arguments as for :meth:`ask`."""
        if sample.id != self._asked:
            self._asked = sample.id
            self._states.clear()
        prompt = self._prompt(sample)
        frames, question = self.pieces(sample)
        pieces = (
            [*frames, question] if way == "stream, asked apart" else [*frames[:-1], frames[-1] + question]
        )
        tail = question if way == "stream, told before" else ""
        images = self._prepared(sample)
        state: StreamState | None = None
        plans: list[TurnPlan] = []
        for number, piece in enumerate(pieces):
            plans.append(self._plan(state, piece, images[number : number + 1], prompt))
            if number < len(pieces) - 1:
                plans[-1] = replace(plans[-1], newest_whole=newest_whole)
                key = (policy, newest_whole, tail, len(state.text) if state else 0)
                if key not in self._states:
                    self._states[key] = self._append(state, plans[-1], tail, images[number], prompt, policy)
                state = self._states[key]
        check_same(plans, prompt)
        assert state is not None
        return state, plans[-1]

    def pieces(self, sample: Sample) -> tuple[list[str], str]:
        """The rendered prompt: a piece for each screenshot, and the rest of it."""
        tokenizer, manifest = self._agent.tokenizer, self._agent.engine.manifest
        text = tokenizer.render(opening(sample.question, len(sample.frames), manifest.prompt))
        end = tokenizer.decode([manifest.tokens.image_pad], skip_special_tokens=False) + "<|vision_end|>"
        *frames, question = text.split(end)
        return [frame + end for frame in frames], question

    def _prepared(self, sample: Sample) -> list[PreparedImage]:
        manifest = self._agent.engine.manifest
        return [self._images.prepare(Image.fromarray(frame), manifest) for frame in sample.frames]

    def _prompt(self, sample: Sample) -> TurnPlan:
        frames, question = self.pieces(sample)
        manifest, tokenizer = self._agent.engine.manifest, self._agent.tokenizer
        return whole_prompt(manifest, tokenizer, "".join(frames) + question, self._prepared(sample))

    def _plan(
        self, state: StreamState | None, text: str, images: Sequence[PreparedImage], prompt: TurnPlan
    ) -> TurnPlan:
        """A piece of the prompt behind a state; the prompt's words are protected as far as they have come."""
        manifest, tokenizer = self._agent.engine.manifest, self._agent.tokenizer
        if state is None:
            plan = begin_stream(manifest, tokenizer, text, images)
        else:
            plan = append_to_stream(manifest, tokenizer, state, text, images)
        assert isinstance(prompt.rows, PromptRows)
        assert plan.state is not None
        # A piece alone doesn't show that its words are a user's.
        come = tuple(token for token in prompt.rows.protect_order if token < plan.state.tokens)
        rows = replace(plan.rows, protect_order=come)
        return replace(plan, rows=rows, state=replace(plan.state, protect_order=come))

    def _append(
        self,
        state: StreamState | None,
        plan: TurnPlan,
        tail: str,
        image: PreparedImage,
        prompt: TurnPlan,
        policy: KvPolicy,
    ) -> StreamState:
        """Prefill a piece and compress; with a tail behind it, whose rows go again."""
        asked = plan
        if tail:
            longer = self._plan(state, prompt_text(plan, state) + tail, [image], prompt)
            asked = replace(longer, newest_whole=plan.newest_whole)
        memory = state.memory if state else None
        engine = self._agent.engine if state else self._first
        turn, pool, handle = self._compressed(engine, asked, policy, memory)
        assert plan.state is not None
        rows = _without_tokens_from(pool.kv.park(pool.slot_of(handle)), plan.state.tokens)
        return replace(plan.state, rows=rows, memory=turn.memory, waiting=turn.waiting)

    def _compressed(
        self, engine: Engine, plan: TurnPlan, policy: KvPolicy, memory: StarKVMemory | None
    ) -> tuple[Turn, Pool, int]:
        turn = Turn(engine, self._agent.tokenizer, plan, self._parameters, policy, memory, self._images)
        arena = engine.new_arena(plan.arena_rows)
        pool = engine.new_pool(1, turn.slot_rows, policy.method)
        handle = pool.acquire()
        while turn.encode_next():
            pass
        while turn.prefill_next(arena, PREFILL_ROWS):
            pass
        turn.compress(arena, pool, handle)
        return turn, pool, handle

    def _answer(self, engine: Engine, plan: TurnPlan, policy: KvPolicy, memory: StarKVMemory | None) -> Reply:
        turn, pool, _ = self._compressed(engine, plan, policy, memory)
        while not turn.reply.finish_reason:
            decode_step(engine, pool, [turn])
        timings = turn.timings
        return Reply(turn.reply.text, timings.kv_tokens_kept, int(timings.kv_tokens_full), turn.memory)


def prompt_text(plan: TurnPlan, state: StreamState | None) -> str:
    """The text that a plan adds to a state."""
    assert plan.state is not None
    return plan.state.text[len(state.text) if state else 0 :]


def check_same(plans: Sequence[TurnPlan], prompt: TurnPlan) -> None:
    """Make sure that pieces are the whole prompt: the same tokens at the same positions.

    Raises:
        ValueError: they are not.
    """
    ids = tuple(token for plan in plans for token in plan.ids)
    positions = np.concatenate([plan.positions.values for plan in plans], axis=1)
    if ids != prompt.ids or not np.array_equal(positions, prompt.positions.values):
        raise ValueError("the pieces of a stream are another prompt than the whole")
    last = plans[-1].rows
    if isinstance(last, StreamRows) and last.full_rows != prompt.rows.length:
        raise ValueError("a budget's share would be of other rows than the prompt's")


def _without_tokens_from(rows: ParkedRows, token: int) -> ParkedRows:
    """The rows of the tokens before ``token``."""
    return rows.take([np.flatnonzero(meta[:, ROW_TOKEN] < token) for meta in rows.row_meta])
