# SPDX-License-Identifier: Apache-2.0
"""``PackableKVAttention``: attention over a cache of floats or one of codes, as an ONNX function.

A graph may have both caches, so that one set of weights prefills exactly over floats and then decodes from
codes. The capacity of the codes says which cache a call is about, because shapes are what TensorRT's host
code and profiles know: one row is none.
"""

import onnx
import onnx.parser

from starkv.onnx_ops import KV_ATTENTION, standard_functions
from starkv.onnx_quantized_kv import QUANTIZED_KV_ATTENTION, quantized_kv_function

PACKABLE_KV_ATTENTION = "PackableKVAttention"

# B sequences, S new tokens, Hq query heads, Hkv KV heads, D head dim, C rows of capacity of the floats, K of
# the codes, P positions in the tables: q, k, v, past_k, past_v and past_extent as KVAttention has them;
# kv_len [B] i32, which counts rows of the cache that the call is about; past_k_codes and past_v_codes
# [B,Hkv,K,D] i8 for 8 bits, [B,Hkv,K,D/2] u8 for 4; positions [B,K,3] i32; scales, biases and tables as
# QuantizedKVAttention has them -> out [B,S,Hq*D], present_k, present_v, present_k_codes, present_v_codes, of
# which two are a past unchanged. K > 1 with S > 1 is an error: codes take one token at a time.
_BODY = """
<domain: "ai.starkv", opset_import: ["" : 23, "ai.starkv" : 1]>
PackableKVAttention <num_heads, kv_num_heads, bits, mrope_section>
    (q, k, v, past_k, past_v, kv_len, past_extent, past_k_codes, past_v_codes, positions,
     k_scale, v_scale, k_bias, v_bias, cos_table, sin_table)
    => (out, present_k, present_v, present_k_codes, present_v_codes)
{
    one_1d = Constant <value_ints = [1]> ()
    code_rows_1d = Shape <start = 2, end = 3> (past_k_codes)
    has_codes_1d = Greater (code_rows_1d, one_1d)
    has_codes = Squeeze (has_codes_1d)
    out, present_k, present_v, present_k_codes, present_v_codes = If (has_codes) <
        then_branch = over_codes () => (codes_out, codes_k, codes_v, codes_k_codes, codes_v_codes)
        {
            codes_out, codes_k_codes, codes_v_codes = ai.starkv.QuantizedKVAttention <
                num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, bits: int = @bits,
                mrope_section: ints = @mrope_section>
                (q, k, v, past_k_codes, past_v_codes, kv_len, positions,
                 k_scale, v_scale, k_bias, v_bias, cos_table, sin_table)
            codes_k = Identity (past_k)
            codes_v = Identity (past_v)
        },
        else_branch = over_floats () => (floats_out, floats_k, floats_v, floats_k_codes, floats_v_codes)
        {
            floats_out, floats_k, floats_v = ai.starkv.KVAttention <
                num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads>
                (q, k, v, past_k, past_v, kv_len, past_extent)
            floats_k_codes = Identity (past_k_codes)
            floats_v_codes = Identity (past_v_codes)
        }
    >
}
"""


def packable_kv_functions() -> dict[str, onnx.FunctionProto]:
    """The operator's definition, and those of the two operators that it calls, by name."""
    return {
        PACKABLE_KV_ATTENTION: onnx.parser.parse_function(_BODY),
        KV_ATTENTION: standard_functions()[KV_ATTENTION],
        QUANTIZED_KV_ATTENTION: quantized_kv_function(),
    }
