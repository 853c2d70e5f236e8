# SPDX-License-Identifier: Apache-2.0
"""GUI prompts with their replies, as training runs over them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from starkv.calibration.held_out import EMBEDDED
from starkv.calibration.kv_statistics import reply_of
from starkv.calibration.prompts import GuiPrompt, drawn_prompts
from starkv.errors import UsageError
from starkv.export.progress import NoProgress, Progress
from starkv.kv_training.lessons import Rows
from starkv.runtime.engines.base import Engine, Floats
from starkv.runtime.preprocess.positions import prompt_positions, rope_tables
from starkv.runtime.preprocess.prepared import PreparedImage, prepare
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.turn_plan import grids_of, plan_prompt, prefill_embeddings
from starkv.synthetic.suite import click_samples, trajectory_samples

TRAJECTORY_SHARE = 0.2
"""Of the embedded model's prompts: questions about several screenshots."""


@dataclass(frozen=True)
class TrainingPrompt:
    """A question about screenshots, oldest first, with its reply."""

    images: tuple[Image.Image, ...]
    instruction: str
    reply: str | GuiPrompt
    """The text, or a prompt whose box the model is to click, in its own dialect."""


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt with its reply, laid out for the decoder."""

    rows: Rows
    counted: Tensor
    """``[S]`` bool: rows whose next token is text, for which the student is to say what the teacher says."""
    earliest: int
    """First row behind the last screenshot: a student may start there."""
    reply: int
    """First row of the reply."""

    @property
    def length(self) -> int:
        """S."""
        return len(self.counted)

    def to(self, device: str) -> "TrainingSequence":
        """The same on a device."""
        rows = Rows(*(table.to(device) for table in (self.rows.embeds, self.rows.cosines, self.rows.sines)))
        return TrainingSequence(rows, self.counted.to(device), self.earliest, self.reply)


def suite_prompts(split: str, count: int, seed: int = 0) -> Iterator[TrainingPrompt]:
    """Questions of the synthetic suite: single screens, and one in five about several screenshots."""
    several = round(TRAJECTORY_SHARE * count)
    for samples in (click_samples(split, seed, count - several), trajectory_samples(split, seed, several)):
        for sample in samples:
            frames = tuple(Image.fromarray(frame) for frame in sample.frames)
            yield TrainingPrompt(frames, sample.question, sample.answer)


def training_prompts(
    model: str, prompts: Sequence[GuiPrompt], count: int, max_pixels: int
) -> Iterator[TrainingPrompt]:
    """What to train on: a user's prompts if there are any, the synthetic suite's training split for the
    embedded model, drawn desktops for others."""
    if model == EMBEDDED and not prompts:
        yield from suite_prompts("train", count)
        return
    for prompt in prompts[:count] or drawn_prompts(count, max_pixels):
        yield TrainingPrompt((prompt.image,), prompt.instruction, prompt)


def lay_out(
    engine: Engine,
    tokenizer: ChatTokenizer,
    prompts: Sequence[TrainingPrompt],
    progress: Progress | None = None,
) -> list[TrainingSequence]:
    """Encode prompts and their screenshots; all stay in memory.

    Raises:
        UsageError: there are none, or one has no reply.
        StarkvError: a prompt can't be used.
    """
    progress = progress or NoProgress()
    progress.start("prompts", len(prompts))
    encoded: dict[bytes, Floats] = {}
    sequences = []
    for number, prompt in enumerate(prompts):
        images = [prepare(image, engine.manifest.vision, engine.manifest.image) for image in prompt.images]
        keys = [image.facts.key for image in images]
        # Successive questions are about the same screenshots.
        encoded = {
            key: encoded[key] if key in encoded else engine.encode_image(image.inputs())
            for key, image in zip(keys, images, strict=True)
        }
        sequences.append(_sequence(engine, tokenizer, prompt, images, [encoded[key] for key in keys]))
        progress.advance(f"prompt {number}")
    if not sequences:
        raise UsageError("there are no prompts to train on")
    return sequences


def _sequence(
    engine: Engine,
    tokenizer: ChatTokenizer,
    prompt: TrainingPrompt,
    images: Sequence[PreparedImage],
    encoded: Sequence[Floats],
) -> TrainingSequence:
    manifest = engine.manifest
    pad = manifest.tokens.image_pad
    messages = opening(prompt.instruction, len(images), manifest.prompt)
    asked = plan_prompt(manifest, tokenizer, messages, images).ids
    reply = (
        prompt.reply if isinstance(prompt.reply, str) else reply_of(engine, prompt.reply, images[-1].facts)
    )
    if not reply:
        raise UsageError(f"the prompt {prompt.instruction!r} has neither a reply nor a box to click")
    ids = (*asked, *tokenizer.encode(reply), *manifest.tokens.end_of_text[:1])
    positions = prompt_positions(ids, pad, grids_of(images), manifest.text)
    embeds = prefill_embeddings(ids, engine.embed(ids), list(encoded), pad)
    cosines, sines = rope_tables(positions.values, manifest.text)
    visual = np.asarray(ids) == pad
    counted = np.append(~visual[1:], False)
    behind = int(np.flatnonzero(visual)[-1]) + 1
    rows = Rows(*(torch.from_numpy(table) for table in (embeds, cosines[0], sines[0])))
    return TrainingSequence(rows, torch.from_numpy(counted), behind, len(asked))


def digest(sequences: Sequence[TrainingSequence]) -> str:
    """Names the sequences, so that a training isn't resumed with others."""
    found = hashlib.sha256()
    for sequence in sequences:
        found.update(f"{sequence.length} {sequence.reply}".encode())
        found.update(sequence.rows.embeds.cpu().numpy().tobytes())
    return found.hexdigest()
