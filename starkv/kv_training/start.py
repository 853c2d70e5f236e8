# SPDX-License-Identifier: Apache-2.0
"""Where training starts: output PCA, with strengths in one unit for all of the model's parts.

A channel's strength is how far dropping it would move the model's replies. PCA orders the channels of a part
by energy; how much energy matters in one layer's keys against another's values is measured: the gradients of
sampled replies with respect to the channels' gains give each part's Fisher information, half of which is the
divergence that dropping its channels costs, to second order.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from starkv.calibration.kv_packing import check_share
from starkv.calibration.kv_sensitivity import LayerFactors
from starkv.errors import CalibrationError
from starkv.export.progress import NoProgress, Progress
from starkv.kv_training.decoder import exact_pass, student_logits
from starkv.kv_training.lessons import Lesson
from starkv.kv_training.options import TrainingOptions
from starkv.kv_training.sequences import TrainingSequence
from starkv.kv_training.soft import OPEN_THRESHOLD, SoftFactors, SoftLayer, SoftPart
from starkv.lowrank.factor import Decomposition
from starkv.lowrank.latent_format import LatentFormat
from starkv.lowrank.plan import LayerSpectra, flat_plan
from starkv.runtime.engines.torch_decoder import TorchDecoder

LEAST_STRENGTH = 1e-3
"""As a share of a part's largest: gains are relative to strengths, so none may vanish."""
_ADVICE = "check the weights, or train in float32 if this was in 16 bits"
PROBES = 64
"""Sequences whose replies are sampled to measure sensitivities."""


def first_factors(
    decoder: TorchDecoder,
    layers: Sequence[LayerFactors],
    sequences: Sequence[TrainingSequence],
    recent: int,
    seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> SoftFactors:
    """Factors of full rank that change nothing yet, with strengths whose median is 1.

    Args:
        decoder: the model.
        layers: its factors of full rank.
        sequences: to measure sensitivities on, ``PROBES`` of them.
        recent: newest rows that stay exact.
        seed: of the sampled replies.
        device: where to.
        progress: told of every probe.

    Raises:
        CalibrationError: gradients are not numbers.
    """
    soft = SoftFactors([_soft_layer(layer, device) for layer in layers])
    informations = _informations(decoder, soft, _spread(sequences), recent, seed, progress or NoProgress())
    scales = []
    for part, information in zip(soft.parts, informations, strict=True):
        energy = float(part.first_strengths.square().sum())
        scales.append((information / energy) ** 0.5)
    scaled = [scale * part.first_strengths for scale, part in zip(scales, soft.parts, strict=True)]
    median = float(torch.cat(scaled).median())
    if not 0 < median < float("inf"):
        raise CalibrationError("the model's replies don't depend on its keys and values: check its weights")
    least = max(scales) * 1e-6
    rescaled = iter(
        [
            replace(part, first_strengths=part.first_strengths * (max(scale, least) / median))
            for scale, part in zip(scales, soft.parts, strict=True)
        ]
    )
    return SoftFactors(
        [SoftLayer(tuple(next(rescaled) for _ in layer.keys), next(rescaled)) for layer in soft.layers]
    )


def budget_bytes(soft: SoftFactors, options: TrainingOptions) -> int:
    """Bytes per token over all layers that a share of ranks stands for: those of the same share everywhere.

    Raises:
        UsageError: the share is too small for any rank.
    """
    check_share(options.rank, min(len(part.strengths) for part in soft.parts))
    return _flat_bytes(soft, options.rank, options.latent)


def pace(soft: SoftFactors, latent: LatentFormat, budget: int, steps: int) -> float:
    """How far thresholds have to rise per step to meet the budget, if all rise alike."""
    low, high = OPEN_THRESHOLD, max(float(part.strengths.max()) for part in soft.parts)
    for _ in range(30):
        middle = (low + high) / 2
        met = _bytes_at(soft, middle, latent) <= budget
        low, high = (low, middle) if met else (middle, high)
    return (high - OPEN_THRESHOLD) / steps


def _bytes_at(soft: SoftFactors, threshold: float, latent: LatentFormat) -> int:
    total = 0
    for layer in soft.layers:
        parts = []
        for part in layer.parts:
            raised = replace(part, threshold=torch.full_like(part.threshold, threshold))
            raised.keep_floor()
            parts.append(raised)
        total += SoftLayer(tuple(parts[:-1]), parts[-1]).thresholds.row_bytes(latent)
    return total


def _flat_bytes(soft: SoftFactors, share: float, latent: LatentFormat) -> int:
    spectra = [
        LayerSpectra(
            tuple(part.strengths.detach().cpu().numpy() for part in layer.keys),
            layer.values.strengths.detach().cpu().numpy(),
        )
        for layer in soft.layers
    ]
    return flat_plan(share, spectra, latent, dense_bytes=0).total_bytes


def _informations(
    decoder: TorchDecoder,
    soft: SoftFactors,
    sequences: Sequence[TrainingSequence],
    recent: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Fisher information of all gains of each part, mean over the sequences."""
    progress.start("probes", len(sequences))
    gains = [part.gains.requires_grad_() for part in soft.parts]
    totals = [0.0] * len(gains)
    generator = torch.Generator().manual_seed(seed)
    for number, sequence in enumerate(sequences):
        exact = exact_pass(decoder, sequence.rows)
        lesson = Lesson(sequence.rows, exact, sequence.reply, sequence.counted)
        logits = student_logits(decoder, [lesson], recent, soft)
        if not bool(logits.isfinite().all()):
            raise CalibrationError(
                f"what the model replies to prompt {number} is no finite number: {_ADVICE}"
            )
        chances = logits.detach().cpu().softmax(-1)
        said = torch.multinomial(chances, 1, generator=generator).to(logits.device)
        loss = -logits.log_softmax(-1).gather(-1, said).sum()
        for index, gradient in enumerate(torch.autograd.grad(loss, gains)):
            totals[index] += float(gradient.square().sum())
        progress.advance(f"reply {number}")
    for gain in gains:
        gain.requires_grad_(False)
    if not np.isfinite(totals).all():
        raise CalibrationError(f"gradients of the model's replies are not finite numbers: {_ADVICE}")
    return [total / len(sequences) for total in totals]


def _spread(sequences: Sequence[TrainingSequence]) -> Sequence[TrainingSequence]:
    """``PROBES`` of them, from all parts of the list: successive ones are about the same screen."""
    return sequences[:: max(1, len(sequences) // PROBES)][:PROBES]


def _soft_layer(layer: LayerFactors, device: str) -> SoftLayer:
    return SoftLayer(tuple(_soft_part(key, device) for key in layer.keys), _soft_part(layer.values, device))


def _soft_part(decomposition: Decomposition, device: str) -> SoftPart:
    up, down, strengths = (
        torch.from_numpy(array).float().to(device)
        for array in (decomposition.full.up, decomposition.full.down, decomposition.strengths)
    )
    strengths = strengths.clamp(min=LEAST_STRENGTH * float(strengths.max()))
    # One rate suits both factors if their entries are of one size.
    balance = float((down.square().mean() / up.square().mean()).sqrt().sqrt())
    threshold = torch.tensor(OPEN_THRESHOLD, device=device)
    return SoftPart(up * balance, down / balance, torch.ones_like(strengths), threshold, strengths)
