# SPDX-License-Identifier: Apache-2.0
"""Real trainings of the tiny model's factors: what they gain, and that an interruption changes nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from kv_training_cases import (
    RECENT,
    biases_of,
    factors_of,
    make_sequences,
    output_weights_of,
    statistics_of,
    tiny_decoder,
)

from starkv.calibration.kv_packing import make_packing
from starkv.errors import CalibrationError, UsageError
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.options import PackingOptions
from starkv.kv_training import phases, training
from starkv.kv_training.judge import Judge, divided
from starkv.kv_training.measure import distance
from starkv.kv_training.options import TrainingOptions
from starkv.kv_training.phases import LessonPlan
from starkv.kv_training.pinned import PinnedFactors
from starkv.kv_training.sequences import TrainingSequence
from starkv.kv_training.soft import SoftFactors
from starkv.kv_training.start import first_factors
from starkv.kv_training.state import StateFile, soft_factors, soft_parts
from starkv.kv_training.training import Trained, Training
from starkv.lowrank.latent_format import FLOAT32
from starkv.runtime.engines.torch_decoder import TorchDecoder

OPTIONS = TrainingOptions(PackingOptions("none", 0.4), steps=24, batch=3, save_every=4)


@pytest.fixture(scope="module")
def decoder(tiny: TinyModel) -> TorchDecoder:
    return tiny_decoder(tiny)


@pytest.fixture(scope="module")
def sequences(decoder: TorchDecoder) -> list[TrainingSequence]:
    return make_sequences(decoder, 10)


class StoppedError(Exception):
    pass


class Steps:
    """Counts steps, and stops a training after some of them."""

    def __init__(self, most: int | None = None) -> None:
        self.seen: list[tuple[str, str]] = []
        self._most = most

    def start(self, stage: str, total: int) -> None:
        self._stage = stage

    def advance(self, item: str) -> None:
        self.seen.append((self._stage, item))
        if len(self.seen) == self._most:
            raise StoppedError


@pytest.fixture(scope="module")
def first(decoder: TorchDecoder, sequences: list[TrainingSequence]) -> SoftFactors:
    """To be copied: training changes factors in place."""
    return first_factors(decoder, factors_of(decoder, sequences), sequences, RECENT, seed=0)


def copied(soft: SoftFactors) -> SoftFactors:
    groups = [len(layer.keys) for layer in soft.layers]
    return soft_factors(groups, [[tensor.clone() for tensor in part] for part in soft_parts(soft)])


def train(
    decoder: TorchDecoder,
    sequences: list[TrainingSequence],
    first: SoftFactors,
    options: TrainingOptions = OPTIONS,
    state: StateFile | None = None,
    steps: Steps | None = None,
) -> Trained:
    return Training(decoder, sequences, options, RECENT, lambda: copied(first), state, steps).run()


def test_training_beats_its_start_and_factors_without_training(
    decoder: TorchDecoder, sequences: list[TrainingSequence], first: SoftFactors
) -> None:
    """At no more bytes, and nearer to the model also in replies that it was not trained on."""
    options = replace(OPTIONS, steps=60, batch=5)
    steps = Steps()
    trained = train(decoder, sequences, first, options, steps=steps)
    statistics = statistics_of(decoder, sequences)
    free = make_packing(options.packing, statistics, biases_of(decoder), output_weights_of(decoder))
    assert isinstance(free, LowRankPacking)
    without = PinnedFactors.of_packing(free, FLOAT32)
    assert trained.factors.row_bytes <= trained.budget == without.row_bytes

    phases_seen = [phase for phase, *_ in trained.history]
    assert 0 < phases_seen.index("recovery") < 4 * options.rank_steps
    bytes_seen = [size for phase, *_, size in trained.history if phase == "ranks"]
    assert bytes_seen == sorted(bytes_seen, reverse=True)
    assert bytes_seen[-1] <= trained.budget
    assert bytes_seen[0] > trained.budget
    recovery = [loss for phase, _, loss, _ in trained.history if phase == "recovery"]
    assert np.mean(recovery[-10:]) < 0.8 * np.mean(recovery[:10])
    assert steps.seen[-1][0] == "recovery"
    assert f"{trained.factors.row_bytes:,} bytes a token (budget {trained.budget:,})" in steps.seen[-1][1]
    for asked in (sequences, make_sequences(decoder, 10, first=500)):
        before, after = (distance(decoder, asked, RECENT, factors) for factors in (without, trained.factors))
        assert after.divergence < (0.9 if asked is sequences else 0.97) * before.divergence
        assert after.logit_error < before.logit_error


def test_training_for_quantized_latents_beats_quantizing_afterwards(
    decoder: TorchDecoder, sequences: list[TrainingSequence], first: SoftFactors
) -> None:
    wanted = replace(OPTIONS, packing=PackingOptions("int4", 1.0), steps=40, batch=5)
    trained = train(decoder, sequences, first, wanted)
    statistics = statistics_of(decoder, sequences)
    free = make_packing(
        PackingOptions("none", 1.0), statistics, biases_of(decoder), output_weights_of(decoder)
    )
    assert isinstance(free, LowRankPacking)
    afterwards = PinnedFactors.of_packing(free, wanted.latent)
    assert trained.factors.row_bytes == afterwards.row_bytes
    before, after = (
        distance(decoder, sequences, RECENT, factors) for factors in (afterwards, trained.factors)
    )
    assert after.divergence < before.divergence


@pytest.fixture(scope="module")
def whole(decoder: TorchDecoder, sequences: list[TrainingSequence], first: SoftFactors) -> Trained:
    return train(decoder, sequences, first)


@pytest.mark.parametrize("stopped_after", [3, 6, 19])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    decoder: TorchDecoder,
    sequences: list[TrainingSequence],
    first: SoftFactors,
    whole: Trained,
    tmp_path: Path,
    stopped_after: int,
) -> None:
    """Before anything is saved, in the first phase, and in the second."""
    state = StateFile(tmp_path / "state", "tiny")
    with pytest.raises(StoppedError):
        train(decoder, sequences, first, state=state, steps=Steps(stopped_after))
    assert state.path.exists() == (stopped_after > OPTIONS.save_every)
    steps = Steps()
    resumed = train(decoder, sequences, first, state=state, steps=steps)
    assert (len(steps.seen) < len(whole.history)) == (stopped_after > OPTIONS.save_every)
    assert resumed.history == whole.history
    assert (resumed.budget, resumed.divergence) == (whole.budget, whole.divergence)
    for one, other in zip(resumed.factors.trained, whole.factors.trained, strict=True):
        assert torch.equal(one, other)


def test_a_state_of_another_training_is_refused(
    decoder: TorchDecoder, sequences: list[TrainingSequence], first: SoftFactors, tmp_path: Path
) -> None:
    state = StateFile(tmp_path / "state", "tiny")
    with pytest.raises(StoppedError):
        train(decoder, sequences, first, state=state, steps=Steps(5))
    with pytest.raises(UsageError, match="another model, other options or other prompts"):
        train(decoder, sequences, first, state=StateFile(state.path, "large"))
    for damage in (b"", state.path.read_bytes()[:500], b"not a state"):
        state.path.write_bytes(damage)
        with pytest.raises(UsageError, match=r"damaged .* delete it to train from the start"):
            train(decoder, sequences, first, state=state)
    state.remove()
    assert not state.path.exists()


def test_a_budget_that_is_not_met_in_time_is_refused(
    decoder: TorchDecoder,
    sequences: list[TrainingSequence],
    first: SoftFactors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "pace", lambda *_: 1e-6)
    with pytest.raises(
        UsageError, match=r"8 steps left \d+ bytes per token, and the budget is \d+; allow more"
    ):
        train(decoder, sequences, first, replace(OPTIONS, steps=8))


def test_losses_that_are_no_numbers_stop_the_training(
    decoder: TorchDecoder,
    sequences: list[TrainingSequence],
    first: SoftFactors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = sequences[0].rows
    broken = replace(sequences[0], rows=replace(rows, embeds=torch.full_like(rows.embeds, torch.nan)))
    with pytest.raises(CalibrationError, match="replies to prompt 0 is no finite number"):
        first_factors(decoder, factors_of(decoder, sequences), [broken], RECENT, seed=0)
    run = Training(decoder, [broken], OPTIONS, RECENT, lambda: copied(first))
    with pytest.raises(CalibrationError, match=r"the loss of step 0 \(ranks\) is not a finite number"):
        run.run()


def test_the_best_factors_are_kept(
    decoder: TorchDecoder,
    sequences: list[TrainingSequence],
    first: SoftFactors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With steps that are much too long recovery makes all worse; what it began with is left."""
    wild = replace(OPTIONS, factor_rate=1.0, save_every=6)
    seen: list[tuple[float, torch.Tensor]] = []
    divergence = Judge.divergence

    def noting(judge: Judge, factors: PinnedFactors) -> float:
        found = divergence(judge, factors)
        seen.append((found, factors.trained[0].detach().clone()))
        return found

    monkeypatch.setattr(Judge, "divergence", noting)
    monkeypatch.setattr(phases.RankPhase, "step", rank_step_without_factors)
    trained = train(decoder, sequences, first, wild)
    assert len(seen) == 4
    assert trained.divergence == seen[0][0] == min(found for found, _ in seen)
    assert torch.equal(trained.factors.trained[0], seen[0][1])


def rank_step_without_factors(phase: phases.RankPhase, step: int, distillation: phases.Distillation) -> float:
    with torch.no_grad():
        for part in phase.soft.parts:
            part.threshold.add_(phase.optimizer.param_groups[-1]["lr"])
            part.keep_floor()
    return 0.0


def test_every_tenth_run_is_held_out(sequences: list[TrainingSequence]) -> None:
    many = sequences * 6
    learned, held = divided(many)
    assert len(held) == 6
    assert len(learned) == 54
    assert divided(sequences) == (sequences, sequences)


def test_a_plan_of_lessons_sees_every_sequence_and_repeats_itself(
    decoder: TorchDecoder, sequences: list[TrainingSequence], first: SoftFactors
) -> None:
    plan, again = (LessonPlan(sequences, 5, seed=3) for _ in range(2))
    steps = [list(plan.at("recovery", step)) for step in range(8)]
    assert [list(again.at("recovery", step)) for step in range(8)] == steps
    for epoch in range(4):
        seen = [id(sequence) for step in steps[2 * epoch : 2 * epoch + 2] for sequence, _ in step]
        assert sorted(seen) == sorted(map(id, sequences))
    starts = [start - sequence.reply for step in steps for sequence, start in step]
    assert starts.count(0) > len(starts) / 2
    assert min(starts) < 0
    assert all(start >= sequence.earliest for step in steps for sequence, start in step)
    assert phases.REPLY_SHARE < 1
