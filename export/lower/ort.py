# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime dialect: the canonical graph with other bodies for the custom operators.

The standard bodies write out every attention score: 7.3 GB for a 1080p screenshot, and work in proportion to
the cache's capacity. ONNX Runtime's own attention operators tile them, and their work follows the valid rows.
Both bodies are checked against each other in the tests; the nodes and their names stay the same.
"""

from pathlib import Path

import onnx
import onnx.parser

# seqlens_k is each sequence's last valid row, total_sequence_length the longest sequence. The operator writes
# the new rows in place where past and present share memory. Its batches have one new row per sequence or one
# sequence only, as decode and prefill do.
_KV_ATTENTION_BODY = """
<domain: "ai.starkv", opset_import: ["" : 23, "com.microsoft" : 1]>
KVAttention <num_heads, kv_num_heads> (q, k, v, past_k, past_v, kv_len, past_extent)
    => (out, present_k, present_v)
{
    new = Shape <start = 1, end = 2> (q)
    new_i32 = Cast <to = 6> (new)
    total = Add (kv_len, new_i32)
    one = Constant <value = int32[1] {1}> ()
    last = Sub (total, one)
    longest = ReduceMax <keepdims = 0> (total)
    out, present_k, present_v = com.microsoft.GroupQueryAttention
        <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, do_rotary = 0>
        (q, k, v, past_k, past_v, last, longest)
}
"""

_FULL_ATTENTION_BODY = """
<domain: "ai.starkv", opset_import: ["" : 23, "com.microsoft" : 1]>
FullAttention <num_heads> (q, k, v) => (out)
{
    out = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads> (q, k, v)
}
"""


def ort_functions() -> dict[str, onnx.FunctionProto]:
    """Return the bodies of the custom operators for ONNX Runtime, by name."""
    functions = [onnx.parser.parse_function(body) for body in (_KV_ATTENTION_BODY, _FULL_ATTENTION_BODY)]
    return {function.name: function for function in functions}


def lower_to_ort(source: Path, target: Path) -> None:
    """Rewrite the canonical graph ``source`` as ``target``.

    Weights stay where they are: ``target`` names the same data file, which must come to lie beside it.
    """
    model = onnx.load(source, load_external_data=False)
    bodies = ort_functions()
    swapped = [bodies.get(function.name, function) for function in model.functions]
    del model.functions[:]
    model.functions.extend(swapped)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, target)
