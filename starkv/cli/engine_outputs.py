# SPDX-License-Identifier: Apache-2.0
"""Everything that an engine puts out on a prompt, by name, for comparing two engines output by output."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.calibration.prompts import GuiPrompt
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.engines.base import Engine, Floats, Rope
from starkv.runtime.engines.device_kv import DeviceArena
from starkv.runtime.kv.buffers import Arena
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.kv.prompt import describe_prompt
from starkv.runtime.preprocess.image import preprocess
from starkv.runtime.preprocess.positions import prompt_positions, rope_tables, text_positions
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, expand_image_tokens
from starkv.runtime.prompts.dialects import opening

Outputs = dict[str, NDArray[Any]]
KEPT_ROWS = "kept_rows"
TOKENS = "tokens"


@dataclass
class Case:
    """A prompt, and what the reference said to it: the other engine gets the same image tokens and reply."""

    prompt: GuiPrompt
    budget: float
    new_tokens: int
    image_embeds: Floats | None = None
    tokens: list[int] = field(default_factory=list)


def outputs_of(engine: Engine, tokenizer: ChatTokenizer, case: Case) -> Outputs:
    """Run one prompt through an engine.

    The first engine that runs a case is its reference: what it put out feeds the others, so that an error of
    the vision tower is not counted again in the decoder.

    Returns:
        ``image_embeds``, ``logits``, ``q_window``, ``hidden_norm``, ``keys.i`` and ``values.i`` of the
        prompt's rows, ``kept_rows`` [L, C] bool after compression, ``decode.n`` logits of the reply,
        ``tokens``.
    """
    manifest = engine.manifest
    image = preprocess(case.prompt.image, manifest.vision, manifest.image)
    grid = image.merged_grid
    rendered = tokenizer.encode(tokenizer.render(opening(case.prompt.instruction, 1, manifest.prompt)))
    ids = expand_image_tokens(rendered, manifest.tokens.image_pad, [grid[0] * grid[1]])
    found: Outputs = {"image_embeds": engine.encode_image(image)}
    if case.image_embeds is None:
        case.image_embeds = found["image_embeds"]
    embeds = engine.embed(ids)
    embeds[np.asarray(ids) == manifest.tokens.image_pad] = case.image_embeds
    positions = prompt_positions(ids, manifest.tokens.image_pad, [grid], manifest.text)
    arena = engine.new_arena(len(ids))
    rope = Rope(*rope_tables(positions.values, manifest.text))
    found["logits"] = engine.prefill(arena, embeds, rope)
    found |= _cache(arena, engine)
    rows = describe_prompt(ids, [grid], manifest, tokenizer)
    policy = KvPolicy(STAR_KV, Budget(case.budget))
    room = max(engine.most_kept_rows(len(ids), policy), len(ids)) + case.new_tokens
    pool = engine.new_pool(1, room, STAR_KV)
    kept = engine.compress(arena, pool, pool.acquire(), rows, policy)
    found[KEPT_ROWS] = _marked(kept.rows, len(ids))
    pool.release(pool.handles[0])
    engine.compress(arena, pool, pool.acquire(), rows, KvPolicy())
    found |= _decode(engine, pool, case, found["logits"], positions.next_position)
    return found


def _decode(engine: Engine, pool: Any, case: Case, logits: Floats, position: int) -> Outputs:
    """Logits of each token of the reply: the reference's own, or those that it said."""
    found: Outputs = {}
    said, forced = [int(logits.argmax())], case.tokens
    for index in range(case.new_tokens):
        token = forced[index] if forced else said[-1]
        if token in engine.manifest.tokens.end_of_text:
            break
        rope = Rope(*rope_tables(text_positions(1, position + index).values, engine.manifest.text))
        row = engine.decode(pool, engine.embed([token]), rope)[0].copy()
        found[f"decode.{index}"] = row
        said.append(int(row.argmax()))
    if not forced:
        case.tokens = said
    found[TOKENS] = np.array(said, np.int64)
    return found


def _cache(arena: Arena, engine: Engine) -> Outputs:
    text, rows = engine.manifest.text, int(arena.kv.lengths.max())
    on_host = arena.on_host(text) if isinstance(arena, DeviceArena) else arena
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
