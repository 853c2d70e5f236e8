# SPDX-License-Identifier: Apache-2.0
"""Walks a decoder layer by layer over calibration prompts and finds each layer's scales. Needs PyTorch.

Hidden states are those of the unquantized layers. Scaling leaves their function as it is, so each layer is
searched under the activations that the model really has, no layer's result depends on another's, and an error
of an early layer is not made up for by fitting later ones to these few prompts.

Memory holds half a layer's weights and the hidden states of all prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from starkv.export.models.config import ModelConfig
from starkv.export.progress import NoProgress, Progress
from starkv.export.quantize.awq_clip import search_clips
from starkv.export.quantize.awq_plan import GroupName, GroupResult, LayerScales, ScalePlan
from starkv.export.quantize.awq_scales import Rounding, search_group
from starkv.export.quantize.awq_source import LAYERS, Rows, ScaledSource
from starkv.export.quantize.blockwise import fitting_block_size
from starkv.export.quantize.calibration import CalibrationSequence, digest
from starkv.export.quantize.presets import Preset
from starkv.export.quantize.torch_layer import (
    ATTENTION_WEIGHTS,
    MLP_WEIGHTS,
    Place,
    Rope,
    Weights,
    attention_block,
    mlp_block,
    read_weights,
)
from starkv.manifest import TextShape

__all__ = ["ScaledSource", "search_scales"]

SEARCH_ROWS = 512
"""Rows of activations that scales are judged by: a random choice from all prompts."""
SEARCH_OUTPUTS = 1024
"""Outputs of each linear layer that scales are judged by, evenly spaced."""
UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")
"""Errors of queries and keys meet in a product, which the error of either one's outputs doesn't show."""
_PLAN_FOLDER = "awq"
_ALGORITHM = "awq 2"
"""Part of the fingerprint: another where the same input gives other scales."""


class Watcher:
    """Mean magnitudes of a linear layer's inputs, and a choice of its rows."""

    def __init__(self, chosen: Tensor) -> None:
        """Begin before the first prompt; ``chosen`` [rows of all prompts] bool says which rows are kept."""
        self._chosen = chosen
        self._total: Tensor | None = None
        self._kept: list[Tensor] = []
        self._taken = 0

    def __call__(self, activations: Tensor) -> None:
        """Take [S,K] rows of the next prompt."""
        total = activations.abs().sum(0)
        self._total = total if self._total is None else self._total + total
        end = self._taken + len(activations)
        self._kept.append(activations[self._chosen[self._taken : end]])
        self._taken = end

    @property
    def magnitudes(self) -> Tensor:
        """[K] mean absolute activations; a prompt must have been seen."""
        assert self._total is not None
        return self._total / self._taken

    @property
    def rows(self) -> Tensor:
        """[T,K] chosen activations."""
        return torch.cat(self._kept)


@dataclass(frozen=True)
class _Search:
    """What is the same for all layers."""

    source: Rows
    config: ModelConfig
    preset: Preset
    place: Place
    ropes: Sequence[Rope]
    chosen: Tensor
    """[rows of all prompts] bool."""

    def layer(self, name: str, hidden: list[Tensor]) -> LayerScales:
        """Scales of the layer ``name``; moves the hidden states of all prompts behind it."""
        inputs: dict[GroupName, npt.NDArray[np.float32]] = {}
        results: dict[GroupName, GroupResult] = {}
        clips: dict[str, npt.NDArray[np.uint8]] = {}
        epsilon, shape = self.config.norm_epsilon, self.config.text

        before, inside = Watcher(self.chosen), Watcher(self.chosen)
        weights = read_weights(self.source, name, ATTENTION_WEIGHTS, self.place)
        for index, rope in enumerate(self.ropes):
            hidden[index] = attention_block(
                hidden[index], weights, shape.head_dim, epsilon, rope, (before, inside)
            )
        projections = [f"self_attn.{projection}_proj" for projection in "qkv"]
        inputs["attention"], results["attention"] = self._group(projections, weights, before)
        origins = value_channels(shape)
        values, results["output"] = self._group(["self_attn.o_proj"], weights, inside, origins)
        inputs["output"] = values[origins]
        clips |= self._clips(projections, weights, before, inputs["attention"])
        clips |= self._clips(["self_attn.o_proj"], weights, inside, inputs["output"])
        del weights

        before, inside = Watcher(self.chosen), Watcher(self.chosen)
        weights = read_weights(self.source, name, MLP_WEIGHTS, self.place)
        for index, rows in enumerate(hidden):
            hidden[index] = mlp_block(rows, weights, epsilon, (before, inside))
        projections, down = ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]
        inputs["mlp"], results["mlp"] = self._group(projections, weights, before)
        inputs["down"], results["down"] = self._group(down, weights, inside)
        clips |= self._clips(projections, weights, before, inputs["mlp"])
        clips |= self._clips(down, weights, inside, inputs["down"])
        return LayerScales(inputs, values, clips, results)

    def _group(
        self,
        names: Sequence[str],
        weights: Weights,
        seen: Watcher,
        origins: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.float32], GroupResult]:
        matrices = [_evenly(weights[f"{name}.weight"], SEARCH_OUTPUTS).float() for name in names]
        features, device = matrices[0].shape[1], self.place.device
        shared = torch.arange(features) if origins is None else torch.from_numpy(origins)
        scales, result = search_group(
            matrices,
            seen.rows.to(self.place.dtype),
            seen.magnitudes,
            shared.to(device),
            self._rounding(features),
        )
        return scales.cpu().numpy(), result

    def _clips(
        self, names: Sequence[str], weights: Weights, seen: Watcher, inputs: npt.NDArray[np.float32]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        scales, rows = torch.from_numpy(inputs).to(self.place.device), seen.rows.to(self.place.dtype)
        rounding = self._rounding(len(inputs))
        return {
            f"{name}.weight": search_clips(weights[f"{name}.weight"], scales, rows, rounding).cpu().numpy()
            for name in names
            if name not in UNCLIPPED
        }

    def _rounding(self, features: int) -> Rounding:
        # Widths that no block divides are filled up with zeros when they are stored.
        block_size = fitting_block_size(features, self.preset.block_size) or self.preset.block_size
        return Rounding(4 if self.preset.decoder == "int4" else 8, block_size)


def search_scales(
    source: Rows,
    config: ModelConfig,
    sequences: Sequence[CalibrationSequence],
    preset: Preset,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> ScalePlan:
    """Find the scales of all decoder layers, going on where an earlier run stopped.

    Args:
        source: the checkpoint.
        config: its sizes.
        sequences: calibration prompts, at least one.
        preset: how the decoder's weights will be stored: int4 or int8.
        progress: told of every layer.
        folder: the plan is kept in a folder in it while it grows; in memory only if None.
    """
    progress = progress or NoProgress()
    place, count = Place.best(), config.text.layers
    plan = ScalePlan()
    if folder is not None:
        plan = ScalePlan.load(folder / _PLAN_FOLDER, _fingerprint(source, config, sequences, preset))
    hidden = [
        torch.from_numpy(rows).to(place.device) for rows in plan.hidden or [one.embeds for one in sequences]
    ]
    search = _Search(
        source,
        config,
        preset,
        place,
        ropes=[Rope.of(one.rope_cos, one.rope_sin, place.device) for one in sequences],
        chosen=_choose_rows(sum(map(len, hidden)), place.device),
    )
    progress.start("calibrate", count)
    for index in range(len(plan.layers)):
        progress.advance(f"layer {index}")
    for index in range(len(plan.layers), count):
        with torch.no_grad():
            layer = search.layer(f"{LAYERS}.{index}", hidden)
        plan.append(layer, [rows.cpu().numpy() for rows in hidden])
        progress.advance(f"layer {index}")
    return plan


def value_channels(shape: TextShape) -> npt.NDArray[np.int64]:
    """[heads * head_dim]: the value channel that each input of the output projection is a mix of.

    Query heads of a group share their values' channels.
    """
    channels = np.arange(shape.kv_heads * shape.head_dim).reshape(shape.kv_heads, shape.head_dim)
    of_inputs: npt.NDArray[np.int64] = np.repeat(channels, shape.heads // shape.kv_heads, axis=0).reshape(-1)
    return of_inputs


def _choose_rows(total: int, device: torch.device) -> Tensor:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[:SEARCH_ROWS]] = True
    return chosen.to(device)


def _evenly(weight: Tensor, most: int) -> Tensor:
    """At most so many rows of a weight, evenly spaced."""
    if len(weight) <= most:
        return weight
    return weight[torch.linspace(0, len(weight) - 1, most, device=weight.device).round().long()]


def _fingerprint(
    source: Rows, config: ModelConfig, sequences: Sequence[CalibrationSequence], preset: Preset
) -> str:
    """Names the prompts, the sizes, the preset, and the weights by their norms and first rows."""
    parts: list[npt.NDArray[np.generic] | str] = [_ALGORITHM, repr(config), repr(preset)]
    for index in range(config.text.layers):
        for name in (*ATTENTION_WEIGHTS, *MLP_WEIGHTS):
            full = f"{LAYERS}.{index}.{name}"
            shape = source.shape(full)
            parts.append(source.rows(full, 0, 1 if len(shape) > 1 else shape[0]))
    for one in sequences:
        parts += [one.embeds, one.rope_cos, one.rope_sin]
    return digest(parts)
