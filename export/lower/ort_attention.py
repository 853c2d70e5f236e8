# SPDX-License-Identifier: Apache-2.0
"""Attention by ONNX Runtime's own operators.

The standard bodies write out every attention score: 7.3 GB for a 1080p screenshot, and work in proportion to
the cache's capacity. ONNX Runtime's operators tile them, and their work follows the valid rows.
"""

import numpy as np
import onnx_ir as ir

from starkv.export.lower.graph_edit import remove_unused, replace_node
from starkv.onnx_ops import DOMAIN, FULL_ATTENTION, KV_ATTENTION

MICROSOFT = "com.microsoft"

LAST_ROWS = "last_rows"
"""Input of a lowered decoder in place of ``kv_len``: [L*B] i32, cache row of each sequence's newest row after
the step, layer by layer: ``kv_len + S − 1``. The host adds, or a GPU would for one number in every layer."""
LONGEST = "longest"
"""Input of a lowered decoder: [1] i32 in host memory, rows of the longest sequence after the step. With one
new row per sequence a larger number does no harm."""


def lower_kv_attention(model: ir.Model) -> None:
    """Replace KVAttention by GroupQueryAttention, and the inputs ``kv_len`` and ``past_extent`` by
    ``last_rows`` and ``longest``.

    The operator writes the new rows in place where past and present share memory. Its batches have one new
    row per sequence or one sequence only, as decode and prefill do.

    Raises:
        ValueError: a layer's length is no row of ``kv_len``.
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == KV_ATTENTION]
    if not nodes:
        return
    last_rows = _input(LAST_ROWS, ["L*B"])
    longest = _input(LONGEST, [1])
    split = ir.node(
        "Split",
        [last_rows],
        {"axis": 0, "num_outputs": len(nodes)},
        num_outputs=len(nodes),
        name="last_rows/Split",
    )
    graph.insert_before(graph[0], split)
    for index, value in enumerate(split.outputs):
        value.name = f"{LAST_ROWS}.{index}"
    for node in nodes:
        q, k, v, past_k, past_v, kv_len, _ = node.inputs
        attention = ir.node(
            "GroupQueryAttention",
            [q, k, v, past_k, past_v, split.outputs[_layer_of(kv_len)], longest],
            {name: node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads")}
            | {"do_rotary": 0},
            domain=MICROSOFT,
            num_outputs=3,
            name=str(node.name).replace(KV_ATTENTION, "GroupQueryAttention"),
        )
        replace_node(graph, node, attention)
    remove_unused(graph)
    kept = [value for value in graph.inputs if value.name not in ("kv_len", "past_extent")]
    graph.inputs[:] = [*kept, last_rows, longest]
    del model.functions[DOMAIN, KV_ATTENTION, ""]


def _input(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(shape))


def _layer_of(kv_len: ir.Value | None) -> int:
    """Index of the layer whose row of the input ``kv_len`` this is.

    Raises:
        ValueError: it is none.
    """
    gather = None if kv_len is None else kv_len.producer()
    if gather is not None and gather.op_type == "Gather" and gather.inputs[0] is not None:
        index = ir.convenience.get_const_tensor(gather.inputs[1]) if gather.inputs[1] is not None else None
        if index is not None and index.size == 1 and gather.inputs[0].name == "kv_len":
            return int(index.numpy().item())
    raise ValueError(f"{kv_len} is no row of kv_len")


def lower_full_attention(model: ir.Model) -> None:
    """Replace FullAttention by MultiHeadAttention."""
    graph = model.graph
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == FULL_ATTENTION:
            attention = ir.node(
                "MultiHeadAttention",
                node.inputs,
                {"num_heads": node.attributes["num_heads"].as_int()},
                domain=MICROSOFT,
                name=str(node.name).replace(FULL_ATTENTION, "MultiHeadAttention"),
            )
            replace_node(graph, node, attention)
    model.functions.pop((DOMAIN, FULL_ATTENTION, ""), None)


def lower_masked_attention(graph: ir.Graph) -> None:
    """Replace attention inside windows by MultiHeadAttention with a bias, for GPUs.

    ONNX Runtime's CUDA kernels take a bias wherever they take a mask, and in more places.

    Raises:
        ValueError: attention without a mask.
    """
    biases: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Attention" or node.domain:
            continue
        q, k, v, mask = node.inputs
        if mask is None:
            raise ValueError(f"{node.name} has no mask")
        if mask not in biases:
            biases[mask] = _bias_of(graph, mask)
        attention = ir.node(
            "MultiHeadAttention",
            [q, k, v, None, None, biases[mask]],
            {"num_heads": node.attributes["q_num_heads"].as_int()},
            domain=MICROSOFT,
            name=str(node.name).replace("Attention", "MultiHeadAttention"),
        )
        replace_node(graph, node, attention)


def _bias_of(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """0 where a mask is true, and elsewhere a number that no score outweighs: float32, the mask's shape."""
    constants = []
    for name, number in (("seen", 0.0), ("unseen", -1e4)):
        tensor = ir.tensor(np.array(number, np.float32), name=f"{mask.name}.{name}")
        kind = ir.TensorType(ir.DataType.FLOAT)
        constants.append(ir.Value(name=tensor.name, const_value=tensor, type=kind, shape=ir.Shape([])))
        graph.register_initializer(constants[-1])
    where = ir.node("Where", [mask, *constants], name=f"{mask.name}/Where")
    bias = where.outputs[0]
    bias.name, bias.dtype, bias.shape = f"{mask.name}.bias", ir.DataType.FLOAT, mask.shape
    producer = mask.producer()
    if producer is None:
        graph.insert_before(graph[0], where)
    else:
        graph.insert_after(producer, where)
    return bias
