# SPDX-License-Identifier: Apache-2.0
"""ONNX definitions of what every method shares: priorities, budgets of layers, selection and compaction.

See ``onnx_compress.py`` for the symbols and ``methods/select.py`` for the meaning.
"""

_HEADER = '<domain: "ai.starkv", opset_import: ["" : 23]>'

# sets [L,B,N,C] f32, kv_len [L,B] i32, row_meta [L,B,C,4] i32, window [1] i64 -> priorities [L,B,N,C] f32:
# +inf in the window, the largest finite number where protected, -inf behind the rows and where a score is
# NaN.
PRIORITIES_BODY = f"""
{_HEADER}
Priorities (sets, kv_len, row_meta, window) => (priorities)
{{
    axis_2 = Constant <value_ints = [2]> ()
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_i32 = Constant <value = int32 {{0}}> ()
    highest = Constant <value = float {{3.4028234663852886e+38}}> ()
    half = Constant <value = float {{1.7014117331926443e+38}}> ()
    infinite = Constant <value = float {{inf}}> ()
    lowest = Neg (infinite)
    capacity_1d = Shape <start = 3, end = 4> (sets)
    capacity = Squeeze (capacity_1d)
    row = Range (zero, capacity, one)
    length = Cast <to = 7> (kv_len)
    length_3d = Unsqueeze (length, axis_2)
    past = Sub (length_3d, window)
    is_past = Less (row, past)
    valid = Less (row, length_3d)
    protected_column = Constant <value_int = 2> ()
    protected_i32 = Gather <axis = 3> (row_meta, protected_column)
    marked = Greater (protected_i32, zero_i32)
    held = And (marked, is_past)
    is_past_4d = Unsqueeze (is_past, axis_2)
    valid_4d = Unsqueeze (valid, axis_2)
    held_4d = Unsqueeze (held, axis_2)
    no_number = IsNaN (sets)
    numbers = Where (no_number, lowest, sets)
    capped = Min (numbers, half)
    with_held = Where (held_4d, highest, capped)
    with_window = Where (is_past_4d, with_held, infinite)
    priorities = Where (valid_4d, with_window, lowest)
}}
"""

# needed [L,B] f32, limits [3] i64 (mean, floor, ceiling) -> competing [L,B] i64, mean * L in total.
LAYER_ROWS_BODY = f"""
{_HEADER}
LayerRows (needed, limits) => (competing)
{{
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    first = Constant <value_ints = [0]> ()
    before_last = Constant <value_ints = [-1]> ()
    none = Constant <value = double {{0.0}}> ()
    half = Constant <value = double {{0.50000095367431640625}}> ()
    tiny = Constant <value = double {{1e-9}}> ()
    infinite = Constant <value = double {{inf}}> ()
    axis = Constant <value_int = 0> ()
    limits_f64 = Cast <to = 11> (limits)
    mean, floor, ceiling = Split <axis = 0, num_outputs = 3> (limits_f64)
    needed_f64 = Cast <to = 11> (needed)
    unknown = IsNaN (needed_f64)
    one = Constant <value = double {{1.0}}> ()
    weights = Where (unknown, one, needed_f64)
    layers_i64 = Shape <start = 0, end = 1> (needed)
    layers = Cast <to = 11> (layers_i64)
    wanted = Mul (mean, layers)

    floor_knees = Div (floor, weights)
    ceiling_knees = Div (ceiling, weights)
    knees = Concat <axis = 0> (floor_knees, ceiling_knees)
    knees_3d = Unsqueeze (knees, axis_1)
    asked = Mul (knees_3d, weights)
    at_least = Max (asked, floor)
    given = Min (at_least, ceiling)
    totals = ReduceSum <keepdims = 0> (given, axis_1)
    inexact = Constant <value = double {{1e-6}}> ()
    wanted_above = Add (wanted, inexact)
    wanted_below = Sub (wanted, inexact)
    below = LessOrEqual (totals, wanted_above)
    above = GreaterOrEqual (totals, wanted_below)
    low_knees = Where (below, knees, none)
    high_knees = Where (above, knees, infinite)
    low_totals = Where (below, totals, none)
    high_totals = Where (above, totals, infinite)
    low = ReduceMax <keepdims = 1> (low_knees, axis_0)
    high = ReduceMin <keepdims = 1> (high_knees, axis_0)
    low_total = ReduceMax <keepdims = 1> (low_totals, axis_0)
    high_total = ReduceMin <keepdims = 1> (high_totals, axis_0)
    missing = Sub (wanted, low_total)
    width = Sub (high_total, low_total)
    width_eps = Max (width, tiny)
    way_any = Div (missing, width_eps)
    way_up = Max (way_any, none)
    way = Min (way_up, one)
    knee_width = Sub (high, low)
    further = Mul (way, knee_width)
    factor = Add (low, further)
    shares_any = Mul (factor, weights)
    shares_floor = Max (shares_any, floor)
    shares = Min (shares_floor, ceiling)

    total = CumSum (shares, axis)
    raised = Add (total, half)
    running = Floor (raised)
    first_row = Mul (low, none)
    earlier = Slice (running, first, before_last, axis_0)
    before = Concat <axis = 0> (first_row, earlier)
    grown = Sub (running, before)
    competing = Cast <to = 7> (grown)
}}
"""

# k, v [L,B,G,C,D], row_meta [L,B,C,4] i32, priorities [L,B,N,C] f32 without NaN (N is 1 or G), keep [L,B]
# i64, dst_k, dst_v [L,S,G,E,D], dst_meta [L,S,E,4] i32, slot [B] i32 -> new_k, new_v, new_meta, new_len [L,B]
# i32, rows [L,B,N,K] i64. All rows are gathered before the first is written, so source and destination may be
# the same memory. Layers that keep fewer than K rows get copies of row 0 behind theirs, which nothing reads.
# Metadata of layers whose heads keep different rows are unknown: -1.
COMPACT_BODY = f"""
{_HEADER}
Compact (k, v, row_meta, priorities, keep, dst_k, dst_v, dst_meta, slot)
    => (new_k, new_v, new_meta, new_len, rows)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    minus_one = Constant <value_int = -1> ()
    unknown = Constant <value = int32 {{-1}}> ()
    zero_1d = Constant <value_ints = [0]> ()
    one_1d = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    axes_23 = Constant <value_ints = [2, 3]> ()
    axes_123 = Constant <value_ints = [1, 2, 3]> ()
    axes_023 = Constant <value_ints = [0, 2, 3]> ()
    axes_013 = Constant <value_ints = [0, 1, 3]> ()
    axes_0123 = Constant <value_ints = [0, 1, 2, 3]> ()

    most_0d = ReduceMax <keepdims = 0> (keep)
    most = Unsqueeze (most_0d, zero_1d)
    place = Range (zero, most_0d, one)
    keep_4d = Unsqueeze (keep, axes_23)
    stays = Less (place, keep_4d)
    best, order = TopK <axis = -1, largest = 1, sorted = 1> (priorities, most)
    capacity = Shape <start = 3, end = 4> (priorities)
    marked = Where (stays, order, capacity)
    ascending, unused = TopK <axis = -1, largest = 0, sorted = 1> (marked, most)
    rows = Where (stays, ascending, minus_one)
    source = Where (stays, ascending, zero)
    new_len = Cast <to = 6> (keep)

    outer = Shape <start = 0, end = 3> (k)
    layers = Shape <start = 0, end = 1> (k)
    heads = Shape <start = 2, end = 3> (k)
    layers_0d = Squeeze (layers)
    heads_0d = Squeeze (heads)
    index_shape = Concat <axis = 0> (outer, most)
    per_head = Expand (source, index_shape)
    from = Unsqueeze (per_head, last)
    kept_k = GatherND <batch_dims = 3> (k, from)
    kept_v = GatherND <batch_dims = 3> (v, from)

    layer = Range (zero, layers_0d, one)
    head = Range (zero, heads_0d, one)
    slot_i64 = Cast <to = 7> (slot)
    layer_4d = Unsqueeze (layer, axes_123)
    slot_4d = Unsqueeze (slot_i64, axes_023)
    head_4d = Unsqueeze (head, axes_013)
    layer_of = Expand (layer_4d, index_shape)
    slot_of = Expand (slot_4d, index_shape)
    head_of = Expand (head_4d, index_shape)
    place_of = Expand (place, index_shape)
    layer_5d = Unsqueeze (layer_of, last)
    slot_5d = Unsqueeze (slot_of, last)
    head_5d = Unsqueeze (head_of, last)
    place_5d = Unsqueeze (place_of, last)
    to = Concat <axis = -1> (layer_5d, slot_5d, head_5d, place_5d)
    new_k = ScatterND (dst_k, to, kept_k)
    new_v = ScatterND (dst_v, to, kept_v)

    axis_2 = Constant <value_ints = [2]> ()
    first_source = Slice (source, zero_1d, one_1d, axis_2)
    first_stays = Slice (stays, zero_1d, one_1d, axis_2)
    meta_rows = Squeeze (first_source, axis_2)
    meta_from = Unsqueeze (meta_rows, last)
    kept_meta = GatherND <batch_dims = 2> (row_meta, meta_from)
    sets = Shape <start = 2, end = 3> (priorities)
    one_set = Equal (sets, one_1d)
    meta_stays = Squeeze (first_stays, axis_2)
    meta_stays_4d = Unsqueeze (meta_stays, last)
    meta_known = And (meta_stays_4d, one_set)
    meta_rows_kept = Where (meta_known, kept_meta, unknown)
    meta_to_all = Slice (to, zero_1d, one_1d, axis_2)
    meta_to_4d = Squeeze (meta_to_all, axis_2)
    columns = Constant <value_ints = [0, 1, 3]> ()
    meta_to = Gather <axis = -1> (meta_to_4d, columns)
    new_meta = ScatterND (dst_meta, meta_to, meta_rows_kept)
}}
"""
