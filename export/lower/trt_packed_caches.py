# SPDX-License-Identifier: Apache-2.0
"""A decoder for TensorRT that can also attend to a cache of codes.

TensorRT runs one graph in two profiles. So each layer's attention becomes a plugin that takes both caches
and reads the one that has rows: a prefill that of floats, a decode step either. What packing has measured
(scales) and what grows with a session (positions, tables over them) are inputs: an engine that is built can
measure its own scales.
"""

from collections.abc import Sequence

import onnx_ir as ir

from starkv.export.lower.graph_edit import new_input, replace_node
from starkv.kv_packing.quantized import SCALES, TABLES
from starkv.lowrank.quantized_rows import Bits
from starkv.onnx_ops import DOMAIN, KV_ATTENTION
from starkv.onnx_packable_kv import PACKABLE_KV_ATTENTION

_BYTES_OF_INT32 = 4


def add_packed_caches(graph: ir.Graph, bits: Bits, sections: Sequence[int]) -> None:
    """Give a lowered decoder caches of codes beside those of floats.

    New inputs of layer i are ``past_k_codes.i`` and ``past_v_codes.i`` ``[B,G,K,R/4]`` int32 (R bytes of
    codes in a row; TensorRT takes int8 for quantized numbers of its own), ``row_positions.i`` ``[B,K,3]``
    int32 and ``SCALES`` ``[G*D]`` f32; of all layers ``TABLES`` ``[P,D/2]`` f32. New outputs
    ``present_k_codes.i`` and ``present_v_codes.i`` share the codes' memory. ``K`` is 1 where there are none.

    Args:
        graph: changed; attention is a plugin already.
        bits: of a code.
        sections: rotary pairs that turn with t, h and w.
    """
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == KV_ATTENTION]
    half = sum(sections)
    tables = [new_input(graph, name, ir.DataType.FLOAT, ["P", half]) for name in TABLES]
    for layer, node in enumerate(nodes):
        _replace(graph, node, layer, bits, sections, tables)


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    layer: int,
    bits: Bits,
    sections: Sequence[int],
    tables: Sequence[ir.Value],
) -> None:
    heads, dim = node.attributes["kv_num_heads"].as_int(), 2 * sum(sections)
    codes = ["B", heads, "K", dim * bits // 8 // _BYTES_OF_INT32]
    int32, floats = ir.DataType.INT32, ir.DataType.FLOAT
    past = [new_input(graph, f"past_{kind}_codes.{layer}", int32, codes) for kind in "kv"]
    positions = new_input(graph, f"row_positions.{layer}", int32, ["B", "K", 3])
    scales = [new_input(graph, f"{name}.{layer}", floats, [heads * dim]) for name in SCALES]
    attributes = {
        **dict(node.attributes.items()),
        "bits": ir.AttrInt64("bits", bits),
        "mrope_section": ir.AttrInt64s("mrope_section", list(sections)),
    }
    either = ir.Node(
        DOMAIN,
        PACKABLE_KV_ATTENTION,
        [*node.inputs, *past, positions, *scales, *tables],
        list(attributes.values()),
        num_outputs=5,
        name=node.name,
    )
    replace_node(graph, node, either)
    for kind, before, after in zip("kv", past, either.outputs[3:], strict=True):
        after.name, after.type, after.shape = f"present_{kind}_codes.{layer}", before.type, before.shape
        graph.outputs.append(after)
