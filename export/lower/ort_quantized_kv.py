# SPDX-License-Identifier: Apache-2.0
"""Attention to an int8 or int4 cache in ONNX Runtime.

Codes of keys are those of rotated keys without the bias's share, which in Qwen2 is many times larger than
the rest. Its part of the logits, q · R(position) bias, enters as an attention bias (``ort_key_bias.py``).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from starkv.export.lower.attention_weights import AttentionInputs
from starkv.export.lower.branch import Branch
from starkv.export.lower.graph_edit import new_input
from starkv.export.lower.ort_attention import MICROSOFT
from starkv.export.lower.ort_key_bias import KeyBiasLogits
from starkv.kv_packing.quantized import QuantizedPacking


class QuantizedKvLowering:
    """Writes the quantized branch of each layer."""

    def __init__(self, model: ir.Model, packing: QuantizedPacking, mrope_section: Sequence[int]) -> None:
        """Add the inputs that all layers share.

        Args:
            model: the decoder.
            packing: scales and biases.
            mrope_section: rotary pairs that turn with t, h and w; one number for one-dimensional RoPE.
        """
        self._packing, self._input = packing, partial(new_input, model.graph)
        self._dtype = ir.DataType.INT8 if packing.bits == 8 else ir.DataType.UINT8
        self._key_bias = KeyBiasLogits(model, len(packing.layers), mrope_section)

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
                self._key_bias.write(branch, layer, inputs.q, constants.key_bias, inputs.heads),
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
