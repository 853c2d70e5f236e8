# SPDX-License-Identifier: Apache-2.0
"""Training of factors from end to end (STAR-KV, arXiv 2606.08382).

The model is frozen; only factors, gains and thresholds are trained, so the teacher is the same weights with
the path switched off, and no second copy is in memory. Beside the decoder's weights a training holds exact
projection outputs, and activations of the student's rows, which are the text behind a screenshot. By this
count a model of 7B in bfloat16 fits a GPU of 24 GB; in float32 it would take 30 GB of memory, and days on a
processor. So far only small models were trained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.export.progress import NoProgress, Progress
from starkv.kv_training.decoder import ExactCache
from starkv.kv_training.judge import Judge, divided
from starkv.kv_training.options import TrainingOptions
from starkv.kv_training.phases import Distillation, LessonPlan, RankPhase, RecoveryPhase
from starkv.kv_training.pinned import PinnedFactors, pin
from starkv.kv_training.sequences import TrainingSequence
from starkv.kv_training.soft import SoftFactors
from starkv.kv_training.start import budget_bytes, pace
from starkv.kv_training.state import (
    Phase,
    Saved,
    StateFile,
    pinned_factors,
    pinned_parts,
    soft_factors,
    soft_parts,
)
from starkv.runtime.engines.torch_decoder import TorchDecoder

PATIENCE = 4
"""The first phase may take so many times the steps that were planned."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    factors: PinnedFactors
    budget: int
    """Bytes per token over all layers that were allowed; the factors take that or less."""
    divergence: float
    """Of the factors from the model in held-out replies, nats per token."""
    history: list[tuple[str, int, float, int]]
    """Phase, step, loss of distillation in nats per token, bytes per token."""


@dataclass
class Training:
    """A training in progress.

    Args:
        decoder: the frozen model.
        sequences: to learn from.
        options: settings.
        recent: newest rows that stay exact.
        first: makes the factors that training starts from; not called where a saved state is found.
        state: where the state is kept; None: nowhere.
        progress: told of every step.
        device: of the decoder.
    """

    decoder: TorchDecoder
    sequences: Sequence[TrainingSequence]
    options: TrainingOptions
    recent: int
    first: Callable[[], SoftFactors]
    state: StateFile | None = None
    progress: Progress | None = None
    device: str = "cpu"

    def run(self) -> Trained:
        """Train to the end, from the state saved last.

        Raises:
            UsageError: the budget can't be met, or the saved state is of another training.
            CalibrationError: a loss is no number.
        """
        saved = self.state.load(self.device) if self.state else None
        self._history = saved.history if saved else []
        self._best = saved.best if saved else math.inf
        self._best_parts = saved.best_parts if saved else []
        learned, held = divided(self.sequences)
        batch, exact = self.options.batch, ExactCache(self.decoder)
        plan = LessonPlan(learned, batch, self.options.seed)
        self._distillation = Distillation(self.decoder, plan, self.recent, exact)
        self._judge = Judge(self.decoder, held, self.recent, batch, exact)
        if saved and saved.phase == "recovery":
            pinned = pinned_factors(saved.groups, saved.parts, self.options.latent)
            self._budget = saved.budget
            return self._recover(pinned, saved)
        soft = soft_factors(saved.groups, saved.parts) if saved else self.first()
        self._budget = budget_bytes(soft, self.options)
        return self._recover(self._choose_ranks(soft, saved), None)

    def _choose_ranks(self, soft: SoftFactors, saved: Saved | None) -> PinnedFactors:
        planned = self.options.rank_steps
        rate = pace(soft, self.options.latent, self._budget, planned)
        phase = RankPhase(soft, self.options, self._budget, rate)
        if saved:
            phase.optimizer.load_state_dict(saved.optimizer)
        progress = self.progress or NoProgress()
        progress.start("ranks", planned)
        groups = [len(layer.keys) for layer in soft.layers]
        step = saved.step if saved else 0
        while not phase.done:
            if step == PATIENCE * planned:
                raise UsageError(
                    f"{step} steps left {phase.row_bytes} bytes per token, and the budget is {self._budget}; "
                    "allow more --steps or a larger --kv-rank"
                )
            loss = phase.step(step, self._distillation)
            step += 1
            self._note("ranks", step, loss, phase.row_bytes, progress)
            self._save("ranks", step, groups, soft_parts(soft), phase.optimizer)
        return pin(soft, self.options.latent, self._budget)

    def _recover(self, pinned: PinnedFactors, saved: Saved | None) -> Trained:
        steps = self.options.steps - self.options.rank_steps
        phase = RecoveryPhase(pinned, self.options, steps)
        if saved:
            phase.optimizer.load_state_dict(saved.optimizer)
        progress = self.progress or NoProgress()
        progress.start("recovery", steps)
        groups = [len(layer.keys) for layer in pinned.layers]
        if not saved:
            self._consider(pinned)
        for step in range(saved.step if saved else 0, steps):
            loss = phase.step(step, self._distillation)
            self._note("recovery", step + 1, loss, pinned.row_bytes, progress)
            if (step + 1) % self.options.save_every == 0 or step + 1 == steps:
                self._consider(pinned)
            self._save("recovery", step + 1, groups, pinned_parts(pinned), phase.optimizer)
        best = pinned_factors(groups, self._best_parts, self.options.latent)
        return Trained(best, self._budget, self._best, self._history)

    def _consider(self, pinned: PinnedFactors) -> None:
        """Keep the factors if they are the best so far."""
        divergence = self._judge.divergence(pinned)
        if divergence < self._best:
            self._best = divergence
            self._best_parts = [[tensor.clone() for tensor in part] for part in pinned_parts(pinned)]

    def _note(self, phase: str, step: int, loss: float, row_bytes: int, progress: Progress) -> None:
        self._history.append((phase, step, loss, row_bytes))
        progress.advance(f"KL {loss:.4f}, {row_bytes:,} bytes a token (budget {self._budget:,})")

    def _save(
        self,
        phase: Phase,
        step: int,
        groups: list[int],
        parts: list[list[Tensor]],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if self.state and step % self.options.save_every == 0:
            saved = Saved(
                phase,
                step,
                groups,
                parts,
                optimizer.state_dict(),
                self._budget,
                self._best,
                self._best_parts,
                self._history,
            )
            self.state.save(saved)
