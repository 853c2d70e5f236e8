# SPDX-License-Identifier: Apache-2.0
"""Prompts that show a quantizer what a decoder's activations look like."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from starkv.export.progress import Progress


@dataclass(frozen=True)
class CalibrationSequence:
    """One prompt with its reply, as the decoder takes them: images are in their places."""

    embeds: npt.NDArray[np.float32]
    """[S, hidden]."""
    rope_cos: npt.NDArray[np.float32]
    """[S, head_dim / 2]."""
    rope_sin: npt.NDArray[np.float32]
    """[S, head_dim / 2]."""


class Calibration(Protocol):
    """Prompts that an export can ask for.

    The export itself knows no chat templates and no images; whoever starts it does.
    """

    @property
    def digest(self) -> str:
        """Names the prompts: others have another digest."""

    def sequences(self, directory: Path, progress: Progress) -> Sequence[CalibrationSequence]:
        """Make the prompts.

        Args:
            directory: with the model's ``config.json``, tokenizer, ``vision.onnx`` and embedding table.
            progress: told of every prompt: encoding a screen takes a large tower some 20 s on a CPU.
        """


def digest(parts: Iterable[npt.NDArray[np.generic] | str]) -> str:
    """sha256 of arrays (with their shapes and dtypes) and texts, in order."""
    running = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            running.update(part.encode() + b"\0")
        else:
            running.update(f"{part.dtype}{part.shape}".encode())
            running.update(np.ascontiguousarray(part).tobytes())
    return running.hexdigest()
