# SPDX-License-Identifier: Apache-2.0
"""Prompts as a training of KV factors runs over them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starkv.calibration.prompts import GuiPrompt
from starkv.errors import UsageError
from starkv.kv_training.sequences import (
    TrainingPrompt,
    digest,
    lay_out,
    suite_prompts,
    training_prompts,
)
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.preprocess.tokenizer import ChatTokenizer


def test_replies_lie_behind_screenshots_and_count(gui_tiny_engine: Path) -> None:
    engine = OrtEngine(gui_tiny_engine, threads=1)
    tokenizer = ChatTokenizer.from_directory(gui_tiny_engine)
    prompts = list(suite_prompts("train", 5))
    assert [len(prompt.images) for prompt in prompts[:4]] == [1, 1, 1, 1]
    assert len(prompts[4].images) >= 3
    sequences = lay_out(engine, tokenizer, prompts)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert isinstance(prompt.reply, str)
        said = [*tokenizer.encode(prompt.reply), engine.manifest.tokens.end_of_text[0]]
        assert sequence.length == sequence.reply + len(said)
        rows = sequence.rows
        np.testing.assert_array_equal(rows.embeds[sequence.reply :].numpy(), engine.embed(said))
        cells = sum((image.width // 28) * (image.height // 28) for image in prompt.images)
        # All but rows before an image token, and the last one, which nothing follows.
        assert int(sequence.counted.sum()) == sequence.length - cells - 1
        assert bool(sequence.counted[sequence.earliest : -1].all())
        assert not bool(sequence.counted[sequence.earliest - 2])
        assert cells < sequence.earliest < sequence.reply
        assert len(rows.cosines) == len(rows.sines) == sequence.length
    assert digest(sequences) == digest(lay_out(engine, tokenizer, prompts))
    assert digest(sequences) != digest(sequences[:4])


def test_a_box_becomes_a_click_and_a_prompt_without_either_is_refused(gui_tiny_engine: Path) -> None:
    engine = OrtEngine(gui_tiny_engine, threads=1)
    tokenizer = ChatTokenizer.from_directory(gui_tiny_engine)
    image = Image.new("RGB", (224, 224))
    boxed = GuiPrompt(image, "Click 'Save'.", box=(100, 100, 124, 124), phrase="'Save'")
    (asked,) = training_prompts("gui-tiny", [boxed], 10, 10**6)
    (sequence,) = lay_out(engine, tokenizer, [asked])
    said = tokenizer.encode("Action: click(start_box='(112,112)')")
    np.testing.assert_array_equal(sequence.rows.embeds[sequence.reply : -1].numpy(), engine.embed(said))
    with pytest.raises(UsageError, match="neither a reply nor a box"):
        lay_out(engine, tokenizer, [TrainingPrompt((image,), "Click.", "")])
    with pytest.raises(UsageError, match="no prompts to train on"):
        lay_out(engine, tokenizer, [])


def test_other_models_train_on_drawn_desktops() -> None:
    prompts = list(training_prompts("ui-tars-1.5-7b", [], 3, 10**6))
    assert len(prompts) == 3
    assert all(isinstance(prompt.reply, GuiPrompt) and prompt.reply.box for prompt in prompts)
