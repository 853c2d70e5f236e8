# SPDX-License-Identifier: Apache-2.0
"""Int8 and int4 caches of full rank: static scales per channel, the projections' biases taken out."""

from dataclasses import dataclass

import numpy as np

from starkv.kv_packing.positions import POSITION_BYTES
from starkv.lowrank.quantized_rows import Bits, RowQuantization
from starkv.manifest import TextShape

SCALES = ("k_scale", "v_scale", "k_bias", "v_bias")
"""Of each layer, by the names of the operator ``QuantizedKVAttention``."""
TABLES = ("cos_table", "sin_table")
"""Cosine and sine of every position and rotary pair, by its names."""


def code_bytes_per_row(text: TextShape, bits: Bits) -> int:
    """Bytes of one token's codes over all layers, with its position in each."""
    return text.layers * (2 * text.kv_heads * text.head_dim * bits // 8 + POSITION_BYTES)


@dataclass(frozen=True)
class QuantizedPacking:
    """How a model's rows are quantized."""

    bits: Bits
    layers: tuple[RowQuantization, ...]

    @property
    def code_dtype(self) -> np.dtype[np.generic]:
        """int8, or uint8 with two codes in a byte."""
        return np.dtype(np.int8 if self.bits == 8 else np.uint8)

    def bytes_per_row(self, layer: int) -> int:
        """Bytes of one packed token in a layer, with its position."""
        return self.layers[layer].bytes_per_row + POSITION_BYTES

    def code_width(self, head_dim: int) -> int:
        """Elements of a key's or value's codes per head."""
        return head_dim * self.bits // 8
