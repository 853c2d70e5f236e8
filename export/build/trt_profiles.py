# SPDX-License-Identifier: Apache-2.0
"""Sizes that the inputs of TensorRT's graphs may have: every symbol of a graph between two numbers.

The decoder has two profiles, so that kernels are chosen for long prefill calls and for single tokens, while
weights exist once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import onnx

from starkv.export.build.trt_options import ROW_STEP, TrtBuildOptions, cache_rows, position_rows
from starkv.export.build.trt_vision_bounds import least_sizes, most_sizes, usual_sizes
from starkv.export.lower.trt import COMPRESSION, DECODER, VISION
from starkv.export.record import ExportRecord
from starkv.methods.star_kv_plan import StarKVPlan
from starkv.trt_compat.building import Profile, ShapeRange

PREFILL, DECODE = 0, 1
"""Profiles of the decoder."""
_USUAL_ROWS = 4096
"""A screenshot, an instruction and a reply."""

Sizes = Mapping[str, "SizeRange"]
"""Symbol of a graph → what it may be."""


@dataclass(frozen=True)
class SizeRange:
    """Least, usual and greatest value of a symbol."""

    least: int
    usual: int
    most: int

    @classmethod
    def up_to(cls, most: int, least: int = 1, usual: int | None = None) -> "SizeRange":
        """From ``least`` to ``most``; the usual value is the greatest where there is no other."""
        return cls(least, min(most, usual or most), most)


def graph_sizes(name: str, record: ExportRecord, options: TrtBuildOptions) -> tuple[Sizes, ...]:
    """Sizes of each profile of a graph.

    Args:
        name: ``vision``, ``decoder`` or ``compress``.
        record: of the model, with the options' limits.
        options: sessions and rows.
    """
    return {VISION: _vision, DECODER: _decoder, COMPRESSION: _compress}[name](record, options)


def _vision(record: ExportRecord, options: TrtBuildOptions) -> tuple[Sizes, ...]:
    shape, limits = record.vision, record.image
    least, usual, most = least_sizes(shape), usual_sizes(limits, shape), most_sizes(limits, shape)
    return (
        {
            "N": SizeRange(least.patches, usual.patches, most.patches),
            "M": SizeRange(least.slots, usual.slots, most.slots),
            "nW": SizeRange(least.windows, usual.windows, most.windows),
            "T": SizeRange(least.tokens, usual.tokens, most.tokens),
        },
    )


def _decoder(record: ExportRecord, options: TrtBuildOptions) -> tuple[Sizes, ...]:
    one, rows = SizeRange(1, 1, 1), _rows(record)
    prefill = {"B": one, "S": SizeRange.up_to(options.prefill_rows), "C": rows}
    # One session is the usual case, whatever the limit.
    decode = {"B": SizeRange(1, 1, options.sessions), "S": one, "C": rows}
    if options.kv_bits is None:
        return prefill, decode
    codes = SizeRange.up_to(cache_rows(record), usual=_USUAL_ROWS)
    positions = SizeRange.up_to(position_rows(cache_rows(record)), usual=_USUAL_ROWS)
    # A prefill is over floats: its cache of codes has the one row that stands for none.
    return prefill | {"K": one, "P": one}, decode | {"K": codes, "P": positions}


def _compress(record: ExportRecord, options: TrtBuildOptions) -> tuple[Sizes, ...]:
    rows, tokens = _rows(record), most_sizes(record.image, record.vision).tokens
    parameters = len(fields(StarKVPlan))
    return (
        {
            "C": rows,
            "E": rows,
            "W": SizeRange.up_to(record.observation_window),
            "S": SizeRange(1, 1, options.sessions),
            "V": SizeRange.up_to(tokens, usual=usual_sizes(record.image, record.vision).tokens),
            "P": SizeRange(parameters, parameters, parameters),
        },
    )


def _rows(record: ExportRecord) -> SizeRange:
    return SizeRange.up_to(cache_rows(record), least=ROW_STEP, usual=_USUAL_ROWS)


def graph_profiles(graph: Path, profiles: tuple[Sizes, ...]) -> tuple[Profile, ...]:
    """Shapes of every input of a graph in each profile.

    Args:
        graph: lowered; its weights are not read.
        profiles: values of its symbols.

    Raises:
        ValueError: an input has a dimension without a name or without sizes.
    """
    inputs = onnx.load(graph, load_external_data=False).graph.input
    return tuple({value.name: _shape_range(value, sizes) for value in inputs} for sizes in profiles)


def _shape_range(value: onnx.ValueInfoProto, sizes: Sizes) -> ShapeRange:
    ranges = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.WhichOneof("value") == "dim_value":
            size = int(dim.dim_value)
            ranges.append(SizeRange(size, size, size))
        elif dim.dim_param in sizes:
            ranges.append(sizes[dim.dim_param])
        else:
            raise ValueError(f"input {value.name} has a dimension {dim.dim_param!r}, which has no sizes")
    return ShapeRange(
        least=tuple(size.least for size in ranges),
        usual=tuple(size.usual for size in ranges),
        most=tuple(size.most for size in ranges),
    )
