# SPDX-License-Identifier: Apache-2.0
"""Attention to a low-rank cache in ONNX Runtime, see ``starkv/onnx_low_rank.py``."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from starkv.export.lower.attention_weights import AttentionInputs
from starkv.export.lower.branch import Branch
from starkv.export.lower.graph_edit import new_input
from starkv.export.lower.low_rank_attention import low_rank_node, stacked_key_factors
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.lowrank.latent_format import key_code_bytes, value_code_bytes
from starkv.onnx_low_rank_shape import LaneStorage, LowRankShape

PACKED_LENGTHS = "packed_len"
"""Inputs, one per layer: [B] i32; packed rows of each sequence."""
_STORAGE: dict[int, LaneStorage] = {4: "int4", 8: "int8", 32: "float"}


class LowRankKvLowering:
    """Writes the low-rank branch of each layer; the tail takes the place of the float cache."""

    def __init__(self, model: ir.Model, packing: LowRankPacking, mrope_section: Sequence[int]) -> None:
        """Add the inputs that all layers share.

        Args:
            model: the decoder.
            packing: factors and biases.
            mrope_section: rotary pairs that turn with t, h and w; one number for one-dimensional RoPE.
        """
        self._model, self._packing, self._sections = model, packing, tuple(mrope_section)
        self._input = partial(new_input, model.graph)
        half = sum(self._sections)
        self._tables = {
            name: self._input(name, ir.DataType.FLOAT, ["P", half]) for name in ("cos_table", "sin_table")
        }

    def updated_inputs(self, layer: int, inputs: AttentionInputs) -> dict[str, ir.Value]:
        """None: packed rows are only read."""
        return {}

    def write_branch(
        self, branch: Branch, layer: int, inputs: AttentionInputs, updated: Sequence[ir.Value]
    ) -> list[ir.Value]:
        factors, name = self._packing.layers[layer], f"layers.{layer}/kv"
        shape = LowRankShape(
            inputs.heads,
            inputs.kv_heads,
            inputs.head_dim,
            tuple(factor.rank for factor in factors.keys),
            factors.values.rank,
            self._sections,
            _STORAGE[self._packing.latent.lane_bits],
        )
        constants: dict[str, NDArray[np.floating]] = {
            "up_k": stacked_key_factors(shape, [factor.up for factor in factors.keys]),
            "up_v": factors.values.up,
            "k_bias": factors.key_bias.reshape(-1),
            "v_bias": factors.value_bias.reshape(-1),
        }
        values = {
            "q": inputs.q,
            "k": inputs.k,
            "v": inputs.v,
            "tail_k": inputs.past_k,
            "tail_v": inputs.past_v,
            # A decode step has one new row: it comes behind the tail's.
            "tail_len": inputs.last_rows,
            PACKED_LENGTHS: self._input(f"{PACKED_LENGTHS}.{layer}", ir.DataType.INT32, ["B"]),
            "positions": self._input(f"row_positions.{layer}", ir.DataType.INT32, ["B", "Q", 3]),
            **self._tables,
            **self._rows(layer, shape),
            **{
                kind: branch.constant(f"{name}.{kind}", array.astype(np.float32))
                for kind, array in constants.items()
            },
        }
        return list(branch.append(low_rank_node(self._model, shape, values, f"{name}/attention")))

    def _rows(self, layer: int, shape: LowRankShape) -> dict[str, ir.Value]:
        """Inputs for a layer's packed rows."""
        latent, lanes = self._packing.latent, self._packing.lanes(layer)
        rows: list[int | str] = ["B", "Q"]
        if not latent.quantized:
            widths = {"k_latent": shape.key_lanes.lanes, "v_latent": shape.value_rank}
            return {
                name: self._input(f"{name}.{layer}", ir.DataType.FLOAT, [*rows, width])
                for name, width in widths.items()
            }
        codes = ir.DataType.UINT8 if latent.lane_bits == 4 else ir.DataType.INT8
        sizes: dict[str, tuple[ir.DataType, list[int | str]]] = {
            "k_codes": (codes, [*rows, key_code_bytes(lanes, latent)]),
            "k_scales": (ir.DataType.BFLOAT16, [*rows, len(shape.key_ranks), 2]),
            "v_codes": (codes, [*rows, value_code_bytes(shape.value_rank, latent)]),
            "v_scales": (ir.DataType.BFLOAT16, [*rows, 2]),
        }
        return {name: self._input(f"{name}.{layer}", *size) for name, size in sizes.items()}
