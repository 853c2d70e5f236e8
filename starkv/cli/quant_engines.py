# SPDX-License-Identifier: Apache-2.0
"""Engines of one model under several quantizations, over the same prompts, one engine in memory at a time."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from starkv.calibration.prompts import GuiPrompt
from starkv.cli.forced_replies import Reply, reply_to
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.validation.quant import Answer, kl_divergence

Started = Callable[[int], None]
"""Told how many prompts are done."""


@dataclass(frozen=True)
class Reference:
    """What the reference engine said; its logits are on disk, a large vocabulary's would fill the memory."""

    folder: Path
    tokens: list[list[int]]
    answers: list[Answer]

    def logits(self, prompt: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        """[tokens, vocab] of the reply to a prompt."""
        found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = np.load(
            self.folder / f"{prompt}.npy", mmap_mode="r"
        )
        return found


@contextmanager
def reference_answers(
    directory: Path, prompts: Sequence[GuiPrompt], longest: int, done: Started
) -> Iterator[Reference]:
    """Let the reference engine answer greedily; its logits are kept until the block ends."""
    with tempfile.TemporaryDirectory(prefix="starkv-quant-") as scratch:
        reference = Reference(Path(scratch), [], [])
        engine, tokenizer = _open(directory)
        for number, prompt in enumerate(prompts):
            reply = reply_to(prompt, engine, tokenizer, longest)
            np.save(reference.folder / f"{number}.npy", reply.logits)
            reference.tokens.append(reply.tokens)
            count = len(reply.tokens)
            same = Answer(np.zeros(count), np.ones(count, bool), reply.click, _right(prompt, reply))
            reference.answers.append(same)
            done(number + 1)
        del engine
        yield reference


def answers_of(
    directory: Path, prompts: Sequence[GuiPrompt], reference: Reference, longest: int, done: Started
) -> list[Answer]:
    """What another engine would have said token by token, and where it clicks by itself."""
    engine, tokenizer = _open(directory)
    answers = []
    for number, (prompt, tokens) in enumerate(zip(prompts, reference.tokens, strict=True)):
        forced = reply_to(prompt, engine, tokenizer, longest, tokens)
        agreements = np.asarray(forced.tokens) == np.asarray(tokens)
        # A reply that it would have written anyway need not be written again.
        own = forced if agreements.all() else reply_to(prompt, engine, tokenizer, longest)
        divergences = kl_divergence(reference.logits(number), forced.logits)
        answers.append(Answer(divergences, agreements, own.click, _right(prompt, own)))
        done(number + 1)
    return answers


def _open(directory: Path) -> tuple[OrtEngine, ChatTokenizer]:
    return OrtEngine(directory), ChatTokenizer.from_directory(directory)


def _right(prompt: GuiPrompt, reply: Reply) -> bool | None:
    if prompt.box is None:
        return None
    if reply.click is None:
        return False
    x0, y0, x1, y1 = prompt.box
    return x0 <= reply.click[0] < x1 and y0 <= reply.click[1] < y1
