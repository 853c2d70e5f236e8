# SPDX-License-Identifier: Apache-2.0
"""Recordings of the official implementations: where they lie and how they are read.

``STARKV_GOLDEN`` names another directory of the same format; every file found there is one test.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(os.environ.get("STARKV_GOLDEN") or Path(__file__).parent / "golden")


def recordings(folder: str, pattern: str = "*.npz") -> list[Path]:
    """Files of one subfolder, sorted; none where it is missing."""
    return sorted((ROOT / folder).glob(pattern))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Everything in one npz file."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


@dataclass(frozen=True)
class Recording:
    """One npz file."""

    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> "Recording":
        arrays = read_arrays(path)
        return cls(json.loads(str(arrays.pop("config_json"))), arrays)

    def call(self, index: int) -> dict[str, np.ndarray]:
        """Arrays of one call, without their prefix."""
        prefix = f"c{index}_"
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}


def assert_relative(actual: Any, expected: np.ndarray, tolerance: float, name: str) -> None:
    """Elements agree relative to each expected one; values near zero may differ by 1e-7 of it."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    error = np.abs(actual - expected) / (np.abs(expected) + 1e-7)
    assert error.max(initial=0.0) <= tolerance, f"{name}: relative error {error.max():.1e}"
