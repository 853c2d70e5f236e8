# SPDX-License-Identifier: Apache-2.0
"""The state of a training on disk, so that one that was interrupted goes on where it was saved last."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kv_training.pinned import PinnedFactors, PinnedLayer, PinnedPart
from starkv.kv_training.soft import SoftFactors, SoftLayer, SoftPart
from starkv.lowrank.latent_format import LatentFormat

Phase = Literal["ranks", "recovery"]

_DAMAGES = (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, AttributeError)
"""What reading a file that is cut off or no state at all ends in."""


@dataclass
class Saved:
    """All that a phase needs to go on."""

    phase: Phase
    step: int
    """Steps of this phase that are done."""
    groups: list[int]
    """Groups of keys in each layer."""
    parts: list[list[Tensor]]
    """Tensors of each part, in the order of its fields."""
    optimizer: dict[str, Any]
    budget: int
    """Bytes per token over all layers."""
    best: float
    """Divergence in nats per token of the best factors so far; infinite in the first phase."""
    best_parts: list[list[Tensor]]
    """Of those; none in the first phase."""
    history: list[tuple[str, int, float, int]]
    """Phase, step, loss of distillation, bytes per token."""


class StateFile:
    """One file, replaced as a whole.

    Args:
        path: of the file.
        identity: names model, options and prompts.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self._identity = path, identity

    def save(self, saved: Saved) -> None:
        """Write the state.

        Raises:
            OSError: the disk is full.
        """
        staged = self.path.with_name(f"{self.path.name}.part")
        with staged.open("wb") as stream:
            torch.save({"identity": self._identity, **vars(saved)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(self.path)

    def load(self, device: str) -> Saved | None:
        """The state saved last; None if there is none.

        Raises:
            UsageError: it is damaged, or of another training.
        """
        try:
            found = torch.load(self.path, map_location=device, weights_only=True)
            identity = found.pop("identity")
            saved = Saved(**found)
        except FileNotFoundError:
            return None
        except _DAMAGES as error:
            raise UsageError(
                f"{self.path} is damaged ({error!r}); delete it to train from the start"
            ) from None
        if identity != self._identity:
            raise UsageError(
                f"{self.path} is of a training with another model, other options or other prompts; repeat "
                "those, delete the file to train from the start, or choose another --out"
            )
        return saved

    def remove(self) -> None:
        """Forget the state: the training is done."""
        self.path.unlink(missing_ok=True)


def soft_parts(soft: SoftFactors) -> list[list[Tensor]]:
    """What is saved of the first phase's factors."""
    return [[tensor.detach() for tensor in part.tensors] for part in soft.parts]


def pinned_parts(pinned: PinnedFactors) -> list[list[Tensor]]:
    """What is saved of the second phase's factors."""
    return [[part.up.detach(), part.down.detach(), part.rotation] for part in pinned.parts]


def soft_factors(groups: Sequence[int], parts: Sequence[Sequence[Tensor]]) -> SoftFactors:
    """Inverse of :func:`soft_parts`."""
    rest = iter(SoftPart(*tensors) for tensors in parts)
    return SoftFactors([SoftLayer(tuple(next(rest) for _ in range(count)), next(rest)) for count in groups])


def pinned_factors(
    groups: Sequence[int], parts: Sequence[Sequence[Tensor]], latent: LatentFormat
) -> PinnedFactors:
    """Inverse of :func:`pinned_parts`."""
    rest = iter(PinnedPart(*tensors) for tensors in parts)
    layers = [PinnedLayer(tuple(next(rest) for _ in range(count)), next(rest)) for count in groups]
    return PinnedFactors(layers, latent)
