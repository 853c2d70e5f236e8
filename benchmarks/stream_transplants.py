# SPDX-License-Identifier: Apache-2.0
"""Replies from transplanted rows: chosen by one way of asking, with the numbers that another computed."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from stream_asking import StreamAsker

from starkv.methods.names import FULL
from starkv.methods.rows import ROW_FRAME, ROW_TOKEN
from starkv.methods.stream_rows import StreamRows
from starkv.runtime.engines.base import Engine
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import KvPolicy, StarKVMemory
from starkv.runtime.stream import StreamState
from starkv.runtime.turn import decode_step
from starkv.runtime.turn_plan import TurnPlan
from starkv.synthetic.samples import Sample

ALL = KvPolicy(FULL)


@dataclass(frozen=True)
class Question:
    """What both ways make of a question."""

    sample: Sample
    prompt: TurnPlan
    last: TurnPlan
    """The stream's last piece: screenshot and question."""
    state: StreamState
    """Of the stream before it."""
    exact: ParkedRows
    """All rows of the prompt, read at once; a token's row is its number."""
    read: ParkedRows
    """All rows of the stream once its last piece is read."""
    chosen: ParkedRows
    """Rows that prompt mode keeps."""
    kept: ParkedRows
    """Rows that the stream keeps."""

    @property
    def first(self) -> int:
        """First token of the last piece."""
        assert isinstance(self.last.rows, StreamRows)
        return self.last.rows.first_token

    def history(self, *frames: int) -> NDArray[np.int64]:
        """Tokens before the last piece: all text, and these screenshots."""
        meta = self.exact.row_meta[0][: self.first]
        return np.flatnonzero((meta[:, ROW_FRAME] < 0) | np.isin(meta[:, ROW_FRAME], frames))


class Transplanter(StreamAsker):
    """Answers from transplanted rows."""

    def question(self, sample: Sample, policy: KvPolicy) -> Question:
        """Read a question in both ways."""
        prompt = self._prompt(sample)
        state, last = self.before_the_last_piece(sample, "stream", policy, newest_whole=False)
        engine = self._agent.engine
        exact, read = self._rows(self._whole, prompt, ALL), self._rows(engine, last, ALL)
        chosen, kept = self._rows(self._whole, prompt, policy), self._rows(engine, last, policy, state.memory)
        return Question(sample, prompt, last, state, exact, read, chosen, kept)

    def _rows(
        self, engine: Engine, plan: TurnPlan, policy: KvPolicy, memory: StarKVMemory | None = None
    ) -> ParkedRows:
        _, pool, handle = self._compressed(engine, plan, policy, memory)
        return pool.kv.park(pool.slot_of(handle))

    def reply(self, question: Question, rows: ParkedRows, exact: bool) -> str:
        """Decode from these rows, behind a last piece that was read exactly or by the stream."""
        if exact:
            return self._decode(self._whole, question.prompt, rows)
        return self._decode(self._agent.engine, question.last, rows)

    def reply_behind(self, question: Question, history: ParkedRows) -> str:
        """Read the last piece behind another history, and decode from all of it."""
        return self._decode(self._agent.engine, behind(question.last, history), None)

    def reply_to(self, question: Question, history: ParkedRows, screenshot: ParkedRows) -> str:
        """Read the question's words behind a history and the last screenshot's rows."""
        frames, words = self.pieces(question.sample)
        images = self._prepared(question.sample)
        shown = self._plan(question.state, frames[-1], images[-1:], question.prompt)
        assert shown.state is not None
        rows = history.merged(before(screenshot, shown.state.tokens))
        asked = self._plan(replace(shown.state, rows=rows), words, [], question.prompt)
        return self._decode(self._agent.engine, asked, None)

    def _decode(self, engine: Engine, plan: TurnPlan, rows: ParkedRows | None) -> str:
        turn, pool, handle = self._compressed(engine, plan, ALL, None)
        if rows is not None:
            pool.kv.load(pool.slot_of(handle), rows)
        while not turn.reply.finish_reason:
            decode_step(self._agent.engine, pool, [turn])
        return turn.reply.text


def before(rows: ParkedRows, token: int) -> ParkedRows:
    """The rows of the tokens before this one."""
    return rows.take([np.flatnonzero(meta[:, ROW_TOKEN] < token) for meta in rows.row_meta])


def since(rows: ParkedRows, token: int) -> ParkedRows:
    """The rows of this token and those behind it."""
    return rows.take([np.flatnonzero(meta[:, ROW_TOKEN] >= token) for meta in rows.row_meta])


def same_tokens(rows: ParkedRows, like: ParkedRows) -> ParkedRows:
    """The rows of the tokens that ``like`` holds, layer by layer."""
    pairs = zip(rows.row_meta, like.row_meta, strict=True)
    return rows.take([np.flatnonzero(np.isin(m[:, ROW_TOKEN], other[:, ROW_TOKEN])) for m, other in pairs])


def behind(plan: TurnPlan, history: ParkedRows) -> TurnPlan:
    """A piece of a stream behind another history."""
    assert isinstance(plan.rows, StreamRows)
    rows = replace(plan.rows, history_meta=history.stacked_meta(), history_lengths=history.lengths)
    return replace(plan, history=history, rows=rows)
