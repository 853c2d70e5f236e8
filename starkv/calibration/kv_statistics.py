# SPDX-License-Identifier: Apache-2.0
"""What keys and values of GUI prompts look like, measured on an engine of the model itself.

An exact prefill leaves every key and value in the arena. So no other framework is needed, and no memory
beyond the engine's: a model of 7B is calibrated on the machine that runs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starkv.calibration.prompts import GuiPrompt
from starkv.calibration.replies import click_in, model_point
from starkv.errors import CalibrationError
from starkv.export.progress import NoProgress, Progress
from starkv.lowrank.rotary import unrotate
from starkv.lowrank.statistics import LayerStatistics, StatisticsAccumulator, mix
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.kv.codecs import rotary_of
from starkv.runtime.preprocess.positions import prompt_positions
from starkv.runtime.preprocess.prepared import ImageFacts, prepare
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.turn_plan import plan_prompt, prefill_embeddings

VISUAL_TOKENS = 8192
"""Most image tokens that are counted: more says no more about some hundred channels."""
VISUAL_WEIGHT = 0.5
"""Share of image tokens in a compressed cache, about."""


Biases = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Of a layer's key and value projections, ``[KV heads, D]`` each."""


@dataclass(frozen=True)
class KvStatistics:
    """What was measured of every layer."""

    layers: tuple[LayerStatistics, ...]
    tokens: int


def gather_statistics(
    engine: Engine,
    tokenizer: ChatTokenizer,
    biases: Sequence[Biases],
    prompts: Sequence[GuiPrompt],
    heads_per_group: int = 1,
    progress: Progress | None = None,
) -> KvStatistics:
    """Prefill prompts with their replies and measure what is cached.

    Args:
        engine: exact.
        tokenizer: the engine's.
        biases: of each layer.
        prompts: until ``VISUAL_TOKENS`` image tokens are reached.
        heads_per_group: KV heads whose keys are factorised together.
        progress: told of every prompt.

    Raises:
        CalibrationError: there are too few tokens of a kind, or keys or values are not numbers.
        StarkvError: a prompt can't be used.
    """
    text = engine.manifest.text
    rotary = rotary_of(text)
    kinds = [
        [StatisticsAccumulator(text.kv_heads, text.head_dim, heads_per_group) for _ in range(text.layers)]
        for _ in ("visual", "text")
    ]
    progress = progress or NoProgress()
    progress.start("KV statistics", len(prompts))
    known: tuple[int, ...] = ()
    for number, prompt in enumerate(prompts):
        sequence = lay_out(engine, tokenizer, prompt)
        # A system prompt that all prompts begin with is one prompt's tokens, not many.
        ids, pad = sequence.ids, engine.manifest.tokens.image_pad
        fresh = min(_common(known, ids), ids.index(pad) if pad in ids else len(ids))
        known = ids
        arena = engine.new_arena(len(sequence.ids))
        engine.prefill(arena, sequence.embeds, sequence.rope)
        visual = np.asarray(sequence.ids) == engine.manifest.tokens.image_pad
        assert sequence.rope.positions is not None
        cosines, sines = rotary.tables(sequence.rope.positions[0])
        on_host = arena.on_host(text)
        for layer, (key_bias, value_bias) in enumerate(biases):
            cached = (
                array[layer, 0, :, : len(visual)] for array in (on_host.host_kv.keys, on_host.host_kv.values)
            )
            rotated, values = (rows.transpose(1, 0, 2).astype(np.float64) for rows in cached)
            # What is no number is refused when it is counted, without a warning before that.
            with np.errstate(invalid="ignore"):
                keys = unrotate(rotated, cosines[:, None], sines[:, None]) - key_bias
            values -= value_bias
            queries = on_host.q_window[layer, 0].transpose(1, 0, 2)
            for kind, wanted in zip(kinds, (visual, ~visual), strict=True):
                rows = np.flatnonzero(wanted)
                rows = rows[rows >= fresh]
                kind[layer].add(keys[rows], values[rows], cosines[rows], sines[rows])
                kind[layer].add_queries(queries)
        progress.advance(f"prompt {number}")
        if kinds[0][0].tokens >= VISUAL_TOKENS:
            break
    if not prompts:
        raise CalibrationError("there are no calibration prompts")
    layers = tuple(
        mix(visual.finish(), words.finish(), VISUAL_WEIGHT) for visual, words in zip(*kinds, strict=True)
    )
    return KvStatistics(layers, layers[0].tokens)


@dataclass(frozen=True)
class LaidOut:
    """A prompt with its reply, as the decoder takes it."""

    ids: tuple[int, ...]
    prompt_tokens: int
    """Of the ids, the others are the reply."""
    embeds: NDArray[np.float32]
    """``[S, hidden]``."""
    rope: Rope


def lay_out(engine: Engine, tokenizer: ChatTokenizer, prompt: GuiPrompt) -> LaidOut:
    """Tokens, embeddings and positions of a prompt with its reply."""
    manifest = engine.manifest
    image = prepare(prompt.image, manifest.vision, manifest.image)
    messages = opening(prompt.instruction, 1, manifest.prompt)
    asked = plan_prompt(manifest, tokenizer, messages, [image]).ids
    ids = (*asked, *tokenizer.encode(reply_of(engine, prompt, image.facts)))
    pad = manifest.tokens.image_pad
    positions = prompt_positions(ids, pad, [image.facts.merged_grid], manifest.text)
    embeds = prefill_embeddings(ids, engine.embed(ids), [engine.encode_image(image.inputs())], pad)
    return LaidOut(ids, len(asked), embeds, Rope.at(positions.values, manifest.text))


def reply_of(engine: Engine, prompt: GuiPrompt, image: ImageFacts) -> str:
    """The right reply: the prompt's own, or a click on its box's middle; empty where neither is known."""
    if prompt.reply is not None or prompt.box is None:
        return prompt.reply or ""
    x0, y0, x1, y1 = prompt.box
    x, y = model_point(
        ((x0 + x1) / 2, (y0 + y1) / 2),
        Size(image.original_width, image.original_height),
        Size(image.resized_width, image.resized_height),
        engine.manifest.coordinates,
    )
    return click_in(engine.manifest.prompt, prompt.phrase, x, y)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
