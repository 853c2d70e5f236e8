# SPDX-License-Identifier: Apache-2.0
"""One prompt with its screenshots: encode, prefill, compress, decode.

This is the papers' protocol (prompt mode): the whole prompt is prefilled, its cache is compressed once, and
the reply is decoded from what was kept.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from starkv.errors import UsageError
from starkv.methods.rows import PromptRows
from starkv.runtime.engines.base import Engine, Floats, Rope, check_kv_method
from starkv.runtime.generation import Sampler, SamplingParameters, StopScanner
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.kv.prompt import describe_prompt
from starkv.runtime.preprocess.image import ImageInputs, preprocess
from starkv.runtime.preprocess.positions import prompt_positions, rope_tables, text_positions
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, Message, expand_image_tokens


@dataclass
class Timings:
    """Where the time and the memory of one reply went. Times in milliseconds."""

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    compress_ms: float = 0.0
    decode_ms: float = 0.0
    prompt_tokens: int = 0
    image_tokens: int = 0
    generated_tokens: int = 0
    kv_tokens_full: int = 0
    """Rows that the prompt filled before compression."""
    kv_tokens_kept: float = 0
    """Rows left of them, mean over the layers: a method may give layers different budgets."""
    kv_bytes_full: int = 0
    """Bytes of the prompt's rows before compression."""
    kv_bytes_kept: int = 0
    """Bytes of the rows left of them."""
    kv_bytes_held: int = 0
    """Bytes of the valid rows after the reply: those and the generated tokens'."""
    kv_bytes_reserved: int = 0
    """Bytes allocated at the peak: for the prompt, whose memory goes back before the reply, and for the
    reply."""

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to ``{stage}_ms``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            name = f"{stage}_ms"
            setattr(self, name, getattr(self, name) + (time.perf_counter() - started) * 1e3)

    @property
    def prefill_per_second(self) -> float:
        return 1e3 * self.prompt_tokens / self.prefill_ms if self.prefill_ms else 0.0

    @property
    def decode_per_second(self) -> float:
        """Tokens per second of the decode steps; the first token comes from the prefill."""
        return 1e3 * (self.generated_tokens - 1) / self.decode_ms if self.decode_ms else 0.0


@dataclass
class Session:
    """Answers prompts, one after the other; each holds the whole conversation.

    Args:
        engine: the engine; it may serve other sessions in between.
        tokenizer: the engine's tokenizer.
        kv_policy: which rows of the prompt's cache are kept.
    """

    engine: Engine
    tokenizer: ChatTokenizer
    kv_policy: KvPolicy = field(default_factory=KvPolicy)
    timings: Timings = field(default_factory=Timings)
    images: list[ImageInputs] = field(default_factory=list)
    prompt: PromptRows | None = None
    """What the rows of the last prompt were."""
    compressed: Compressed | None = None
    """What was kept of it."""
    kv_memory: StarKVMemory | None = None
    """What STaR-KV remembers from reply to reply: the replies of one session are a trajectory."""
    finish_reason: str | None = None
    """``stop`` (end token or stop string) or ``length``, once the reply is over."""

    def reply(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        parameters: SamplingParameters | None = None,
    ) -> Iterator[str]:
        """Answer ``messages``; yields the reply piece by piece.

        Args:
            messages: the conversation, with one image part per image.
            images: the screenshots, in the order of their parts.
            parameters: sampling and stopping; greedy by default.

        Raises:
            ImageError: an image can't be taken.
            UsageError: images and placeholders differ in number, the prompt exceeds the engine's limit, or
                the engine has no such KV method.
        """
        parameters = parameters or SamplingParameters()
        self.timings = timings = Timings()
        engine, text = self.engine, self.engine.manifest.text
        # Whatever can be refused is refused before the first expensive step.
        check_kv_method(engine.info, self.kv_policy.method)
        with timings.measure("preprocess"):
            ids = self._prompt_ids(messages, images)
        rows = len(ids) + parameters.max_new_tokens
        if rows > engine.manifest.max_context:
            raise UsageError(
                f"{len(ids)} prompt tokens and up to {parameters.max_new_tokens} new ones need {rows} KV "
                f"rows, but {engine.manifest.name} was built for {engine.manifest.max_context}; shorten the "
                "prompt, use fewer or smaller images, or allow fewer new tokens"
            )
        policy = self.kv_policy
        kept_rows = engine.most_kept_rows(len(ids), policy)
        embeds = self._embed(ids)
        grids = [image.merged_grid for image in self.images]
        positions = prompt_positions(ids, engine.manifest.tokens.image_pad, grids, text)
        arena = engine.new_arena(len(ids))
        pool = engine.new_pool(1, kept_rows + parameters.max_new_tokens, policy.method)
        handle = pool.acquire()
        with timings.measure("prefill"):
            logits = engine.prefill(arena, embeds, Rope(*rope_tables(positions.values, text)))
        self.prompt = describe_prompt(ids, grids, engine.manifest, self.tokenizer)
        with timings.measure("compress"):
            self.compressed = engine.compress(arena, pool, handle, self.prompt, policy, self.kv_memory)
        self.kv_memory = self.compressed.memory
        timings.prompt_tokens = timings.kv_tokens_full = len(ids)
        timings.kv_tokens_kept = float(pool.kv.lengths.mean())
        timings.kv_bytes_full, timings.kv_bytes_kept = arena.kv.bytes_held, pool.kv.bytes_held
        timings.kv_bytes_reserved = arena.kv.bytes_reserved + pool.kv.bytes_reserved
        # The reply needs the kept rows alone: the prompt's memory goes back before it.
        del arena

        sampler, scanner, stream = Sampler(parameters), StopScanner(parameters.stop), self.tokenizer.stream()
        position = positions.next_position
        self.finish_reason = "length"
        token = sampler.pick(logits)
        for index in range(parameters.max_new_tokens):
            timings.generated_tokens += 1
            if token in engine.manifest.tokens.end_of_text:
                self.finish_reason = "stop"
                break
            if piece := scanner.push(stream.push(token)):
                yield piece
            if scanner.stopped:
                self.finish_reason = "stop"
                break
            if index + 1 < parameters.max_new_tokens:
                with timings.measure("decode"):
                    rope = Rope(*rope_tables(text_positions(1, position).values, text))
                    token = engine.decode_tokens(pool, engine.embed([token]), rope, [sampler])[0]
                position += 1
        timings.kv_bytes_held = pool.kv.bytes_held
        if not scanner.stopped and (piece := scanner.push(stream.finish()) + scanner.finish()):
            yield piece

    def _prompt_ids(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> list[int]:
        """Token ids of the prompt with one placeholder per image token; prepares the images on the way."""
        manifest = self.engine.manifest
        self.images = [preprocess(image, manifest.vision, manifest.image) for image in images]
        counts = [image.merged_grid[0] * image.merged_grid[1] for image in self.images]
        self.timings.image_tokens = sum(counts)
        rendered = self.tokenizer.encode(self.tokenizer.render(messages))
        return expand_image_tokens(rendered, manifest.tokens.image_pad, counts)

    def _embed(self, ids: Sequence[int]) -> Floats:
        """Embeddings of the prompt ``[S, hidden]``, with the encoded images in their places."""
        embeds = self.engine.embed(ids)
        with self.timings.measure("vision"):
            encoded = [self.engine.encode_image(image) for image in self.images]
        if encoded:
            embeds[np.asarray(ids) == self.engine.manifest.tokens.image_pad] = np.concatenate(encoded)
        return embeds
