# SPDX-License-Identifier: Apache-2.0
"""How far replies move when the prompt is looked back at through latents."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from starkv.errors import UsageError
from starkv.kv_training.decoder import Compression, exact_pass, student_logits, teacher_logits
from starkv.kv_training.lessons import Lesson
from starkv.kv_training.sequences import TrainingSequence
from starkv.lowrank.objective import distillation_loss
from starkv.runtime.engines.torch_decoder import TorchDecoder


@dataclass(frozen=True)
class Distance:
    """Of the compressed model from the uncompressed one, over the tokens of replies."""

    divergence: float
    """KL divergence, mean nats per token over all replies."""
    logit_error: float
    """Norm of the logits' error relative to their spread around each token's mean, mean over the replies."""
    agreement: float
    """Share of tokens whose most likely successor is the same."""


def distance(
    decoder: TorchDecoder, sequences: Sequence[TrainingSequence], recent: int, compression: Compression
) -> Distance:
    """Compare replies, each token read behind the right ones.

    Raises:
        UsageError: there is nothing to compare.
    """
    if not sequences:
        raise UsageError("there are no replies to compare")
    divergence = error = 0.0
    same = tokens = 0
    for sequence in sequences:
        exact = exact_pass(decoder, sequence.rows)
        lessons = [Lesson(sequence.rows, exact, sequence.reply, sequence.counted)]
        with torch.no_grad():
            student = student_logits(decoder, lessons, recent, compression)
        teacher = teacher_logits(decoder, lessons)
        count = len(teacher)
        everything = torch.ones(count, dtype=torch.bool, device=teacher.device)
        divergence += count * float(distillation_loss(student, teacher, everything))
        spread = teacher - teacher.mean(-1, keepdim=True)
        error += float((student - teacher).norm() / spread.norm())
        same += int((student.argmax(-1) == teacher.argmax(-1)).sum())
        tokens += count
    return Distance(divergence / tokens, error / len(sequences), same / tokens)
