# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime dialect: the canonical graph with other bodies for the custom operators, and quantized
linear layers as one operator.

The standard bodies write out every attention score: 7.3 GB for a 1080p screenshot, and work in proportion to
the cache's capacity. ONNX Runtime's own attention operators tile them, and their work follows the valid rows.
Both bodies are checked against each other in the tests; the nodes and their names stay the same.
"""

from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir

from starkv.export.lower.ort_matmul import MICROSOFT, lower_quantized_linears, quantized_linears
from starkv.export.lower.tensor_file import TensorFile

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

    A graph with quantized weights gets a data file of its own, ``{target}.data``. The weights of any other
    stay where they are: ``target`` names the same data file, which must come to lie beside it.

    Raises:
        OSError: the disk is full.
    """
    model = ir.load(source)
    bodies = ort_functions()
    for key, function in list(model.functions.items()):
        if function.name in bodies:
            model.functions[key] = ir.from_proto(bodies[function.name])
    model.graph.opset_imports[MICROSOFT] = 1
    if quantized_linears(model.graph):
        _move_weights(model, target.with_suffix(".data"))
    ir.save(model, target)


def _move_weights(model: ir.Model, path: Path) -> None:
    data = TensorFile(path)
    lower_quantized_linears(model, data, ir.DataType.FLOAT)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) != path:
            value.const_value = data.copy(tensor)
