# SPDX-License-Identifier: Apache-2.0
"""The key bias's part of the logits in ONNX Runtime: q · R(t, h, w) b / √D for every row of a packed cache.

It is a sum of three functions of one position component each. What query and bias make of the rotary pairs
is multiplied with the cosines and sines of every position, once per step and component; then a row looks up
three numbers per head. A screenshot's rows share positions, so there are fewer of these than of rows, unless
most rows were evicted. Cosines and sines gathered row by row would be as many bytes as one float key head.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from starkv.export.lower.branch import Branch
from starkv.export.lower.graph_edit import new_input
from starkv.export.lower.ort_attention import LONGEST, MICROSOFT
from starkv.kv_packing.positions import COMPONENTS

ROPE_TABLE = "rope_table"
"""Inputs, one per component of a position: [P, 2 n] f32; cosines, then sines of the n rotary pairs that read
that component, divided by √D."""
ROW_POSITIONS = "row_positions"
"""Inputs, one per layer: [B, C, 3] i32; t, h and w of each row of the packed cache, below P; −1 where there
is no row."""


class KeyBiasLogits:
    """Writes that part of the logits of each layer."""

    def __init__(self, model: ir.Model, layers: int, mrope_section: Sequence[int]) -> None:
        """Add the inputs, and ahead of all layers what they share.

        Args:
            model: the decoder, with the input ``longest``.
            layers: L.
            mrope_section: rotary pairs that turn with t, h and w; one number for one-dimensional RoPE.
        """
        graph, self._sections = model.graph, tuple(mrope_section)
        add_input = partial(new_input, graph)
        self._tables = [
            add_input(f"{ROPE_TABLE}.{component}", ir.DataType.FLOAT, ["P", 2 * pairs])
            for component, pairs in enumerate(self._sections)
        ]
        self._positions = [
            add_input(f"{ROW_POSITIONS}.{layer}", ir.DataType.INT32, ["B", "Q", COMPONENTS])
            for layer in range(layers)
        ]
        (longest,) = (value for value in graph.inputs if value.name == LONGEST)
        shared = Branch(graph, "key_bias")
        rows = shared.op("Cast", longest, to=ir.DataType.INT64)
        self._used = shared.op("Concat", rows, shared.ints(len(self._sections)), axis=0)
        batch = shared.op("Squeeze", shared.op("Shape", self._positions[0], start=0, end=1))
        self._batch = shared.op("Cast", batch, to=ir.DataType.INT32)
        first, step = (
            shared.constant(f"key_bias.{name}", np.array(number, np.int32))
            for name, number in (("first", 0), ("step", 1))
        )
        sequences = shared.op("Range", first, self._batch, step)
        self._sequences = shared.op("Reshape", sequences, shared.ints(-1, 1, 1))
        shared.put_first()

    def write(
        self, branch: Branch, layer: int, q: ir.Value, bias: NDArray[np.floating], heads: int
    ) -> ir.Value:
        """Write one layer's.

        Args:
            branch: where to.
            layer: its index.
            q: ``[B, 1, Hq * D]``, rotated.
            bias: ``[Hkv, D]``, before rotation.
            heads: Hq.

        Returns:
            ``[B, Hq, 1, rows]``; rows as many as ``longest`` says.
        """
        columns = self._columns(branch, layer, q, bias, heads)
        lines = self._lines(branch, layer)
        found = None
        for table, factors, line in zip(self._tables, columns, lines, strict=True):
            by_position = branch.op("MatMul", table, factors)
            by_line = branch.op("Reshape", by_position, branch.ints(-1, heads))
            looked_up = branch.op("Gather", by_line, line, axis=0)
            found = looked_up if found is None else branch.op("Add", found, looked_up)
        by_row = branch.op("Reshape", found, branch.ints(0, 1, -1, heads))
        return branch.op("Transpose", by_row, perm=[0, 3, 1, 2])

    def _columns(
        self, branch: Branch, layer: int, q: ir.Value, bias: NDArray[np.floating], heads: int
    ) -> Sequence[ir.Value]:
        """What multiplies a table's cosines and sines, one value ``[2 n, B * Hq]`` per component."""
        kv_heads, dim = bias.shape
        halves = np.split(bias.astype(np.float32), 2, axis=-1)
        cosines, sines = (
            branch.constant(f"layers.{layer}/kv.key_bias_{name}", half)
            for name, half in (("cosines", halves[0]), ("sines", -halves[1]))
        )
        by_kv_head = branch.op("Reshape", q, branch.ints(-1, kv_heads, heads // kv_heads * dim))
        # cos (q₁ b₁ + q₂ b₂) + sin (q₂ b₁ − q₁ b₂): the factors are q turned "by b", KV heads for positions.
        turned = branch.op("RotaryEmbedding", by_kv_head, branch.ints(0), cosines, sines, domain=MICROSOFT)
        # What is transposed is the small one, and all sequences share the reading of a table.
        columns = branch.op("Transpose", branch.op("Reshape", turned, branch.ints(-1, dim)), perm=[1, 0])
        if len(self._sections) == 1:
            return [columns]
        pairs = np.split(np.arange(dim // 2), np.cumsum(self._sections)[:-1])
        order = np.concatenate([np.concatenate([own, own + dim // 2]) for own in pairs])
        by_component = branch.op(
            "Gather", columns, branch.constant("key_bias.order", order.astype(np.int64)), axis=0
        )
        sizes = branch.ints(*(2 * pairs for pairs in self._sections))
        return branch.node("Split", [by_component, sizes], len(self._sections), axis=0)

    def _lines(self, branch: Branch, layer: int) -> Sequence[ir.Value]:
        """Which line of a table's product ``[P * B, Hq]`` each row reads, ``[B, rows, 1]`` per component."""
        starts, axes = branch.ints(0, 0), branch.ints(1, 2)
        used = branch.op("Slice", self._positions[layer], starts, self._used, axes)
        # −1 stays negative, and counts from the end as in any Gather: a line that nobody asks about.
        lines = branch.op("Add", branch.op("Mul", used, self._batch), self._sequences)
        count = len(self._sections)
        return [lines] if count == 1 else branch.node("Split", [lines], count, axis=2, num_outputs=count)
