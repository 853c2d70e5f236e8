# SPDX-License-Identifier: Apache-2.0
"""One step of each phase: thresholds rise until the budget of bytes is met, then the ranks are fixed and the
factors make up for what is gone."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starkv.errors import CalibrationError
from starkv.kv_training.decoder import Compression, ExactCache, student_logits, teacher_logits
from starkv.kv_training.lessons import Lesson
from starkv.kv_training.options import TrainingOptions
from starkv.kv_training.pinned import PinnedFactors
from starkv.kv_training.sequences import TrainingSequence
from starkv.kv_training.soft import SoftFactors
from starkv.kv_training.state import Phase
from starkv.lowrank.objective import cache_excess, distillation_loss
from starkv.runtime.engines.torch_decoder import TorchDecoder

REPLY_SHARE = 0.8
"""How often the student starts at the reply, as after one prompt; else somewhere between the first screenshot
and the reply, as in the turns of a session that goes on from a packed cache."""
PRESSURE_GROWTH = 4.0
"""By how much the weight of the budget grows in the planned number of steps, so that it wins in the end."""
RANKS_RATE = 0.1
"""Rates of factors and gains in the first phase as a share of the second's: while thresholds rise they need
only follow, and what is long trained at a full rate drifts from where it was good."""
WARM_UP = 0.05
"""Share of the second phase in which the rate rises."""
_BETAS = (0.9, 0.99)
_PHASES: tuple[Phase, ...] = ("ranks", "recovery")


class LessonPlan:
    """What is learned at each step: which sequences, and where in them the student starts.

    The same for the same seed, phase and step, so that a resumed training goes on as if it had never stopped.
    """

    def __init__(self, sequences: Sequence[TrainingSequence], batch: int, seed: int) -> None:
        self._sequences, self._batch, self._seed = sequences, batch, seed

    def at(self, phase: Phase, step: int) -> Iterator[tuple[TrainingSequence, int]]:
        """Sequences of a step, each with the student's first row."""
        number = _PHASES.index(phase)
        random = np.random.default_rng([self._seed, number, step])
        for place in range(step * self._batch, (step + 1) * self._batch):
            epoch, index = divmod(place, len(self._sequences))
            order = np.random.default_rng([self._seed, number, 1, epoch]).permutation(len(self._sequences))
            sequence = self._sequences[order[index]]
            anywhere = int(random.integers(sequence.earliest, sequence.reply + 1))
            yield sequence, sequence.reply if random.random() < REPLY_SHARE else anywhere


class Distillation:
    """The loss that both phases share."""

    def __init__(self, decoder: TorchDecoder, plan: LessonPlan, recent: int, exact: ExactCache) -> None:
        self._decoder, self._plan, self._recent = decoder, plan, recent
        self._exact = exact

    def backward(self, phase: Phase, step: int, compression: Compression) -> float:
        """Add the gradient of a step's loss to what requires one; returns the loss in nats per token.

        Raises:
            CalibrationError: the loss is no number.
        """
        lessons = [
            Lesson(sequence.rows, self._exact.of(sequence.rows), start, sequence.counted)
            for sequence, start in self._plan.at(phase, step)
        ]
        loss = replies_loss(self._decoder, lessons, self._recent, compression)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CalibrationError(
                f"the loss of step {step} ({phase}) is not a finite number: check the weights, or train in "
                "float32 if this was in 16 bits"
            )
        loss.backward()
        return value


def replies_loss(
    decoder: TorchDecoder, lessons: Sequence[Lesson], recent: int, compression: Compression
) -> Tensor:
    """Divergence of the student from the teacher in the text that counts, nats per token."""
    student = student_logits(decoder, lessons, recent, compression)
    everything = torch.ones(len(student), dtype=torch.bool, device=student.device)
    return distillation_loss(student, teacher_logits(decoder, lessons), everything)


def _rates(factors: Iterable[Tensor], rate: float) -> list[dict[str, Any]]:
    """Adam's steps in proportion to the size of each factor's entries, which differs from part to part."""
    sizes = [(factor, rate * float(factor.detach().square().mean().sqrt())) for factor in factors]
    # The highest rate is saved with the optimizer: entries have another size when a training is resumed.
    return [{"params": [factor], "lr": own, "highest": own} for factor, own in sizes]


class RankPhase:
    """Distillation and the budget, until the budget is met.

    Args:
        soft: factors, trained in place.
        options: of the training.
        budget: bytes per token over all layers.
        pace: how far a threshold rises per step where nothing holds it back.
    """

    def __init__(self, soft: SoftFactors, options: TrainingOptions, budget: int, pace: float) -> None:
        self.soft, self._options, self._budget = soft.require_gradients(), options, budget
        parts = list(soft.parts)
        factors = [matrix for part in parts for matrix in (part.up, part.down)]
        self.optimizer = torch.optim.Adam(
            [
                *_rates(factors, RANKS_RATE * options.factor_rate),
                {"params": [part.gains for part in parts], "lr": RANKS_RATE * options.gain_rate},
                {"params": [part.threshold for part in parts], "lr": pace},
            ],
            betas=_BETAS,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes per token that the thresholds leave."""
        return sum(layer.row_bytes(self._options.latent) for layer in self.soft.thresholds)

    @property
    def done(self) -> bool:
        """Whether the budget is met."""
        return self.row_bytes <= self._budget

    def step(self, step: int, distillation: Distillation) -> float:
        """Returns the loss of distillation before the step."""
        self.optimizer.zero_grad()
        loss = distillation.backward("ranks", step, self.soft)
        weight = PRESSURE_GROWTH ** (step / self._options.rank_steps)
        excess = cache_excess(self.soft.thresholds, self._options.latent, self._budget)
        (weight * excess).backward()
        self.optimizer.step()
        for part in self.soft.parts:
            part.keep_floor()
        return loss


class RecoveryPhase:
    """Distillation alone, of pinned factors, trained in place."""

    def __init__(self, pinned: PinnedFactors, options: TrainingOptions, steps: int) -> None:
        self.pinned, self._steps = pinned, steps
        for matrix in pinned.trained:
            matrix.requires_grad_()
        self.optimizer = torch.optim.Adam(_rates(pinned.trained, options.factor_rate), betas=_BETAS)

    def step(self, step: int, distillation: Distillation) -> float:
        """Returns the loss of distillation before the step."""
        done = (step + 0.5) / self._steps
        rate = min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["highest"]
        self.optimizer.zero_grad()
        loss = distillation.backward("recovery", step, self.pinned)
        self.optimizer.step()
        return loss
