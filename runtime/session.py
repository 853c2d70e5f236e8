# SPDX-License-Identifier: Apache-2.0
"""One conversation with its screenshots: encode, prefill, compress, decode, turn after turn.

*Prompt mode* is the papers' protocol: every turn prefills the whole conversation and compresses it once.
*Stream mode* goes on from the compacted cache of the turn before, so that a step costs one screenshot and not
the whole history.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from starkv.methods.stream_rows import CacheRows
from starkv.runtime.engines.base import Engine, check_kv_method
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.image_cache import ImageCache
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.prepared import ImageFacts
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, Message
from starkv.runtime.stream import StreamState
from starkv.runtime.stream_plan import plan_stream
from starkv.runtime.timings import Timings
from starkv.runtime.turn import Turn, decode_step
from starkv.runtime.turn_plan import fitted, plan_prompt

PREFILL_ROWS = 1 << 30
"""One call for a whole prompt: nobody else waits, and the engine divides it as it likes."""

Mode = Literal["prompt", "stream"]


@dataclass
class Session:
    """Answers the turns of one conversation; each call gives the whole of it.

    Args:
        engine: the engine; it may serve other sessions in between.
        tokenizer: the engine's tokenizer.
        kv_policy: which rows of the cache are kept.
        mode: ``prompt`` or ``stream``.
        screenshots: stream mode: most screenshots in view; the oldest one's rows are evicted for a new one.
        newest_whole: stream mode: keep the newest screenshot's rows, in host memory, until the next one was
            read behind them. More accurate at small budgets.
    """

    engine: Engine
    tokenizer: ChatTokenizer
    kv_policy: KvPolicy = field(default_factory=KvPolicy)
    mode: Mode = "prompt"
    screenshots: int | None = None
    newest_whole: bool = True
    timings: Timings = field(default_factory=Timings)
    images: list[ImageFacts] = field(default_factory=list)
    """Screenshots of the last conversation."""
    prompt: CacheRows | None = None
    """What the rows were that the last turn compressed."""
    compressed: Compressed | None = None
    """What was kept of them."""
    kv_memory: StarKVMemory | None = None
    """What STaR-KV remembers from reply to reply: the replies of one session are a trajectory."""
    finish_reason: str | None = None
    """``stop`` (end token or stop string) or ``length``, once the reply is over."""
    state: StreamState | None = None
    """Stream mode: the compacted history that the next turn goes on from."""
    image_cache: ImageCache = field(default_factory=ImageCache)
    reused_tokens: int = 0
    """Tokens of the last conversation that were in the cache already."""

    def reply(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        parameters: SamplingParameters | None = None,
    ) -> Iterator[str]:
        """Answer ``messages``; yields the reply piece by piece.

        In stream mode a conversation that goes on from the last turn, the model's own reply included, costs
        what is new in it. Any other begins a new stream.

        Args:
            messages: the conversation, with one image part per image.
            images: the screenshots, in the order of their parts.
            parameters: sampling and stopping; greedy by default.

        Raises:
            ImageError: an image can't be taken.
            UsageError: images and placeholders differ in number, the prompt exceeds the engine's limit, or
                the engine has no such KV method, or the method can't go on with a compacted history.
        """
        turn = self._plan(messages, images, parameters or SamplingParameters())
        engine, timings = self.engine, turn.timings
        arena = engine.new_arena(turn.plan.arena_rows)
        pool = engine.new_pool(1, turn.slot_rows, self.kv_policy.method, turn.packed)
        handle = pool.acquire()
        while turn.encode_next():
            pass
        while turn.prefill_next(arena, PREFILL_ROWS):
            pass
        piece = turn.compress(arena, pool, handle)
        self.prompt, self.compressed = turn.plan.rows, turn.compressed
        self.kv_memory = turn.memory
        timings.kv_bytes_reserved = arena.kv.bytes_reserved + turn.staged_bytes + pool.kv.bytes_reserved
        # The reply needs the kept rows alone: the prompt's memory goes back before it.
        del arena
        # A caller may stop listening at any piece: what was decoded until then is the stream's history.
        try:
            while True:
                if piece:
                    yield piece
                if turn.reply.finish_reason:
                    break
                with timings.measure("decode"):
                    piece = decode_step(engine, pool, [turn])[0]
        finally:
            # A packed slot grows with its reply.
            timings.kv_bytes_reserved = max(timings.kv_bytes_reserved, pool.kv.bytes_reserved)
            self.finish_reason = turn.reply.finish_reason
            self.state = turn.finish(pool, handle)

    def _plan(
        self, messages: Sequence[Message], images: Sequence[Image.Image], parameters: SamplingParameters
    ) -> Turn:
        """Refuse whatever can be refused before the first expensive step."""
        self.timings = timings = Timings()
        engine, manifest = self.engine, self.engine.manifest
        check_kv_method(engine.info, self.kv_policy.method, bool(self.kv_policy.packed))
        with timings.measure("preprocess"):
            prepared = [self.image_cache.prepare(image, manifest) for image in images]
            self.images = [image.facts for image in prepared]
            if self.mode == "stream":
                plan = plan_stream(
                    manifest,
                    self.tokenizer,
                    messages,
                    prepared,
                    self.state,
                    self.screenshots,
                    self.newest_whole,
                )
            else:
                plan = plan_prompt(manifest, self.tokenizer, messages, prepared)
        plan = fitted(plan, parameters.max_new_tokens, manifest)
        self.reused_tokens = plan.reused_tokens
        memory = plan.state.memory if plan.state else self.kv_memory
        return Turn(
            engine, self.tokenizer, plan, parameters, self.kv_policy, memory, self.image_cache, timings
        )
