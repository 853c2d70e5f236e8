# SPDX-License-Identifier: Apache-2.0
"""One turn on its way through an engine, in steps small enough that others can take theirs in between.

encode an image, … → prefill a chunk, … → compress → decode a token, … → finish
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from starkv.methods.rows import ROW_FRAME
from starkv.runtime.engines.base import Engine, Floats, Rope, packs
from starkv.runtime.engines.stepping import chunk_lengths
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.buffers import Arena, Pool, round_up_rows
from starkv.runtime.kv.image_cache import ImageCache
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.positions import text_positions
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.reply import Reply
from starkv.runtime.stream import StreamState
from starkv.runtime.timings import Timings
from starkv.runtime.turn_plan import TurnPlan, prefill_embeddings


class Turn:
    """A planned turn.

    Args:
        engine: steps it.
        tokenizer: the engine's.
        plan: of the turn.
        parameters: sampling and stopping.
        policy: which rows are kept.
        memory: what STaR-KV remembers of the trajectory's earlier turns.
        images: encoded images of earlier turns.
        timings: to note times in.

    Raises:
        UsageError: the engine has no such method, or the method doesn't fit the turn.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        plan: TurnPlan,
        parameters: SamplingParameters,
        policy: KvPolicy,
        memory: StarKVMemory | None,
        images: ImageCache,
        timings: Timings | None = None,
    ) -> None:
        self.plan, self.policy, self.memory = plan, policy, memory
        self.timings = timings or Timings()
        self.reply = Reply(engine.manifest, tokenizer, parameters)
        self.kept_rows = engine.most_rows_of(plan.rows, policy)
        """Most rows that a layer holds after compression."""
        self.slot_rows = self.kept_rows + parameters.max_new_tokens
        """Rows that the reply's slot must have."""
        self.packed = packs(engine.info, policy)
        """Whether what is kept is packed."""
        chosen = self.packed and not policy.keeps_all_of(plan.rows)
        self.staged_bytes = round_up_rows(self.kept_rows) * engine.info.kv_bytes_per_row if chosen else 0
        """Bytes that chosen rows take during the compression, before they are packed."""
        self.compressed: Compressed | None = None
        self.waiting: ParkedRows | None = None
        """After compression: rows of the newest screenshot that wait for the next turn."""
        self._engine, self._images = engine, images
        self._encoded: list[Floats] = []
        self._embeds: Floats | None = None
        self._done = 0
        self._chunks: Iterator[int] = iter(())
        self._logits: Floats | None = None
        self.timings.image_tokens = plan.image_tokens
        self.timings.prompt_tokens = len(plan.ids)

    def encode_next(self) -> bool:
        """Encode one screenshot; False once all are."""
        number = len(self._encoded)
        if number == len(self.plan.images):
            return False
        with self.timings.measure("vision"):
            self._encoded.append(self._images.encode(self._engine, self.plan.images[number]))
        return True

    def prefill_next(self, arena: Arena, most_rows: int) -> bool:
        """Prefill a chunk of at most ``most_rows`` rows; False once the whole prompt is in the arena.

        The arena must be empty. The first call puts the stream's history into it, and nobody else may use it
        until :meth:`compress`.
        """
        engine, plan, text = self._engine, self.plan, self._engine.manifest.text
        with self.timings.measure("prefill"):
            if self._embeds is None:
                if plan.history is not None:
                    arena.kv.load(0, plan.history)
                if plan.waiting is not None:
                    # Packed rows are numbers, as those that waited are, only once they are in the arena.
                    arena.kv.load(0, arena.kv.park(0).merged(plan.waiting))
                self._embeds = prefill_embeddings(
                    plan.ids, engine.embed(plan.ids), self._encoded, engine.manifest.tokens.image_pad
                )
                self._chunks = iter(
                    chunk_lengths(len(plan.ids), most_rows, engine.manifest.observation_window)
                )
            length = next(self._chunks, 0)
            if not length:
                return False
            part = slice(self._done, self._done + length)
            rope = Rope.at(plan.positions.values[:, part], text)
            self._logits = engine.prefill(arena, self._embeds[part], rope)
            self._done += length
            return self._done < len(plan.ids)

    def compress(self, arena: Arena, pool: Pool, handle: int) -> str:
        """Move what is kept into a slot and pick the first token; returns its text."""
        timings, slot = self.timings, pool.slot_of(handle)
        with timings.measure("compress"):
            self.compressed = self._engine.compress(
                arena, pool, handle, self.plan.rows, self.policy, self.memory
            )
            self.waiting = self._rows_that_wait(arena, self.compressed)
        self.memory = self.compressed.memory
        timings.kv_tokens_full = self.plan.rows.full_rows
        timings.kv_tokens_kept = float(pool.kv.lengths[:, slot].mean())
        timings.kv_bytes_full = timings.kv_tokens_full * self._engine.info.kv_bytes_per_row
        timings.kv_bytes_kept = timings.kv_bytes_held = pool.kv.bytes_of(slice(slot, slot + 1))
        assert self._logits is not None
        token = self.reply.sampler.pick(self._logits)
        self._embeds = self._logits = None
        self._encoded.clear()
        return self.push(token)

    def _rows_that_wait(self, arena: Arena, compressed: Compressed) -> ParkedRows | None:
        """The newest screenshot's rows that were not kept; None where there are none or none is to wait."""
        state = self.plan.state
        if state is None or not self.plan.newest_whole or not state.image_keys:
            return None
        meta = arena.kv.row_meta[:, 0, : self.plan.rows.length]
        # Not every engine's compression notes them.
        meta[:] = self.plan.rows.row_meta
        of_newest = meta[..., ROW_FRAME] == len(state.image_keys) - 1
        rows = [
            np.setdiff1d(np.flatnonzero(own), kept)
            for own, kept in zip(of_newest, compressed.rows, strict=True)
        ]
        self.timings.kv_bytes_waiting = sum(map(len, rows)) * arena.kv.row_bytes
        return arena.kv.park_some(0, rows) if self.timings.kv_bytes_waiting else None

    def push(self, token: int) -> str:
        """Add a picked token to the reply; returns its text."""
        self.timings.generated_tokens += 1
        return self.reply.push(token)

    @property
    def next_input(self) -> tuple[int, int]:
        """Token to decode next, and its position."""
        last = len(self.reply.tokens) - 1
        return self.reply.tokens[last], self.plan.positions.next_position + last

    def finish(self, pool: Pool, handle: int) -> StreamState | None:
        """The stream's state after the reply, with its rows parked; None in prompt mode.

        The slot is the caller's to release.
        """
        slot = pool.slot_of(handle)
        self.timings.kv_bytes_held = pool.kv.bytes_of(slice(slot, slot + 1))
        if self.plan.state is None:
            return None
        tokens, state = self.reply.tokens, self.plan.state
        # The last token is picked and never decoded: if it is said, the next turn begins with it.
        decoded = tokens[:-1]
        parked = _with_reply(pool.kv.park(slot), len(decoded), state.tokens)
        said_last = () if self.reply.ended_by_token else tuple(tokens[-1:])
        return replace(
            state,
            rows=parked,
            text=state.text + self.reply.text,
            pending=said_last,
            next_position=state.next_position + len(decoded),
            tokens=state.tokens + len(decoded) + len(said_last),
            memory=self.memory,
            waiting=self.waiting,
        )


def decode_step(engine: Engine, pool: Pool, turns: list[Turn]) -> list[str]:
    """One token for every sequence of a pool.

    Args:
        engine: steps them.
        pool: its used slots belong to ``turns``, in their order.
        turns: whose replies are not over.

    Returns:
        the text that each token brought.
    """
    inputs = [turn.next_input for turn in turns]
    positions = np.concatenate([text_positions(1, place).values for _, place in inputs], 1)
    rope = Rope.at(positions[:, :, None], engine.manifest.text)
    embeds = engine.embed([token for token, _ in inputs])
    samplers = [turn.reply.sampler for turn in turns]
    tokens = engine.decode_tokens(pool, embeds, rope, samplers)
    return [turn.push(token) for turn, token in zip(turns, tokens, strict=True)]


def _with_reply(parked: ParkedRows, decoded: int, first_token: int) -> ParkedRows:
    """Say of a reply's rows, the last ones, that they are text."""
    for meta in parked.row_meta:
        rows = meta[len(meta) - decoded :]
        rows[:] = (-1, -1, 0, 0)
        rows[:, 3] = first_token + np.arange(len(rows))
    return parked
