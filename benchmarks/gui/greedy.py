# SPDX-License-Identifier: Apache-2.0
"""Replies of many compactions of one prompt, decoded as one batch: greedy ones, and given ones.

On the processor a step of a small model costs nearly the same for one sequence and for ten: ten in a batch
take a third to a quarter of the time of ten one by one.
"""

from collections.abc import Sequence

import numpy as np

from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine, Floats, Rope
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.preprocess.positions import text_positions


def greedy_replies(agent: Agent, pool: Pool, logits: Floats, position: int, most: int) -> dict[int, str]:
    """Replies of all sequences of a pool, which are of the same prompt; the pool is empty afterwards.

    Args:
        agent: engine and tokenizer.
        pool: its sequences hold what was kept of the prompt, and have room for the reply.
        logits: ``[vocab]`` of the prompt's last token.
        position: of the first token of the reply.
        most: longest reply in tokens.

    Returns:
        Handle → text, without the end token.
    """
    written = greedy_tokens(agent.engine, pool, logits, position, most)
    return {handle: agent.tokenizer.decode(tokens) for handle, tokens in written.items()}


def greedy_tokens(
    engine: Engine, pool: Pool, logits: Floats, position: int, most: int
) -> dict[int, list[int]]:
    """As :func:`greedy_replies`: handle → tokens, without the end token."""
    end = engine.manifest.tokens.end_of_text
    written: dict[int, list[int]] = {handle: [] for handle in pool.handles}
    latest = dict.fromkeys(pool.handles, int(logits.argmax()))
    running = set(pool.handles)
    for step in range(most):
        running -= {handle for handle in running if latest[handle] in end}
        for handle in running:
            written[handle].append(latest[handle])
        if not running or step + 1 == most:
            break
        # A sequence that leaves costs a copy and new bindings, so they leave when that pays.
        if 2 * len(running) <= pool.active:
            release(pool, set(pool.handles) - running)
        batch = list(pool.handles)
        chosen = _step(engine, pool, [latest[handle] for handle in batch], position + step).argmax(-1)
        latest = dict(zip(batch, chosen.tolist(), strict=True))
    release(pool, set(pool.handles))
    return written


def forced_logits(engine: Engine, pool: Pool, tokens: Sequence[int], position: int) -> Floats:
    """What all sequences of a pool think of the same reply; the pool is empty afterwards.

    Args:
        engine: decodes.
        pool: as for :func:`greedy_replies`.
        tokens: of the reply.
        position: of the first one.

    Returns:
        ``[tokens, sequences, vocab]`` logits behind each token.
    """
    slots = pool.active
    steps = [_step(engine, pool, [token] * slots, position + step) for step, token in enumerate(tokens)]
    release(pool, set(pool.handles))
    return np.stack(steps) if steps else np.zeros((0, slots, engine.manifest.text.vocab), np.float32)


def release(pool: Pool, handles: set[int]) -> None:
    """Give slots back, those in the last ones first: then none of the others is moved needlessly."""
    for handle in [each for each in reversed(pool.handles) if each in handles]:
        pool.release(handle)


def _step(engine: Engine, pool: Pool, tokens: Sequence[int], position: int) -> Floats:
    places = np.repeat(text_positions(1, position).values[:, :, None], len(tokens), axis=1)
    return engine.decode(pool, engine.embed(tokens), Rope.at(places, engine.manifest.text))
