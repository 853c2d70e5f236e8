# SPDX-License-Identifier: Apache-2.0
"""ONNX definition of the spatial information in a screenshot's scores. See ``onnx_compress.py`` for the
symbols and ``methods/star_kv_stages.py`` for the meaning."""

from starkv.methods.expected_information import SPATIAL_BINS, VALUE_BINS

_PLACES = SPATIAL_BINS * SPATIAL_BINS
_HEADER = '<domain: "ai.starkv", opset_import: ["" : 23]>'

# positive [L,B,G,N] f32 at least 0, cells (N), rows, columns [1] i64 -> information [L,B,G] f32 in nats.
_INFORMATION_BODY = """
{header}
SpatialInformation (positive, cells, rows, columns) => (information)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    bins = Constant <value_int = {bins}> ()
    last_bin = Constant <value_int = {last_bin}> ()
    last = Constant <value_ints = [-1]> ()
    count = Squeeze (cells)
    token = Range (zero, count, one)
    row = Div (token, columns)
    row_start = Mul (row, columns)
    column = Sub (token, row_start)
    row_twice = Mul (row, two)
    column_twice = Mul (column, two)
    row_centre = Add (row_twice, one)
    column_centre = Add (column_twice, one)
    row_times = Mul (row_centre, bins)
    column_times = Mul (column_centre, bins)
    rows_twice = Mul (rows, two)
    columns_twice = Mul (columns, two)
    row_bin_any = Div (row_times, rows_twice)
    column_bin_any = Div (column_times, columns_twice)
    row_bin = Min (row_bin_any, last_bin)
    column_bin = Min (column_bin_any, last_bin)
    row_offset = Mul (row_bin, bins)
    place = Add (row_offset, column_bin)

    values, order = TopK <axis = -1, largest = 0, sorted = 1> (positive, cells)
    ranked_place = Gather <axis = 0> (place, order)
    value_bins = Constant <value_int = {values}> ()
    places = Constant <value_int = {places}> ()
    rank_times = Mul (token, value_bins)
    value_bin = Div (rank_times, cells)
    value_offset = Mul (value_bin, places)
    joint_bin = Add (value_offset, ranked_place)
    outer = Shape <start = 0, end = 3> (positive)
    joint_size = Constant <value_ints = [{joint}]> ()
    joint_shape = Concat <axis = 0> (outer, joint_size)
    empty = ConstantOfShape <value = double[1] {{0.0}}> (joint_shape)
    unit = Constant <value = double {{1.0}}> ()
    bin_shape = Shape (joint_bin)
    ones = Expand (unit, bin_shape)
    counts = ScatterElements <axis = 3, reduction = "add"> (empty, joint_bin, ones)
    table_shape = Constant <value_ints = [0, 0, 0, {values}, {places}]> ()
    table = Reshape (counts, table_shape)
    cells_f64 = Cast <to = 11> (cells)
    joint = Div (table, cells_f64)
    axis_3 = Constant <value_ints = [3]> ()
    axis_4 = Constant <value_ints = [4]> ()
    axes_34 = Constant <value_ints = [3, 4]> ()
    of_value = ReduceSum <keepdims = 1> (joint, axis_4)
    of_place = ReduceSum <keepdims = 1> (joint, axis_3)
    independent = Mul (of_value, of_place)
    tiny = Constant <value = double {{1e-12}}> ()
    joint_eps = Add (joint, tiny)
    independent_eps = Add (independent, tiny)
    log_joint = Log (joint_eps)
    log_independent = Log (independent_eps)
    gain = Sub (log_joint, log_independent)
    terms = Mul (joint, gain)
    sum = ReduceSum <keepdims = 0> (terms, axes_34)
    none = Constant <value = double {{0.0}}> ()
    at_least_none = Max (sum, none)
    found = Cast <to = 1> (at_least_none)
    total = ReduceSum <keepdims = 0> (positive, last)
    least_total = Constant <value_float = 1e-12> ()
    anything = Greater (total, least_total)
    one_1d = Constant <value_ints = [1]> ()
    several = Greater (cells, one_1d)
    usable = And (anything, several)
    f0 = Constant <value_float = 0.0> ()
    information = Where (usable, found, f0)
}}
"""

INFORMATION_BODY = _INFORMATION_BODY.format(
    header=_HEADER,
    bins=SPATIAL_BINS,
    last_bin=SPATIAL_BINS - 1,
    values=VALUE_BINS,
    places=_PLACES,
    joint=VALUE_BINS * _PLACES,
)
