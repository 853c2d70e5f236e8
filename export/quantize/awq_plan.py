# SPDX-License-Identifier: Apache-2.0
"""Scales that activation-aware quantization found, on disk layer by layer.

A folder holds one safetensors file for each finished layer, the hidden states before the next one, and
``plan.json``, which is written last: what it does not name does not count.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

GroupName = Literal["attention", "output", "mlp", "down"]
"""Linear layers that share an input: q, k, v; o; gate, up; down."""

CLIP_RATIOS = (1.0, 0.92, 0.84, 0.76)
"""What a block's largest weights may be cut to."""

_PLAN = "plan.json"
_INPUTS, _VALUES, _CLIPS = "inputs.", "values", "clips."


@dataclass(frozen=True)
class GroupResult:
    """What the search found for one group of linear layers."""

    exponent: float
    """Of the mean input magnitudes in the scales; 0 where rounding the weights as they are was best."""
    error: float
    """Squared error of the outputs relative to the outputs, with these scales."""
    plain_error: float
    """The same without scales."""


@dataclass(frozen=True)
class LayerScales:
    """Factors of one decoder layer's linear inputs."""

    inputs: dict[GroupName, npt.NDArray[np.float32]]
    """Group → [K] factor of each input."""
    values: npt.NDArray[np.float32]
    """[kv_heads * head_dim]: the factors of ``output``, which the query heads of a group share."""
    clips: dict[str, npt.NDArray[np.uint8]]
    """Weight, such as ``mlp.up_proj.weight`` → [N, blocks] which of ``CLIP_RATIOS``; not all are clipped."""
    results: dict[GroupName, GroupResult]


class ScalePlan:
    """Scales of a decoder's layers, from the first one on."""

    def __init__(self, folder: Path | None = None, fingerprint: str = "") -> None:
        """An empty plan.

        Args:
            folder: where it is kept; in memory only if None.
            fingerprint: names everything that the scales depend on.
        """
        self._folder, self._fingerprint = folder, fingerprint
        self.layers: list[LayerScales] = []
        self.hidden: list[npt.NDArray[np.float32]] | None = None
        """Hidden states [S, hidden] of all prompts behind the last layer; None before the first."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def load(cls, folder: Path, fingerprint: str) -> "ScalePlan":
        """The plan that an earlier run left; an empty one where there is none, another, or a damaged one."""
        plan = cls(folder, fingerprint)
        try:
            recorded = json.loads((folder / _PLAN).read_text())
            if recorded["fingerprint"] != fingerprint:
                return plan
            layers = [_read_layer(folder, index, results) for index, results in enumerate(recorded["layers"])]
            states = load_file(_hidden_path(folder, len(layers)))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return plan
        plan.layers = layers
        plan.hidden = [states[str(index)] for index in range(len(states))]
        return plan

    def append(self, layer: LayerScales, hidden: Sequence[npt.NDArray[np.float32]]) -> None:
        """Add the next layer.

        Args:
            layer: its scales.
            hidden: hidden states [S, hidden] of every sequence behind it, where the next run would go on.
        """
        self.layers.append(layer)
        self.hidden = list(hidden)
        if self._folder is None:
            return
        count = len(self.layers)
        tensors: dict[str, npt.NDArray[Any]] = {_VALUES: layer.values}
        tensors |= {f"{_INPUTS}{group}": factors for group, factors in layer.inputs.items()}
        tensors |= {f"{_CLIPS}{weight}": ratios for weight, ratios in layer.clips.items()}
        save_file(tensors, _layer_path(self._folder, count - 1))
        states = {str(index): np.ascontiguousarray(rows) for index, rows in enumerate(hidden)}
        save_file(states, _hidden_path(self._folder, count))
        record = {
            "fingerprint": self._fingerprint,
            "layers": [
                {name: asdict(result) for name, result in done.results.items()} for done in self.layers
            ],
        }
        beside = self._folder / f".{_PLAN}"
        beside.write_text(json.dumps(record, indent=1))
        beside.replace(self._folder / _PLAN)
        _hidden_path(self._folder, count - 1).unlink(missing_ok=True)


def _layer_path(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:03}.safetensors"


def _hidden_path(folder: Path, layers: int) -> Path:
    return folder / f"hidden-{layers:03}.safetensors"


def _read_layer(folder: Path, index: int, results: dict[Any, dict[str, float]]) -> LayerScales:
    tensors = load_file(_layer_path(folder, index))

    def below(prefix: str) -> dict[Any, npt.NDArray[Any]]:
        return {name[len(prefix) :]: found for name, found in tensors.items() if name.startswith(prefix)}

    found = {name: GroupResult(**result) for name, result in results.items()}
    return LayerScales(below(_INPUTS), tensors[_VALUES], below(_CLIPS), found)
