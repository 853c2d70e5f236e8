# SPDX-License-Identifier: Apache-2.0
"""Everything that an engine puts out on a prompt, by name, for comparing two engines output by output."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.calibration.prompts import GuiPrompt
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.rows import PromptRows
from starkv.runtime.engines.base import Engine, Floats, Rope
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.kv.prompt import describe_prompt
from starkv.runtime.preprocess.image import ImageInputs, preprocess
from starkv.runtime.preprocess.positions import prompt_positions, rope_tables, text_positions
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, expand_image_tokens
from starkv.runtime.prompts.dialects import opening

Outputs = dict[str, NDArray[Any]]
KEPT_ROWS = "kept_rows"
TOKENS = "tokens"
_AFTER_COMPRESSION = 4
"""Tokens that are decoded behind the kept rows."""


@dataclass
class Case:
    """A prompt, and what the reference said to it: the other engines get the same image tokens and reply."""

    prompt: GuiPrompt
    budget: float = 0.5
    """Share of the rows that compression keeps."""
    new_tokens: int = 16
    """Longest reply."""
    in_parts: bool = False
    """Prefilled in two calls, the second behind the rows of the first."""
    image_embeds: Floats | None = None
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class PromptInputs:
    """What a prefill takes."""

    image: ImageInputs
    embeds: Floats
    """``[S, hidden]``"""
    rope: Rope
    rows: PromptRows
    next_position: int

    def first_rows(self, count: int) -> "PromptInputs":
        """The same image, and a prompt of so many rows at most."""
        rope = Rope(self.rope.cos[:, :count], self.rope.sin[:, :count])
        return replace(self, embeds=self.embeds[:count], rope=rope)


def prompt_inputs(engine: Engine, tokenizer: ChatTokenizer, case: Case) -> PromptInputs:
    """Inputs of a prompt whose image tokens are known; zeros stand for those that are not."""
    manifest = engine.manifest
    image = preprocess(case.prompt.image, manifest.vision, manifest.image)
    grid = image.merged_grid
    rendered = tokenizer.encode(tokenizer.render(opening(case.prompt.instruction, 1, manifest.prompt)))
    ids = expand_image_tokens(rendered, manifest.tokens.image_pad, [grid[0] * grid[1]])
    embeds = engine.embed(ids)
    embeds[np.asarray(ids) == manifest.tokens.image_pad] = (
        0.0 if case.image_embeds is None else case.image_embeds
    )
    positions = prompt_positions(ids, manifest.tokens.image_pad, [grid], manifest.text)
    rope = Rope(*rope_tables(positions.values, manifest.text))
    rows = describe_prompt(ids, [grid], manifest, tokenizer)
    return PromptInputs(image, embeds, rope, rows, positions.next_position)


def outputs_of(engine: Engine, tokenizer: ChatTokenizer, case: Case) -> Outputs:
    """Run one prompt through an engine.

    The first engine that runs a case is its reference: what it put out feeds the others, so that an error of
    the vision tower is not counted again in the decoder.

    Returns:
        ``image_embeds``, ``logits``, ``q_window``, ``hidden_norm``, ``keys.i`` and ``values.i`` of the
        prompt's rows, ``kept_rows`` [L, S] bool after compression, ``decode_kept.n`` logits behind those,
        ``decode.n`` logits of the reply behind all rows, ``tokens``.
    """
    image = preprocess(case.prompt.image, engine.manifest.vision, engine.manifest.image)
    found: Outputs = {"image_embeds": engine.encode_image(image)}
    if case.image_embeds is None:
        case.image_embeds = found["image_embeds"]
    prompt = prompt_inputs(engine, tokenizer, case)
    length = len(prompt.embeds)
    arena = engine.new_arena(length)
    found["logits"] = _prefill(engine, arena, prompt, case.in_parts)
    found |= _cache(arena, engine)
    policy = KvPolicy(STAR_KV, Budget(case.budget))
    room = max(engine.most_kept_rows(length, policy), length) + case.new_tokens
    pool = engine.new_pool(1, room, STAR_KV)
    reply = _reply(engine, arena, pool, prompt, case, found["logits"])
    pool.release(pool.handles[0])
    kept = engine.compress(arena, pool, pool.acquire(), prompt.rows, policy)
    found[KEPT_ROWS] = _marked(kept.rows, length)
    for index, token in enumerate(case.tokens[:_AFTER_COMPRESSION]):
        found[f"decode_kept.{index}"] = _decode(engine, pool, token, prompt.next_position + index)
    return found | reply


def _prefill(engine: Engine, arena: Arena, prompt: PromptInputs, in_parts: bool) -> Floats:
    """Logits of the last row; of two parts the second holds all rows that compression looks at."""
    length = len(prompt.embeds)
    first = max(0, min(length // 2, length - engine.manifest.observation_window)) if in_parts else 0
    parts = [slice(0, first), slice(first, length)] if first else [slice(0, length)]
    for part in parts:
        rope = Rope(prompt.rope.cos[:, part], prompt.rope.sin[:, part])
        logits = engine.prefill(arena, prompt.embeds[part], rope)
    return logits


def _reply(
    engine: Engine, arena: Arena, pool: Pool, prompt: PromptInputs, case: Case, logits: Floats
) -> Outputs:
    """Logits of each token of the reply behind all rows: the reference's own reply, which the others read."""
    engine.compress(arena, pool, pool.acquire(), prompt.rows, KvPolicy())
    found: Outputs = {}
    said = [int(logits.argmax())]
    for index in range(case.new_tokens):
        token = case.tokens[index] if case.tokens else said[-1]
        if token in engine.manifest.tokens.end_of_text:
            break
        found[f"decode.{index}"] = row = _decode(engine, pool, token, prompt.next_position + index)
        said.append(int(row.argmax()))
    case.tokens = case.tokens or said
    found[TOKENS] = np.array(said, np.int64)
    return found


def _decode(engine: Engine, pool: Pool, token: int, position: int) -> Floats:
    rope = Rope(*rope_tables(text_positions(1, position).values, engine.manifest.text))
    # Engines may write the next logits into the same memory.
    logits: Floats = engine.decode(pool, engine.embed([token]), rope)[0].copy()
    return logits


def _cache(arena: Arena, engine: Engine) -> Outputs:
    text, rows = engine.manifest.text, int(arena.kv.lengths.max())
    on_host = arena.on_host(text)
    found: Outputs = {
        "q_window": np.asarray(on_host.q_window, np.float32).copy(),
        "hidden_norm": on_host.hidden_norm[..., :rows].copy(),
    }
    for layer in range(text.layers):
        found[f"keys.{layer}"] = on_host.host_kv.keys[layer, 0, : text.kv_heads, :rows].copy()
        found[f"values.{layer}"] = on_host.host_kv.values[layer, 0, : text.kv_heads, :rows].copy()
    return found


def _marked(rows: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    """Kept rows of each layer as flags ``[L, rows]``."""
    flags = np.zeros((len(rows), length), bool)
    for layer, kept in enumerate(rows[:, 0]):
        flags[layer, kept[kept >= 0]] = True
    return flags
