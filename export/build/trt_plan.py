# SPDX-License-Identifier: Apache-2.0
"""All of an engine for TensorRT but its building: graphs, sizes of their inputs, how TensorRT is to be told.

Needs neither TensorRT nor a GPU.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import onnx

from starkv.errors import UsageError
from starkv.export.build.trt_options import (
    TrtBuildOptions,
    at_most_context,
    cache_rows,
    position_rows,
    with_options,
)
from starkv.export.build.trt_profiles import Sizes, graph_profiles, graph_sizes
from starkv.export.build.trt_vision_bounds import most_sizes
from starkv.export.lower.trt import LoweredGraph, lower_to_trt
from starkv.export.progress import Progress
from starkv.export.record import ExportRecord, read_record
from starkv.manifest import ComputeDtype
from starkv.onnx_packable_kv import PACKABLE_KV_ATTENTION
from starkv.trt_compat.building import PlanSettings, Profile
from starkv.trt_compat.version import TensorRTVersion

ALIASING_PLUGINS = frozenset(("KVAttention", PACKABLE_KV_ATTENTION, "KVCompress"))
"""Plugins that write into their inputs' memory."""
_FLOATS = frozenset((onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16))
_BYTES = 2


@dataclass(frozen=True)
class PlannedEngine:
    """One graph and how it becomes a plan."""

    graph: LoweredGraph
    sizes: tuple[Sizes, ...]
    """What the symbols of the graph's inputs may be, for each profile."""
    profiles: tuple[Profile, ...]
    settings: PlanSettings

    @property
    def plan_name(self) -> str:
        return f"{self.graph.name}.plan"


@dataclass(frozen=True)
class BuildPlan:
    """What will be built."""

    record: ExportRecord
    """The model, with the limits that the engine will have."""
    target: TensorRTVersion
    compute_dtype: ComputeDtype
    options: TrtBuildOptions
    engines: tuple[PlannedEngine, ...]

    @property
    def weight_bytes(self) -> int:
        """Weights of all plans."""
        return sum(engine.graph.weight_bytes for engine in self.engines)

    @property
    def expanded(self) -> int:
        """Quantized weights that became 16-bit numbers."""
        return sum(engine.graph.expanded for engine in self.engines)

    @property
    def cache_rows(self) -> int:
        return cache_rows(self.record)

    @property
    def position_rows(self) -> int:
        """Positions that attention to codes is built for; 0 without it."""
        return position_rows(self.cache_rows) if self.options.kv_bits else 0

    @property
    def image_patches(self) -> int:
        return most_sizes(self.record.image, self.record.vision).patches

    @property
    def row_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        text = self.record.text
        return 2 * text.layers * text.kv_heads * text.head_dim * _BYTES


def plan_trt_build(
    export_dir: Path,
    out: Path,
    target: TensorRTVersion,
    compute_dtype: ComputeDtype,
    options: TrtBuildOptions,
    progress: Progress | None = None,
) -> BuildPlan:
    """Lower and check an export's graphs, and settle how each becomes a plan.

    Args:
        export_dir: what ``export_model`` wrote.
        out: directory for the lowered graphs.
        target: TensorRT that will read them.
        compute_dtype: ``bfloat16`` or ``float16``.
        options: what the user decides.
        progress: told about each graph.

    Raises:
        UsageError: ``export_dir`` is no export, or an option does not go with the model.
        StarkvError: a graph breaks a rule of TensorRT's parser.
    """
    record = with_options(read_record(export_dir), options)
    options = at_most_context(record, options)
    graphs = lower_to_trt(export_dir, out, target, compute_dtype, progress, options.kv_bits)
    protos = {graph.name: onnx.load(graph.path, load_external_data=False).graph for graph in graphs}
    debug = {name: _debug_tensors(proto, options.debug_layers) for name, proto in protos.items()}
    if options.debug_layers and not any(debug.values()):
        raise UsageError(
            f"--debug-layers {' '.join(options.debug_layers)} fits no tensor; names look like "
            f"{_an_example(protos['decoder'])}"
        )
    engines = []
    for graph in graphs:
        aliased = any(node.op_type in ALIASING_PLUGINS for node in protos[graph.name].node)
        sizes = graph_sizes(graph.name, record, options)
        profiles = graph_profiles(graph.path, sizes)
        # A graph without weights has none to leave out, or to stream.
        settings = (options if graph.weight_bytes else options.for_constants()).settings(
            aliased, debug[graph.name]
        )
        engines.append(PlannedEngine(graph, sizes, profiles, settings))
    return BuildPlan(record, target, compute_dtype, options, tuple(engines))


def _debug_tensors(graph: onnx.GraphProto, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Results of nodes whose names fit a pattern.

    Not the graph's own outputs, which can be seen anyway, and not 4-bit weights: TensorRT multiplies with
    them as they are, unless somebody looks.
    """
    outputs = {value.name for value in graph.output}
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    return tuple(
        name
        for node in graph.node
        for name in node.output
        if name not in outputs
        and node.op_type != "DequantizeLinear"
        and types.get(name, onnx.TensorProto.FLOAT) in _FLOATS
        and any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def _an_example(graph: onnx.GraphProto) -> str:
    return str(graph.node[len(graph.node) // 2].output[0])
