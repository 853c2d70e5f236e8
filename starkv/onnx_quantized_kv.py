# SPDX-License-Identifier: Apache-2.0
"""``QuantizedKVAttention``: decode attention over a cache of 8 or 4 bits, as an ONNX function.

Keys are stored after rotation and without the share of the bias, values without theirs, with one calibrated
scale per channel: in Qwen2.5 the bias makes a few key channels many times larger than the others, and it is
known exactly. Codes lie as in ONNX Runtime's GroupQueryAttention, which does the same work faster.

The share of the bias in a score, q · R(position) b, comes from the rotary tables: the pair (i, i + D/2) adds
cos · (q_i b_i + q_{i+D/2} b_{i+D/2}) + sin · (q_{i+D/2} b_i − q_i b_{i+D/2}).
"""

import onnx
import onnx.parser

QUANTIZED_KV_ATTENTION = "QuantizedKVAttention"

# B sequences, Hq query heads, Hkv KV heads, D head dim, C rows of capacity, P positions in the tables:
# q [B,1,Hq*D] rotated, k and v [B,1,Hkv*D] with bias and k rotated, past_k and past_v [B,Hkv,C,D] i8 for 8
# bits, [B,Hkv,C,D/2] u8 for 4, kv_len [B] i32, positions [B,C,3] i32 (t, h, w), where row kv_len holds the
# new row's and unused rows any in 0 .. P-1, k_scale, v_scale, k_bias and v_bias [Hkv*D], cos_table and
# sin_table [P,D/2] -> out [B,1,Hq*D], present_k and present_v.
# The new row becomes row kv_len: code = clip(round(x / scale), -2^(bits-1), 2^(bits-1) - 1), of 4 bits two to
# a byte along D, the even channel low, each plus 8. Both channels of a rotary pair of keys have one scale.
# mrope_section: rotary pairs that turn with t, h and w; [D/2] where positions have one component.
#
# Each pair's position is a product with ones, which is exact and much faster than gathering single numbers.
# A byte, as a number from 0 to 255, has 8/bits digits of the base 2^bits, and a digit is a code plus half the
# base. i8 is that number less 128.
_BODY = """
<domain: "ai.starkv", opset_import: ["" : 23]>
QuantizedKVAttention <num_heads, kv_num_heads, bits, mrope_section>
    (q, k, v, past_k, past_v, kv_len, positions, k_scale, v_scale, k_bias, v_bias, cos_table, sin_table)
    => (out, present_k, present_v)
{{
    num_kv = Constant <value_int: int = @kv_num_heads> ()
    code_bits = Constant <value_int: int = @bits> ()
    section = Constant <value_ints: ints = @mrope_section> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    axis_2 = Constant <value_ints = [2]> ()
    last_axis = Constant <value_ints = [-1]> ()
    axes_123 = Constant <value_ints = [1, 2, 3]> ()
    keep = Constant <value_ints = [0]> ()
    infer = Constant <value_ints = [-1]> ()
    zero_1d = Constant <value_ints = [0]> ()
    one_1d = Constant <value_ints = [1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    eight = Constant <value_int = 8> ()
    f0 = Constant <value_float = 0.0> ()
    f1 = Constant <value_float = 1.0> ()
    f2 = Constant <value_float = 2.0> ()
    f16 = Constant <value_float = 16.0> ()
    f128 = Constant <value_float = 128.0> ()
    unseen = Constant <value = float {{-inf}}> ()

    half_1d = Shape <start = 1, end = 2> (cos_table)
    dim_1d = Add (half_1d, half_1d)
    num_kv_1d = Unsqueeze (num_kv, axis_0)
    length = Cast <to = 7> (kv_len)
    longest = ReduceMax <keepdims = 1> (length, axis_0)
    rows_1d = Add (longest, one_1d)

    bits_f32 = Cast <to = 1> (code_bits)
    base = Pow (f2, bits_f32)
    offset = Div (base, f2)
    lowest = Neg (offset)
    highest = Sub (offset, f1)
    codes_per_byte = Div (eight, code_bits)
    codes_per_byte_1d = Unsqueeze (codes_per_byte, axis_0)
    digit = Range (zero, codes_per_byte, one)
    digit_f32 = Cast <to = 1> (digit)
    place = Pow (base, digit_f32)
    is_signed = Equal (code_bits, eight)
    zero_byte = Where (is_signed, f128, f0)

    half = Squeeze (half_1d)
    pair = Range (zero, half, one)
    section_end = CumSum (section, zero)
    section_end_2d = Unsqueeze (section_end, axis_1)
    section_start_1d = Sub (section_end, section)
    section_start_2d = Unsqueeze (section_start_1d, axis_1)
    is_started = GreaterOrEqual (pair, section_start_2d)
    is_not_over = Less (pair, section_end_2d)
    is_own = And (is_started, is_not_over)
    own_component = Cast <to = 1> (is_own)
    components_1d = Shape (section)
    seen_rows = Slice (positions, zero_1d, rows_1d, axis_1)
    seen_positions = Slice (seen_rows, zero_1d, components_1d, axis_2)
    positions_f32 = Cast <to = 1> (seen_positions)
    pair_positions_f32 = MatMul (positions_f32, own_component)
    pair_positions = Cast <to = 7> (pair_positions_f32)
    table_shape = Concat <axis = 0> (infer, half_1d)
    table_rows = Reshape (pair_positions, table_shape)
    cos_2d = GatherElements <axis = 0> (cos_table, table_rows)
    sin_2d = GatherElements <axis = 0> (sin_table, table_rows)
    pair_shape = Shape (pair_positions)
    cos = Reshape (cos_2d, pair_shape)
    sin = Reshape (sin_2d, pair_shape)

    length_2d = Unsqueeze (length, axis_1)
    new_cos_2d = GatherND <batch_dims = 1> (cos, length_2d)
    new_sin_2d = GatherND <batch_dims = 1> (sin, length_2d)
    new_cos = Unsqueeze (new_cos_2d, axis_1)
    new_sin = Unsqueeze (new_sin_2d, axis_1)
    row_shape = Shape (k)
    k_bias_rows = Expand (k_bias, row_shape)
    rotated_bias = RotaryEmbedding <num_heads: int = @kv_num_heads> (k_bias_rows, new_cos, new_sin)
    k_plain = Sub (k, rotated_bias)
    v_plain = Sub (v, v_bias)
    k_scaled = Div (k_plain, k_scale)
    v_scaled = Div (v_plain, v_scale)
    k_rounded = Round (k_scaled)
    v_rounded = Round (v_scaled)
    k_new_codes = Clip (k_rounded, lowest, highest)
    v_new_codes = Clip (v_rounded, lowest, highest)

    k_digits_flat = Add (k_new_codes, offset)
    v_digits_flat = Add (v_new_codes, offset)
    bytes_shape = Concat <axis = 0> (keep, num_kv_1d, one_1d, infer, codes_per_byte_1d)
    k_digits = Reshape (k_digits_flat, bytes_shape)
    v_digits = Reshape (v_digits_flat, bytes_shape)
    k_placed = Mul (k_digits, place)
    v_placed = Mul (v_digits, place)
    k_number = ReduceSum <keepdims = 0> (k_placed, last_axis)
    v_number = ReduceSum <keepdims = 0> (v_placed, last_axis)
    k_byte = Sub (k_number, zero_byte)
    v_byte = Sub (v_number, zero_byte)
    k_row = CastLike (k_byte, past_k)
    v_row = CastLike (v_byte, past_v)
    length_4d = Unsqueeze (length, axes_123)
    write_extent = Shape (k_row)
    write_row = Expand (length_4d, write_extent)
    present_k = ScatterElements <axis = 2> (past_k, write_row, k_row)
    present_v = ScatterElements <axis = 2> (past_v, write_row, v_row)

    k_stored = Slice (present_k, zero_1d, rows_1d, axis_2)
    v_stored = Slice (present_v, zero_1d, rows_1d, axis_2)
    k_codes = If (is_signed) <{k_branches}>
    v_codes = If (is_signed) <{v_branches}>

    num_q = Constant <value_int: int = @num_heads> ()
    group = Div (num_q, num_kv)
    group_1d = Unsqueeze (group, axis_0)
    group_shape = Concat <axis = 0> (keep, num_kv_1d, group_1d, dim_1d)
    channel_shape = Concat <axis = 0> (num_kv_1d, one_1d, dim_1d)
    k_scale_heads = Reshape (k_scale, channel_shape)
    v_scale_heads = Reshape (v_scale, channel_shape)
    k_bias_heads = Reshape (k_bias, channel_shape)
    v_bias_heads = Reshape (v_bias, channel_shape)
    q_heads = Reshape (q, group_shape)
    q_scaled = Mul (q_heads, k_scale_heads)
    digits_last = Concat <axis = 0> (keep, num_kv_1d, group_1d, infer, codes_per_byte_1d)
    q_by_byte = Reshape (q_scaled, digits_last)
    q_by_digit = Transpose <perm = [0, 1, 2, 4, 3]> (q_by_byte)
    q_ordered = Reshape (q_by_digit, group_shape)
    k_columns = Transpose <perm = [0, 1, 3, 2]> (k_codes)
    code_scores = MatMul (q_ordered, k_columns)

    q_first, q_second = Split <axis = -1, num_outputs = 2> (q_heads)
    b_first, b_second = Split <axis = -1, num_outputs = 2> (k_bias_heads)
    first_first = Mul (q_first, b_first)
    second_second = Mul (q_second, b_second)
    second_first = Mul (q_second, b_first)
    first_second = Mul (q_first, b_second)
    with_cos = Add (first_first, second_second)
    with_sin = Sub (second_first, first_second)
    cos_by_pair = Transpose <perm = [0, 2, 1]> (cos)
    sin_by_pair = Transpose <perm = [0, 2, 1]> (sin)
    cos_columns = Unsqueeze (cos_by_pair, axis_1)
    sin_columns = Unsqueeze (sin_by_pair, axis_1)
    cos_scores = MatMul (with_cos, cos_columns)
    sin_scores = MatMul (with_sin, sin_columns)
    bias_scores = Add (cos_scores, sin_scores)

    raw_scores = Add (code_scores, bias_scores)
    dim_f32 = Cast <to = 1> (dim_1d)
    root = Sqrt (dim_f32)
    scores = Div (raw_scores, root)
    rows = Squeeze (rows_1d)
    row = Range (zero, rows, one)
    is_seen = LessOrEqual (row, length_4d)
    seen_scores = Where (is_seen, scores, unseen)
    weights = Softmax <axis = -1> (seen_scores)
    ordered_sums = MatMul (weights, v_codes)
    digits_first = Concat <axis = 0> (keep, num_kv_1d, group_1d, codes_per_byte_1d, infer)
    sums_by_digit = Reshape (ordered_sums, digits_first)
    sums_by_byte = Transpose <perm = [0, 1, 2, 4, 3]> (sums_by_digit)
    code_sums = Reshape (sums_by_byte, group_shape)
    sums = Mul (code_sums, v_scale_heads)
    attended = Add (sums, v_bias_heads)
    out_shape = Concat <axis = 0> (keep, one_1d, infer)
    out = Reshape (attended, out_shape)
}}
"""


# Stored rows -> codes, float32 [B,Hkv,n,D]. Of 4 bits the even channels come first, the odd ones behind them:
# queries and sums take that order, which are few, so that the rows need not be shuffled.
_BRANCHES = """
    then_branch = {x}_of_8_bits () => ({x}_signed)
    {{
        {x}_signed = Cast <to = 1> ({x}_stored)
    }},
    else_branch = {x}_of_4_bits () => ({x}_halves)
    {{
        {x}_two_codes = Cast <to = 1> ({x}_stored)
        {x}_shifted = Div ({x}_two_codes, f16)
        {x}_high = Floor ({x}_shifted)
        {x}_above = Mul ({x}_high, f16)
        {x}_low = Sub ({x}_two_codes, {x}_above)
        {x}_low_high = Concat <axis = -1> ({x}_low, {x}_high)
        {x}_halves = Sub ({x}_low_high, offset)
    }}
"""


def quantized_kv_function() -> onnx.FunctionProto:
    """The operator's definition in standard ONNX operators."""
    return onnx.parser.parse_function(
        _BODY.format(k_branches=_BRANCHES.format(x="k"), v_branches=_BRANCHES.format(x="v"))
    )
