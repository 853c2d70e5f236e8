# SPDX-License-Identifier: Apache-2.0
"""Prompts as the decoder takes them: token embeddings with encoded images in their places."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.calibration.prompts import IMAGE_TOKENS, GuiPrompt
from starkv.calibration.replies import click_in, model_point
from starkv.errors import UsageError
from starkv.export.cards import ModelCard
from starkv.export.models.families import family_of
from starkv.export.progress import NoProgress, Progress
from starkv.export.quantize.calibration import CalibrationSequence, digest
from starkv.export.side_files import image_limits, special_tokens
from starkv.host import usable_processors
from starkv.manifest import ImageLimits, SpecialTokens, TextShape, VisionShape
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.engines.embedding import EmbeddingTable
from starkv.runtime.preprocess.image import ImageInputs, preprocess
from starkv.runtime.preprocess.positions import prompt_positions, rope_tables
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, expand_image_tokens
from starkv.runtime.preprocess.vision_plan import plan_vision
from starkv.runtime.prompts.dialects import opening

MOST_TOKENS = 4096
"""Of all prompts together: what one layer of a 7B model is run over. Prompts beyond are left out."""
_MERGED_PATCH = 28


@dataclass(frozen=True)
class PromptCalibration:
    """The export's :class:`~starkv.export.quantize.calibration.Calibration`, made of GUI prompts."""

    card: ModelCard
    prompts: Sequence[GuiPrompt]

    @cached_property
    def digest(self) -> str:
        """Names images, texts and how they are laid out."""
        parts: list[NDArray[np.generic] | str] = [repr(self.card), str(MOST_TOKENS), str(IMAGE_TOKENS)]
        for prompt in self.prompts:
            parts += [
                np.asarray(prompt.image),
                prompt.instruction,
                repr((prompt.reply, prompt.box, prompt.phrase)),
            ]
        return digest(parts)

    def sequences(self, directory: Path, progress: Progress | None = None) -> list[CalibrationSequence]:
        """Prompts with their replies, until ``MOST_TOKENS`` are reached.

        Raises:
            UsageError: the first prompt alone is longer, or onnxruntime is missing.
            StarkvError: the tokenizer or a prompt can't be used.
        """
        model = _Model.read(directory, self.card)
        laid_out = []
        total = 0
        for prompt in self.prompts:
            image, ids = model.lay_out(prompt)
            total += len(ids)
            if total > MOST_TOKENS:
                break
            laid_out.append((image, ids))
        if not laid_out:
            raise UsageError(
                f"the first calibration prompt has more than {MOST_TOKENS} tokens; shorten it"
                if self.prompts
                else "there are no calibration prompts"
            )
        encode = _open_vision(directory / "vision.onnx")
        embedding = EmbeddingTable(directory / "embedding.safetensors")
        progress = progress or NoProgress()
        progress.start("prompts", len(laid_out))
        found = []
        for number, (image, ids) in enumerate(laid_out):
            found.append(model.embed(image, ids, embedding, encode))
            progress.advance(f"prompt {number}")
        return found


@dataclass(frozen=True)
class _Model:
    """What the unfinished export says about its model."""

    card: ModelCard
    text: TextShape
    vision: VisionShape
    tokens: SpecialTokens
    limits: ImageLimits
    tokenizer: ChatTokenizer

    @classmethod
    def read(cls, directory: Path, card: ModelCard) -> "_Model":
        path = directory / "config.json"
        config = json.loads(path.read_text())
        shapes = family_of(config, path).parse_config(config, path)
        # Few tokens an image: many screens say more about activations than one large screen.
        most = min(card.max_pixels, IMAGE_TOKENS * _MERGED_PATCH**2)
        return cls(
            card,
            shapes.text,
            shapes.vision,
            special_tokens(directory, config),
            image_limits(directory, min(card.min_pixels, most), most),
            ChatTokenizer.from_directory(directory),
        )

    def lay_out(self, prompt: GuiPrompt) -> tuple[ImageInputs, list[int]]:
        """The prepared image, and token ids of prompt and reply."""
        image = preprocess(prompt.image, self.vision, self.limits)
        reply = prompt.reply
        if reply is None:
            if prompt.box is None:
                raise UsageError(f"the prompt {prompt.instruction!r} has neither a reply nor a box")
            x0, y0, x1, y1 = prompt.box
            x, y = model_point(
                ((x0 + x1) / 2, (y0 + y1) / 2),
                Size(image.original_width, image.original_height),
                Size(image.resized_width, image.resized_height),
                self.card.coordinates,
            )
            reply = click_in(self.card.prompt, prompt.phrase, x, y)
        rendered = self.tokenizer.render(opening(prompt.instruction, 1, self.card.prompt))
        rows, columns = image.merged_grid
        ids = expand_image_tokens(self.tokenizer.encode(rendered), self.tokens.image_pad, [rows * columns])
        return image, ids + self.tokenizer.encode(reply) + self.tokens.end_of_text[:1]

    def embed(
        self, image: ImageInputs, ids: Sequence[int], embedding: EmbeddingTable, encode: Any
    ) -> CalibrationSequence:
        """Embeddings with the image in its place, and the rotary tables of their positions."""
        embeds = embedding(ids)
        feeds = plan_vision(image.grid_h, image.grid_w, self.vision).inputs()
        encoded = encode.run(["image_embeds"], {"pixel_values": image.pixel_values, **feeds})[0]
        embeds[np.asarray(ids) == self.tokens.image_pad] = encoded
        positions = prompt_positions(ids, self.tokens.image_pad, [image.merged_grid], self.text)
        cos, sin = rope_tables(positions.values, self.text)
        return CalibrationSequence(embeds, cos[0], sin[0])


def _open_vision(path: Path) -> Any:
    """The portable vision graph, as ONNX Runtime runs it."""
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(
            "calibration runs the vision tower in ONNX Runtime, which is missing; `pip install starkv[cpu]`"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = usable_processors()
    # Packed weights would be a second copy of a large tower, for a few images.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
