# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose linear inputs are scaled: another form of the same function that rounds better.

An input that is multiplied by s in the weights is divided by s where it comes from: in the norm before, or in
the outputs of the linear layer before. Blocks of weights are then clipped: rounding reads the step of a block
from its largest weight.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from starkv.export.quantize.awq_plan import CLIP_RATIOS, LayerScales, ScalePlan

LAYERS = "model.language_model.layers"

Vector = npt.NDArray[np.float32]


class Rows(Protocol):
    """What is read of a source of weights."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start … stop-1`` of a tensor."""


class ScaledSource:
    """Weights of another source, scaled and clipped by a plan while they are read."""

    def __init__(self, source: Rows, plan: ScalePlan) -> None:
        self._source = source
        self._inputs: dict[str, Vector] = {}
        self._outputs: dict[str, Vector] = {}
        self._clips: dict[str, npt.NDArray[np.uint8]] = {}
        for index, layer in enumerate(plan.layers):
            self._add(f"{LAYERS}.{index}", layer)

    def _add(self, layer: str, found: LayerScales) -> None:
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        inputs, outputs, scales = self._inputs, self._outputs, found.inputs
        for name in ("q_proj", "k_proj", "v_proj"):
            inputs[f"{attention}.{name}.weight"] = scales["attention"]
        outputs[f"{layer}.input_layernorm.weight"] = scales["attention"]
        inputs[f"{attention}.o_proj.weight"] = scales["output"]
        outputs[f"{attention}.v_proj.weight"] = found.values
        outputs[f"{attention}.v_proj.bias"] = found.values
        for name in ("gate_proj", "up_proj"):
            inputs[f"{mlp}.{name}.weight"] = scales["mlp"]
        outputs[f"{layer}.post_attention_layernorm.weight"] = scales["mlp"]
        inputs[f"{mlp}.down_proj.weight"] = scales["down"]
        outputs[f"{mlp}.up_proj.weight"] = scales["down"]
        self._clips |= {f"{layer}.{weight}": ratios for weight, ratios in found.clips.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(name)

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start … stop-1`` of a tensor, scaled and clipped."""
        rows = self._source.rows(name, start, stop)
        if name in self._inputs:
            rows = rows * self._inputs[name]
        if name in self._outputs:
            divisors = self._outputs[name][start:stop]
            rows = rows / (divisors if rows.ndim == 1 else divisors[:, None])
        if name in self._clips:
            rows = clip_blocks(rows, self._clips[name][start:stop])
        return rows

    def packed(self, name: str) -> None:
        """No tensor is stored quantized: scaled weights are rounded anew."""
        return None

    def input_divisors(self, norm: str) -> Vector | None:
        """[K]: what the outputs of a norm's weight were divided by, or None where they are the model's own.

        A graph that puts out a norm's values, or their length, multiplies by it first.
        """
        return self._outputs.get(norm)


def clip_blocks(weight: npt.NDArray[np.float32], chosen: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Cut a weight [N,K] block by block to a share of the block's largest magnitude.

    Args:
        weight: float32.
        chosen: [N, blocks] which of ``CLIP_RATIOS``; blocks are of one size, the last may be cut short.
    """
    rows, features = weight.shape
    count = chosen.shape[1]
    size = -(-features // count)
    # Blocks are powers of two; only the last can be short.
    size = 1 << (size - 1).bit_length()
    padded = np.pad(weight, ((0, 0), (0, count * size - features))) if count * size > features else weight
    blocks = padded.reshape(rows, count, size)
    limits = np.abs(blocks).max(axis=2) * np.asarray(CLIP_RATIOS, np.float32)[chosen]
    clipped: npt.NDArray[np.float32] = np.clip(blocks, -limits[..., None], limits[..., None])
    return clipped.reshape(rows, -1)[:, :features]
