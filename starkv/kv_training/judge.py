# SPDX-License-Identifier: Apache-2.0
"""Which factors of a training are the best: by replies that it doesn't learn from.

Adam's steps are noisy where a model's coordinates hang on a few channels, and a few hundred prompts are
learned by heart. So the factors are judged every now and then, those that recovery began with, too, and the
best ones are kept.
"""

from collections.abc import Sequence

import torch

from starkv.kv_training.decoder import Compression, ExactCache
from starkv.kv_training.lessons import Lesson
from starkv.kv_training.phases import replies_loss
from starkv.kv_training.sequences import TrainingSequence
from starkv.runtime.engines.torch_decoder import TorchDecoder

RUN, SHARE = 3, 10
"""Every tenth run of three successive sequences is held out: those may be about the same screen."""


def divided(
    sequences: Sequence[TrainingSequence],
) -> tuple[list[TrainingSequence], list[TrainingSequence]]:
    """Sequences to learn from, and those to judge by; the same ones where there are few."""
    held = [each for index, each in enumerate(sequences) if index // RUN % SHARE == SHARE // 2]
    if not held:
        return list(sequences), list(sequences)
    return [each for index, each in enumerate(sequences) if index // RUN % SHARE != SHARE // 2], held


class Judge:
    """Measures how far replies move.

    Args:
        decoder: the model.
        sequences: to judge by.
        recent: newest rows that stay exact.
        batch: sequences at a time.
        exact: exact passes.
    """

    def __init__(
        self,
        decoder: TorchDecoder,
        sequences: Sequence[TrainingSequence],
        recent: int,
        batch: int,
        exact: ExactCache,
    ) -> None:
        self._decoder, self._sequences, self._recent = decoder, sequences, recent
        self._batch, self._exact = batch, exact

    def divergence(self, compression: Compression) -> float:
        """Nats per token, mean over batches."""
        losses = []
        with torch.no_grad():
            for first in range(0, len(self._sequences), self._batch):
                lessons = [
                    Lesson(each.rows, self._exact.of(each.rows), each.reply, each.counted)
                    for each in self._sequences[first : first + self._batch]
                ]
                losses.append(float(replies_loss(self._decoder, lessons, self._recent, compression)))
        return sum(losses) / len(losses)
