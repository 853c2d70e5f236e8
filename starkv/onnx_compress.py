# SPDX-License-Identifier: Apache-2.0
"""KV compression as ONNX functions of the domain ``ai.starkv``, in standard operators of opset 23.

    WindowScores   attention of the last queries, pooled, for one layer
    ScoreWindow    the same for all layers: a Scan, so that only one layer's attention is alive at a time, in
    the
                   processor's cache. What SnapKV's descendants start from
    StarKVStages   what STaR-KV makes of it, for all layers together
    ScoreStarKV    ScoreWindow + StarKVStages
    LayerRows      entropy moves rows between layers
    Compact        selection and compaction, in place or out of place
    Compress       ScoreStarKV + LayerRows + Compact: a prompt's whole compression in one call

Their meaning is that of ``starkv/methods``, where each stage is documented; the tests compare the two on
every recording. Symbols: L layers, B sequences, G KV heads, H query heads, C rows of capacity, W window, D
head dim, N index sets per layer, K most kept rows, S slots, E rows of capacity of the destination, V length
of a pattern.
"""

import onnx
import onnx.parser

from starkv import onnx_compact, onnx_information, onnx_star_kv, onnx_window
from starkv.methods.star_kv_config import Pooling
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, OPSET

IR_VERSION = 10

SCORE_WINDOW, COMPACT, COMPRESS = "ScoreWindow", "Compact", "Compress"

# k, v [L,B,G,C,D], q_window [L,B,H,W,D], hidden_norm [L,B,C], kv_len [L,B] i32, row_meta [L,B,C,4] i32,
# frame [5] i32 (rows.Frame), parameters [P] f32 (star_kv_plan.StarKVPlan), limits [3] i64 (LayerLimits),
# mi_ema [L,B,G], pattern_ema [L,B,G,V], temperature [L,B],
# dst_k, dst_v [L,S,G,E,D], dst_meta [L,S,E,4] i32, slot [B] i32: the destination of each sequence
# -> new_k, new_v, new_meta (the destination with the kept rows in front; may share its memory, which may be
# that    of the source), new_len [L,B] i32, rows [L,B,1,K] i64 (ascending, -1 behind the last),    scores
# [L,B,C], stages [L,B,4,C] (attention, boosted, weighted, discounted), and the new state.
_COMPRESS_BODY = """
<domain: "ai.starkv", opset_import: ["" : 23, "ai.starkv" : 1]>
Compress (k, v, q_window, hidden_norm, kv_len, row_meta, frame, parameters, limits,
          mi_ema, pattern_ema, temperature, dst_k, dst_v, dst_meta, slot)
    => (new_k, new_v, new_meta, new_len, rows, scores, stages, new_mi_ema, new_pattern_ema, new_temperature)
{
    scores, stages, needed, new_mi_ema, new_pattern_ema, new_temperature = ai.starkv.ScoreStarKV
        (k, q_window, hidden_norm, kv_len, row_meta, frame, parameters, mi_ema, pattern_ema, temperature)
    window = Shape <start = 3, end = 4> (q_window)
    axis_2 = Constant <value_ints = [2]> ()
    sets = Unsqueeze (scores, axis_2)
    priorities = ai.starkv.Priorities (sets, kv_len, row_meta, window)
    competing = ai.starkv.LayerRows (needed, limits)
    keep = Add (competing, window)
    new_k, new_v, new_meta, new_len, rows = ai.starkv.Compact
        (k, v, row_meta, priorities, keep, dst_k, dst_v, dst_meta, slot)
}
"""


def compress_functions(pooling: Pooling = "avgpool", kernel: int = 5) -> list[onnx.FunctionProto]:
    """All functions of this file.

    Args:
        pooling: how window scores are pooled; the operator is part of the definition, not an input.
        kernel: its width, odd.
    """
    bodies = (
        *onnx_window.bodies(pooling, kernel),
        onnx_information.INFORMATION_BODY,
        *onnx_star_kv.bodies(),
        onnx_compact.PRIORITIES_BODY,
        onnx_compact.LAYER_ROWS_BODY,
        onnx_compact.COMPACT_BODY,
        _COMPRESS_BODY,
    )
    return [onnx.parser.parse_function(body) for body in bodies]


F32, I32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64

_SHAPES: dict[str, tuple[int, str]] = {
    "k": (F32, "L B G C D"),
    "v": (F32, "L B G C D"),
    "q_window": (F32, "L B H W D"),
    "hidden_norm": (F32, "L B C"),
    "kv_len": (I32, "L B"),
    "row_meta": (I32, "L B C 4"),
    "frame": (I32, "5"),
    "parameters": (F32, "P"),
    "limits": (I64, "3"),
    "mi_ema": (F32, "L B G"),
    "pattern_ema": (F32, "L B G V"),
    "temperature": (F32, "L B"),
    "dst_k": (F32, "L S G E D"),
    "dst_v": (F32, "L S G E D"),
    "dst_meta": (I32, "L S E 4"),
    "slot": (I32, "B"),
    "priorities": (F32, "L B N C"),
    "keep": (I64, "L B"),
    "new_k": (F32, "L S G E D"),
    "new_v": (F32, "L S G E D"),
    "new_meta": (I32, "L S E 4"),
    "new_len": (I32, "L B"),
    "rows": (I64, "L B N K"),
    "scores": (F32, "L B C"),
    "group_scores": (F32, "L B G C"),
    "stages": (F32, "L B 4 C"),
    "new_mi_ema": (F32, "L B G"),
    "new_pattern_ema": (F32, "L B G V"),
    "new_temperature": (F32, "L B"),
}
"""Element type and dimensions of every tensor of the three graphs."""


def compress_model(
    operator: str, sizes: dict[str, int] | None = None, pooling: Pooling = "avgpool", kernel: int = 5
) -> onnx.ModelProto:
    """A model that is one call of an operator.

    Args:
        operator: ``Compress``, ``Compact`` or ``ScoreWindow``.
        sizes: dimensions that are fixed, by their symbols, such as ``{"D": 128}``.
        pooling: see :func:`compress_functions`.
        kernel: likewise.
    """
    functions = {function.name: function for function in compress_functions(pooling, kernel)}
    called = functions[operator]

    def declare(name: str) -> onnx.ValueInfoProto:
        element, dims = _SHAPES[name]
        shape = [int(dim) if dim.isdigit() else (sizes or {}).get(dim, dim) for dim in dims.split()]
        return onnx.helper.make_tensor_value_info(name, element, shape)

    node = onnx.helper.make_node(operator, called.input, called.output, domain=DOMAIN, name=operator)
    graph = onnx.helper.make_graph(
        [node], operator, [declare(name) for name in called.input], [declare(name) for name in called.output]
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return onnx.helper.make_model(
        graph,
        opset_imports=opsets,
        functions=_needed(operator, functions),
        ir_version=IR_VERSION,
        producer_name="starkv",
    )


def _needed(operator: str, functions: dict[str, onnx.FunctionProto]) -> list[onnx.FunctionProto]:
    """The function of an operator and all that it calls, itself last."""
    found: dict[str, onnx.FunctionProto] = {}

    def visit(nodes: "onnx.protobuf.RepeatedCompositeFieldContainer") -> None:
        for node in nodes:
            if node.domain == DOMAIN and node.op_type not in found:
                visit(functions[node.op_type].node)
                found[node.op_type] = functions[node.op_type]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g.node)

    visit(functions[operator].node)
    return [*found.values(), functions[operator]]
