# SPDX-License-Identifier: Apache-2.0
"""ONNX definitions of STaR-KV's scoring. See ``onnx_compress.py`` for the symbols and ``methods/star_kv.py``
for the meaning of every stage."""

from dataclasses import fields

from starkv.methods.star_kv_plan import StarKVPlan

_HEADER = '<domain: "ai.starkv", opset_import: ["" : 23, "ai.starkv" : 1]>'
_PARAMETERS = ", ".join(f"p_{field.name}" for field in fields(StarKVPlan))

# All of STaR-KV behind the window's attention, for all layers together. pooled [L,B,G,C], window [1] i64, the
# others as in ScoreStarKV.
_STAGES_BODY = """
{header}
StarKVStages (pooled, window, hidden_norm, kv_len, row_meta, frame, parameters,
              mi_ema, pattern_ema, temperature)
    => (scores, stages, needed, new_mi_ema, new_pattern_ema, new_temperature)
{{
    {parameters} = Split <axis = 0, num_outputs = {count}> (parameters)
    frame_i64 = Cast <to = 7> (frame)
    f_index, f_to_end, f_cells, f_rows, f_columns = Split <axis = 0, num_outputs = 5> (frame_i64)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_1d = Constant <value_ints = [0]> ()
    axis_2 = Constant <value_ints = [2]> ()
    axis_3 = Constant <value_ints = [3]> ()
    last = Constant <value_ints = [-1]> ()
    to_the_end = Constant <value_ints = [9223372036854775807]> ()
    f0 = Constant <value_float = 0.0> ()
    f1 = Constant <value_float = 1.0> ()
    tiny_8 = Constant <value_float = 1e-8> ()
    hidden_score = Constant <value = float {{-inf}}> ()

    frame_column = Constant <value_int = 0> ()
    row_frame = Gather <axis = 3> (row_meta, frame_column)
    capacity_1d = Shape <start = 3, end = 4> (pooled)
    capacity = Squeeze (capacity_1d)
    row = Range (zero, capacity, one)
    length = Cast <to = 7> (kv_len)
    past = Sub (length, window)
    past_3d = Unsqueeze (past, axis_2)
    is_past = Less (row, past_3d)
    start = Sub (length, f_to_end)
    start_3d = Unsqueeze (start, axis_2)
    offset = Sub (row, start_3d)
    from_start = GreaterOrEqual (offset, zero_1d)
    before_end = Less (offset, f_cells)
    in_frame = And (from_start, before_end)

    cells_f32 = Cast <to = 1> (f_cells)
    count = Max (cells_f32, f1)
    inside_norm = Where (in_frame, hidden_norm, f0)
    norm_sum = ReduceSum <keepdims = 1> (inside_norm, last)
    norm_mean = Div (norm_sum, count)
    from_mean = Sub (hidden_norm, norm_mean)
    deviation = Where (in_frame, from_mean, f0)
    squares = Mul (deviation, deviation)
    square_sum = ReduceSum <keepdims = 1> (squares, last)
    less_one = Sub (cells_f32, f1)
    freedom = Max (less_one, f1)
    variance = Div (square_sum, freedom)
    spread = Sqrt (variance)
    spread_eps = Add (spread, tiny_8)
    z = Div (deviation, spread_eps)
    z_tempered = Div (z, p_boost_temperature)
    logits = Where (in_frame, z_tempered, hidden_score)
    shares = Softmax <axis = -1> (logits)
    mass = Mul (shares, p_boost)
    boost = Where (in_frame, mass, f0)
    boost_4d = Unsqueeze (boost, axis_2)
    groups = Add (pooled, boost_4d)

    outer = Shape <start = 0, end = 3> (pooled)
    group_count = Shape <start = 2, end = 3> (pooled)
    base = ReduceMean <keepdims = 0> (groups, axis_2)
    plain = ReduceMean <keepdims = 0> (pooled, axis_2)

    base_sum = ReduceSum <keepdims = 1> (base, last)
    base_total = Max (base_sum, tiny_8)
    share = Div (base, base_total)
    share_eps = Add (share, tiny_8)
    log_share = Log (share_eps)
    surprise = Mul (share, log_share)
    negative_entropy = ReduceSum <keepdims = 0> (surprise, last)
    entropy = Neg (negative_entropy)
    one_i64 = Constant <value_ints = [1]> ()
    competing = Max (past, one_i64)
    competing_f64 = Cast <to = 11> (competing)
    log_f64 = Log (competing_f64)
    tiny_f64 = Constant <value = double {{1e-8}}> ()
    log_eps = Add (log_f64, tiny_f64)
    largest_entropy = Cast <to = 1> (log_eps)
    normalized = Div (entropy, largest_entropy)
    log_past = Cast <to = 1> (log_f64)
    spread_entropy = Mul (normalized, log_past)
    needed = Exp (spread_entropy)
    range = Sub (p_entropy_max, p_entropy_min)
    above_least = Mul (range, normalized)
    fresh = Add (p_entropy_min, above_least)
    kept_part = Mul (p_entropy_smooth, temperature)
    fresh_weight = Sub (f1, p_entropy_smooth)
    fresh_part = Mul (fresh_weight, fresh)
    new_temperature = Add (kept_part, fresh_part)

    leading = ArgMax <axis = 2, keepdims = 0> (groups)
    cells = Squeeze (f_cells)
    cell = Range (zero, cells, one)
    frame_row = Add (start_3d, cell)
    frame_row_4d = Unsqueeze (frame_row, axis_2)
    inside_shape = Concat <axis = 0> (outer, f_cells)
    frame_rows = Expand (frame_row_4d, inside_shape)
    inside = GatherElements <axis = 3> (groups, frame_rows)
    positive = Relu (inside)

    mi_wanted = Greater (p_mi_enabled, f0)
    new_mi_ema = If (mi_wanted) <
        then_branch = informed () => (averaged)
        {{
            information = ai.starkv.SpatialInformation (positive, f_cells, f_rows, f_columns)
            beyond_chance = Sub (information, p_mi_chance)
            real = Relu (beyond_chance)
            scaled = Mul (real, p_mi_scale)
            old_part = Mul (p_mi_decay, mi_ema)
            new_weight = Sub (f1, p_mi_decay)
            new_part = Mul (new_weight, scaled)
            averaged = Add (old_part, new_part)
        }},
        else_branch = idle () => (unchanged) {{ unchanged = Identity (mi_ema) }}
    >
    least = ReduceMin <keepdims = 1> (new_mi_ema, last)
    greatest = ReduceMax <keepdims = 1> (new_mi_ema, last)
    width = Sub (greatest, least)
    tiny_12 = Constant <value_float = 1e-12> ()
    width_eps = Max (width, tiny_12)
    above = Sub (new_mi_ema, least)
    ratio = Div (above, width_eps)
    half = Constant <value_float = 0.5> ()
    flat = Less (width, tiny_12)
    stretched = Where (flat, half, ratio)
    is_stretched = Greater (p_mi_stretch, f0)
    graded = Where (is_stretched, stretched, new_mi_ema)
    tempered = Div (graded, p_mi_tau)
    learned = Softmax <axis = -1> (tempered)
    groups_f32 = Cast <to = 1> (group_count)
    equal_weight = Reciprocal (groups_f32)
    usable = Greater (p_mi_usable, f0)
    weights = Where (usable, learned, equal_weight)
    own_weight = GatherElements <axis = 2> (weights, leading)
    relative = Mul (own_weight, groups_f32)
    weight_part = Mul (p_mi_weight, relative)
    plain_weight = Sub (f1, p_mi_weight)
    factor = Add (plain_weight, weight_part)
    weighted = Mul (base, factor)

    temporal_wanted = Greater (p_temporal_update, f0)
    discount, new_pattern_ema = If (temporal_wanted) <
        then_branch = compared () => (applied, pattern_after)
        {{
            positive_sum = ReduceSum <keepdims = 1> (positive, last)
            positive_total = Max (positive_sum, tiny_8)
            pattern = Div (positive, positive_total)
            earlier = Slice (pattern_ema, zero_1d, f_cells, axis_3)
            earlier_part = Mul (p_temporal_rho, earlier)
            pattern_weight = Sub (f1, p_temporal_rho)
            pattern_part = Mul (pattern_weight, pattern)
            updated = Add (earlier_part, pattern_part)
            to_earlier = Greater (p_temporal_earlier, f0)
            reference = Where (to_earlier, earlier, updated)
            products = Mul (pattern, reference)
            dot = ReduceSum <keepdims = 0> (products, last)
            pattern_length = ReduceL2 <keepdims = 0> (pattern, last)
            reference_length = ReduceL2 <keepdims = 0> (reference, last)
            pattern_norm = Max (pattern_length, tiny_8)
            reference_norm = Max (reference_length, tiny_8)
            norms = Mul (pattern_norm, reference_norm)
            cosine = Div (dot, norms)
            clipped = Clip (cosine, f0, f1)
            no_pattern = Sub (f1, p_pattern_usable)
            nothing_seen = Mul (p_temporal_earlier, no_pattern)
            seen = Sub (f1, nothing_seen)
            stability = Mul (clipped, seen)

            no_frame = Constant <value = int32 {{0}}> ()
            is_visual = GreaterOrEqual (row_frame, no_frame)
            is_counted = And (is_visual, is_past)
            row_frame_i64 = Cast <to = 7> (row_frame)
            newer = Sub (f_index, row_frame_i64)
            newer_f32 = Cast <to = 1> (newer)
            distance = Where (is_counted, newer_f32, f0)
            own_stability = GatherElements <axis = 2> (stability, leading)
            eps_rest = Sub (f1, p_temporal_eps)
            graded_stability = Mul (eps_rest, own_stability)
            strength = Add (p_temporal_eps, graded_stability)
            way = Mul (distance, strength)
            decay = Neg (p_temporal_delta)
            exponent = Mul (decay, way)
            power = Exp (exponent)
            floor_rest = Sub (f1, p_temporal_floor)
            above_floor = Mul (floor_rest, power)
            lowered = Add (p_temporal_floor, above_floor)
            acts = Greater (p_temporal_apply, f0)
            applied = Where (acts, lowered, f1)
            rest = Slice (pattern_ema, f_cells, to_the_end, axis_3)
            pattern_after = Concat <axis = 3> (updated, rest)
        }},
        else_branch = still () => (untouched, pattern_before)
        {{
            nothing_taken = Mul (base, f0)
            untouched = Add (nothing_taken, f1)
            pattern_before = Identity (pattern_ema)
        }}
    >
    discounted = Mul (weighted, discount)
    exponent_of = Reciprocal (new_temperature)
    exponent_3d = Unsqueeze (exponent_of, axis_2)
    at_least_zero = Relu (discounted)
    sharpened = Pow (at_least_zero, exponent_3d)
    is_sharpened = Greater (p_entropy_power, f0)
    scores = Where (is_sharpened, sharpened, discounted)
    plain_4d = Unsqueeze (plain, axis_2)
    base_4d = Unsqueeze (base, axis_2)
    weighted_4d = Unsqueeze (weighted, axis_2)
    discounted_4d = Unsqueeze (discounted, axis_2)
    stages = Concat <axis = 2> (plain_4d, base_4d, weighted_4d, discounted_4d)
}}
"""

# k [L,B,G,C,D], q_window [L,B,H,W,D], hidden_norm [L,B,C], kv_len [L,B], row_meta [L,B,C,4], frame [5],
# parameters [P], mi_ema [L,B,G], pattern_ema [L,B,G,V], temperature [L,B]
# -> scores [L,B,C], stages [L,B,4,C], needed [L,B] (rows that a layer's scores are spread over), the new
# state.
_SCORE_BODY = """
{header}
ScoreStarKV (k, q_window, hidden_norm, kv_len, row_meta, frame, parameters, mi_ema, pattern_ema, temperature)
    => (scores, stages, needed, new_mi_ema, new_pattern_ema, new_temperature)
{{
    pooled = ai.starkv.ScoreWindow (k, q_window, kv_len)
    window = Shape <start = 3, end = 4> (q_window)
    scores, stages, needed, new_mi_ema, new_pattern_ema, new_temperature = ai.starkv.StarKVStages
        (pooled, window, hidden_norm, kv_len, row_meta, frame, parameters, mi_ema, pattern_ema, temperature)
}}
"""


def bodies() -> tuple[str, ...]:
    """Texts of all functions, those that are called before those that call them."""
    return (
        _STAGES_BODY.format(header=_HEADER, parameters=_PARAMETERS, count=len(fields(StarKVPlan))),
        _SCORE_BODY.format(header=_HEADER),
    )
