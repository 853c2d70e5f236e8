# SPDX-License-Identifier: Apache-2.0
"""A quantized layer of ``low_rank_attention_cpu.py`` as an engine runs it: lowered by the same code."""

from functools import partial

import numpy as np
import onnx_ir as ir
from low_rank_cpu_cases import Arrays, Case, Heads, cells, normal, random_codes

from starkv.export.lower.graph_edit import new_input
from starkv.export.lower.ort_attention import LAST_ROWS, LONGEST, MICROSOFT
from starkv.export.lower.ort_packed_attention import PACKED, add_packed_attention
from starkv.export.lower.ort_quantized_kv import QuantizedKvLowering
from starkv.kv_packing.positions import POSITION_BYTES
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.quantized_rows import Bits, RowQuantization
from starkv.onnx_ops import OPSET
from starkv.runtime.engines.ort_packed import key_bias_tables

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32
CACHES = {f"present_{kind}{suffix}": f"past_{kind}{suffix}" for kind in "kv" for suffix in ("", "_codes.0")}


def packed_layer_case(heads: Heads, bits: Bits) -> Case:
    """One layer of a packed engine from the new key's rotation on. It works the key bias's part of the logits
    out, and takes the biases out of the new row."""

    def inputs(random: np.random.Generator, rows: int) -> Arrays:
        positions = cells(rows)
        angles = heads.angles(int(positions.max()) + 1)
        tables = key_bias_tables(angles, heads.sections)
        cosines, sines = heads.rotary.tables(positions[:, -1:])
        codes = (random_codes(random, bits, 1, heads.kv_heads, rows, heads.dim) for _ in range(2))
        # The cache that is not read.
        no_rows = {
            name: np.zeros((1, heads.kv_heads, 1, heads.dim), np.float32) for name in ("past_k", "past_v")
        }
        return {
            **heads.new_row(random),
            **dict(zip(("past_k_codes.0", "past_v_codes.0"), codes, strict=True)),
            **no_rows,
            **{f"rope_table.{component}": table for component, table in enumerate(tables)},
            "row_positions.0": positions,
            "rope_cos": cosines.astype(np.float32),
            "rope_sin": sines.astype(np.float32),
            LAST_ROWS: np.array([rows - 1], np.int32),
            LONGEST: np.array([rows], np.int32),
            PACKED: np.array([True]),
        }

    row_bytes = 2 * heads.kv_channels * bits / 8 + POSITION_BYTES
    return Case(f"int{bits}, as an engine runs it", _model(heads, bits), inputs, row_bytes, CACHES)


def _model(heads: Heads, bits: Bits) -> bytes:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, MICROSOFT: 1}, name="packed_layer")
    add_input = partial(new_input, graph)
    q = add_input("q", FLOAT, ["B", "S", heads.heads * heads.dim])
    k, v = (add_input(name, FLOAT, ["B", "S", heads.kv_channels]) for name in "kv")
    cos, sin = (add_input(name, FLOAT, ["B", "S", heads.dim // 2]) for name in ("rope_cos", "rope_sin"))
    past = [add_input(f"past_{kind}", FLOAT, ["B", heads.kv_heads, "C", heads.dim]) for kind in "kv"]
    lengths = [add_input(LAST_ROWS, INT32, ["B"]), add_input(LONGEST, INT32, [1])]
    counts = {"num_heads": heads.heads, "kv_num_heads": heads.kv_heads}
    rotary = ir.node(
        "RotaryEmbedding", [k, cos, sin], {"num_heads": heads.kv_heads, "interleaved": 0}, name="rotary"
    )
    attention = ir.node(
        "GroupQueryAttention",
        [q, rotary.outputs[0], v, *past, *lengths],
        counts | {"do_rotary": 0},
        domain=MICROSOFT,
        num_outputs=3,
        name="attention",
    )
    rotary.outputs[0].name = "k_rotated"
    for value, name in zip(attention.outputs, ("out", "present_k", "present_v"), strict=True):
        value.name, value.dtype = name, FLOAT
    graph.extend([rotary, attention])
    graph.outputs.extend(attention.outputs)
    model = ir.Model(graph, ir_version=10)
    packing = QuantizedPacking(bits, (quantization(heads, bits),))
    add_packed_attention(model, lambda model: QuantizedKvLowering(model, packing, heads.sections))
    return bytes(ir.to_proto(model).SerializeToString())


def quantization(heads: Heads, bits: Bits) -> RowQuantization:
    """Scales and biases of the layer."""
    random, size = np.random.default_rng(1), (heads.kv_heads, heads.dim)
    scales = np.full(size, 0.02, np.float32)
    biases = (normal(random, *size).astype(np.float64) for _ in range(2))
    return RowQuantization(bits, scales, scales, *biases)
