# SPDX-License-Identifier: Apache-2.0
"""Attention to an int8 or int4 cache in ONNX Runtime.

Codes of keys are those of rotated keys without the bias's share, which in Qwen2 is many times larger than
the rest. Its part of the logits, q · R(position) bias, enters as an attention bias. It depends on a row's
position alone: the row's cosines and sines times what query and bias make of each rotary pair.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from starkv.export.lower.attention_weights import AttentionInputs
from starkv.export.lower.branch import Branch
from starkv.export.lower.graph_edit import new_input
from starkv.export.lower.ort_attention import MICROSOFT
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.quantized_rows import RowQuantization

ROPE_TABLE = "rope_table"
"""Inputs, one per component of a position: [P, 2 n] f32; cosines, then sines of the n rotary pairs that read
that component, divided by √D."""
ROW_POSITIONS = "row_positions"
"""Inputs, one per layer: [B, C, 3] i32; t, h and w of each row of the packed cache."""

_COMPONENTS = 3
"""Of a stored position; one-dimensional RoPE reads the first."""


class QuantizedKvLowering:
    """Writes the quantized branch of each layer."""

    def __init__(self, model: ir.Model, packing: QuantizedPacking, mrope_section: Sequence[int]) -> None:
        """Add the inputs that all layers share.

        Args:
            model: the decoder.
            packing: scales and biases.
            mrope_section: rotary pairs that turn with t, h and w; one number for one-dimensional RoPE.
        """
        self._packing, self._sections = packing, tuple(mrope_section)
        self._input = partial(new_input, model.graph)
        self._dtype = ir.DataType.INT8 if packing.bits == 8 else ir.DataType.UINT8
        self._tables = [
            self._input(f"{ROPE_TABLE}.{component}", ir.DataType.FLOAT, ["P", 2 * pairs])
            for component, pairs in enumerate(self._sections)
        ]

    def updated_inputs(self, layer: int, inputs: AttentionInputs) -> dict[str, ir.Value]:
        """Inputs for the codes of a layer's keys and values, by the outputs that they become."""
        width = self._packing.code_width(inputs.head_dim)
        shape: list[int | str] = ["B", inputs.kv_heads, "Q", width]
        return {
            f"present_{kind}_codes.{layer}": self._input(f"past_{kind}_codes.{layer}", self._dtype, shape)
            for kind in "kv"
        }

    def write_branch(
        self, branch: Branch, layer: int, inputs: AttentionInputs, codes: Sequence[ir.Value]
    ) -> list[ir.Value]:
        constants = self._packing.layers[layer]
        name = f"layers.{layer}/kv"
        positions = self._input(f"{ROW_POSITIONS}.{layer}", ir.DataType.INT32, ["B", "Q", _COMPONENTS])
        arrays: tuple[NDArray[np.floating], ...] = (
            constants.key_bias,
            constants.value_bias,
            constants.key_scales,
            constants.value_scales,
        )
        key_bias, value_bias, key_scale, value_scale = (
            branch.constant(f"{name}.{kind}", array.reshape(-1).astype(np.float32))
            for kind, array in zip(
                ("key_bias", "value_bias", "key_scale", "value_scale"), arrays, strict=True
            )
        )
        per_head = constants.value_bias.astype(np.float32).repeat(inputs.heads // inputs.kv_heads, 0)
        out, k_codes, v_codes = branch.node(
            "GroupQueryAttention",
            [
                inputs.q,
                self._without_bias(branch, inputs, key_bias),
                branch.op("Sub", inputs.v, value_bias),
                *codes,
                inputs.last_rows,
                inputs.longest,
                *[None] * 3,
                self._bias_logits(branch, layer, constants, positions, inputs),
                None,
                key_scale,
                value_scale,
            ],
            3,
            MICROSOFT,
            num_heads=inputs.heads,
            kv_num_heads=inputs.kv_heads,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
            kv_cache_bit_width=self._packing.bits,
        )
        # The weights of a softmax sum to 1: a constant of all values is added once.
        restored = branch.op("Add", out, branch.constant(f"{name}.value_bias_of_heads", per_head.reshape(-1)))
        return [
            restored,
            *(branch.op("Identity", past) for past in (inputs.past_k, inputs.past_v)),
            k_codes,
            v_codes,
        ]

    @staticmethod
    def _without_bias(branch: Branch, inputs: AttentionInputs, bias: ir.Value) -> ir.Value:
        """The new keys, rotated after their bias was taken out."""
        projected, cos, sin = inputs.rotary.inputs[:3]
        free = branch.op("Sub", projected, bias)
        return branch.op("RotaryEmbedding", free, cos, sin, num_heads=inputs.kv_heads, interleaved=0)

    def _bias_logits(
        self,
        branch: Branch,
        layer: int,
        constants: RowQuantization,
        positions: ir.Value,
        inputs: AttentionInputs,
    ) -> ir.Value:
        """q · R(position of a row) bias / √D: ``[B, Hq, 1, rows]``."""
        kv_heads, heads = inputs.kv_heads, inputs.heads
        bias: NDArray[np.float32] = constants.key_bias.reshape(kv_heads, 1, 2, -1).astype(np.float32)
        first, second = (
            branch.constant(f"layers.{layer}/kv.key_bias_{half}", bias[:, :, half]) for half in (0, 1)
        )
        split_heads = branch.ints(-1, kv_heads, heads // kv_heads, bias.shape[-1] * 2)
        by_head = branch.op("Reshape", inputs.q, split_heads)
        q_first, q_second = branch.node("Split", [by_head], 2, axis=-1, num_outputs=2)
        with_cos = branch.op("Add", branch.op("Mul", q_first, first), branch.op("Mul", q_second, second))
        with_sin = branch.op("Sub", branch.op("Mul", q_second, first), branch.op("Mul", q_first, second))
        by_component = [
            value
            for pair in zip(*map(self._split(branch), (with_cos, with_sin)), strict=True)
            for value in pair
        ]
        both = branch.op("Concat", *by_component, axis=-1)
        by_query = branch.op("Reshape", both, branch.ints(-1, heads, bias.shape[-1] * 2))
        # What is turned is the small one.
        columns = branch.op("Transpose", by_query, perm=[0, 2, 1])
        rows = branch.op("Cast", inputs.longest, to=ir.DataType.INT64)
        used = branch.op("Slice", positions, branch.ints(0), rows, branch.ints(1))
        turns = []
        for component, table in enumerate(self._tables):
            index = branch.constant(f"scalar_{component}", np.array(component, np.int64))
            turns.append(branch.op("Gather", table, branch.op("Gather", used, index, axis=2), axis=0))
        angles = turns[0] if len(turns) == 1 else branch.op("Concat", *turns, axis=-1)
        by_row = branch.op("MatMul", angles, columns)
        return branch.op("Unsqueeze", branch.op("Transpose", by_row, perm=[0, 2, 1]), branch.ints(2))

    def _split(self, branch: Branch) -> Callable[[ir.Value], Sequence[ir.Value]]:
        """Divides the last axis, one entry per rotary pair, by the component that a pair reads."""
        if len(self._sections) == 1:
            return lambda value: [value]
        sizes = branch.ints(*self._sections)
        return lambda value: branch.node("Split", [value, sizes], len(self._sections), axis=-1)
