# SPDX-License-Identifier: Apache-2.0
"""One question, prefilled once; every row of the table compacts that same arena out of place."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from starkv.manifest import CoordinateConvention, PromptDialect
from starkv.methods.rows import PromptRows
from starkv.runtime.actions.parser import ActionParseError, parse_response
from starkv.runtime.actions.pyautogui_code import parse_pyautogui
from starkv.runtime.actions.types import Click
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Floats, Rope
from starkv.runtime.kv.buffers import Arena
from starkv.runtime.kv.prompt import describe_prompt
from starkv.runtime.preprocess.image import ImageInputs, preprocess
from starkv.runtime.preprocess.positions import prompt_positions
from starkv.runtime.preprocess.tokenizer import expand_image_tokens
from starkv.runtime.prompts.dialects import opening
from starkv.synthetic.samples import Sample


@dataclass(frozen=True)
class Seen:
    """A screenshot as the model sees it."""

    embeds: Floats
    """``[T, hidden]``."""
    grid: tuple[int, int]
    """Rows and columns of its tokens."""
    size: tuple[int, int]
    """Width and height in pixels after resizing."""


class FrameCache:
    """Encodes screenshots; successive questions of a screen or an episode share most of theirs.

    Args:
        agent: whose engine encodes.
        most: encoded screenshots that are remembered, the last used ones.
    """

    def __init__(self, agent: Agent, most: int = 32) -> None:
        self._agent, self._most = agent, most
        self._seen: OrderedDict[tuple[tuple[int, ...], bytes], Seen] = OrderedDict()
        self.encoded = 0
        """How often the vision tower ran."""

    def see(self, frame: NDArray[np.uint8]) -> Seen:
        """A screenshot ``[H, W, 3]``, encoded now or earlier."""
        key = (frame.shape, frame.tobytes())
        if key not in self._seen:
            self._seen[key] = self._encode(frame)
            if len(self._seen) > self._most:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        return self._seen[key]

    def _encode(self, frame: NDArray[np.uint8]) -> Seen:
        self.encoded += 1
        manifest = self._agent.engine.manifest
        inputs: ImageInputs = preprocess(Image.fromarray(frame), manifest.vision, manifest.image)
        embeds = self._agent.engine.encode_image(inputs)
        return Seen(embeds, inputs.merged_grid, (inputs.resized_width, inputs.resized_height))


@dataclass(frozen=True)
class Prefilled:
    """A question whose prompt lies in an arena."""

    sample: Sample
    prompt: PromptRows
    seen: tuple[Seen, ...]
    arena: Arena
    logits: Floats
    """``[vocab]`` of the prompt's last token."""
    next_position: int


def prefill(agent: Agent, sample: Sample, frames: FrameCache) -> Prefilled:
    """Encode and prefill a question: one user turn with all screenshots, oldest first, and the text.

    Raises:
        UsageError: the prompt is longer than the engine's context.
    """
    engine, manifest = agent.engine, agent.engine.manifest
    pad = manifest.tokens.image_pad
    seen = tuple(frames.see(frame) for frame in sample.frames)
    grids = [each.grid for each in seen]
    turns = opening(sample.question, len(seen), manifest.prompt)
    ids = agent.tokenizer.encode(agent.tokenizer.render(turns))
    ids = expand_image_tokens(ids, pad, [rows * columns for rows, columns in grids])
    embeds = engine.embed(ids)
    embeds[np.asarray(ids) == pad] = np.concatenate([each.embeds for each in seen])
    positions = prompt_positions(ids, pad, grids, manifest.text)
    arena = engine.new_arena(len(ids))
    logits = engine.prefill(arena, embeds, Rope.at(positions.values, manifest.text))
    prompt = describe_prompt(ids, grids, manifest, agent.tokenizer)
    return Prefilled(sample, prompt, seen, arena, logits, positions.next_position)


def clicked(
    text: str, asked: Prefilled, dialect: PromptDialect, convention: CoordinateConvention
) -> tuple[float, float] | None:
    """Where a reply clicks, in pixels of the last screenshot, not moved onto it; None if its first action is
    no click."""
    try:
        actions = (parse_pyautogui if dialect == "opencua" else parse_response)(text).actions
    except ActionParseError:
        return None
    first = actions[0] if actions else None
    if not isinstance(first, Click) or first.point is None:
        return None
    height, width = asked.sample.frames[-1].shape[:2]
    across, down = asked.seen[-1].size if convention == "absolute" else (1000, 1000)
    return round(first.point.x / across * width, 3), round(first.point.y / down * height, 3)
