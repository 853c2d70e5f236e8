# SPDX-License-Identifier: Apache-2.0
"""Rules about a graph as a whole: versions, functions, names, inputs and outputs, constants."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

from starkv.export.lower.trt_rule import Rule, RuleContext
from starkv.trt_compat.version import TensorRTVersion

Found = Iterator[tuple[str, str]]

_OPSETS = ((TensorRTVersion(10, 6), 22), (TensorRTVersion(10, 3), 21))
"""First version → opset of the ONNX release that its parser is built with, newest first. Later parsers read
newer ones; nothing of ours needs them."""
_IR_VERSION = 10
_NAME_BYTES = 4096
_TENSOR_TYPES = frozenset(("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL"))
_CONSTANT_TYPES = _TENSOR_TYPES | {"INT4", "INT8"}
_DATA_KEYS = frozenset(("location", "offset", "length", "checksum"))
"""Entries about external data that the parser takes; any other fails it."""
_MOST_DIMS = 8


def _versions(context: RuleContext) -> Found:
    most = next(opset for first, opset in _OPSETS if context.target >= first)
    for entry in context.model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > most:
            yield "opset_import", f"opset {entry.version}, but at most {most} is read"
    if context.model.ir_version > _IR_VERSION:
        yield "ir_version", f"IR version {context.model.ir_version}, but at most {_IR_VERSION} is read"


def _functions(context: RuleContext) -> Found:
    for function in context.model.functions:
        yield function.name, "a local function, which hides the plugin of that name"


def _names(context: RuleContext) -> Found:
    counts = Counter(node.name for node in context.nodes)
    for name, count in counts.items():
        if not name or count > 1:
            yield name or "a node", f"{count} nodes have this name; profiles and refits tell layers by name"
    values = [entry.name for entry in (*context.model.graph.input, *context.model.graph.output)]
    for name in [*counts, *values]:
        if len(name.encode()) >= _NAME_BYTES:
            yield f"{name[:40]}…", f"a name of {len(name.encode())} bytes; {_NAME_BYTES - 1} are the most"


def _interface(context: RuleContext) -> Found:
    for entry in (*context.model.graph.input, *context.model.graph.output):
        kind = onnx.TensorProto.DataType.Name(entry.type.tensor_type.elem_type)
        if kind not in _TENSOR_TYPES:
            yield entry.name, f"an input or output of type {kind}"
        dims = len(entry.type.tensor_type.shape.dim)
        if dims > _MOST_DIMS:
            yield entry.name, f"{dims} dimensions; {_MOST_DIMS} are the most"
    for entry in context.model.graph.output:
        known = context.types.get(entry.name)
        if known is not None and known != entry.type.tensor_type.elem_type:
            declared = onnx.TensorProto.DataType.Name(entry.type.tensor_type.elem_type)
            yield entry.name, f"declared {declared}, computed {context.type_name(entry.name)}"


def _dynamic_names(context: RuleContext) -> Found:
    for entry in context.model.graph.input:
        for axis, dim in enumerate(entry.type.tensor_type.shape.dim):
            if not dim.dim_param and dim.dim_value < 1:
                yield entry.name, f"dimension {axis} has neither a size nor a name"


def _constants(context: RuleContext) -> Found:
    for tensor in context.model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if kind not in _CONSTANT_TYPES:
            yield tensor.name, f"a constant of type {kind}"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if not entries:
            continue
        if unknown := entries.keys() - _DATA_KEYS:
            yield tensor.name, f"its data have the unknown entry {', '.join(sorted(unknown))}"
        if "length" not in entries:
            yield tensor.name, "its data have no length: the whole file would be read"
        location = entries.get("location", "")
        if Path(location).name != location:
            yield tensor.name, f"its data lie at {location!r}, not beside the graph"
            continue
        path = context.folder / location
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        if not path.is_file() or path.stat().st_size < end:
            yield tensor.name, f"{location} does not hold its data"


GRAPH_RULES = (
    Rule("versions", "onnx-tensorrt docs/Changelog.md: ONNX 1.16 until 10.5, 1.17 from 10.6", _versions),
    Rule("no-functions", "ModelImporter.cpp parseNode: functions before plugins", _functions),
    Rule("names", "NvInferRuntime.h (10.16): at most 4096 bytes including the terminator", _names),
    Rule("interface", "NvInferRuntimeBase.h: DataType, Dims::MAX_DIMS", _interface),
    Rule(
        "named-dimensions",
        "NvInfer.h IOptimizationProfile",
        _dynamic_names,
    ),
    Rule("constants", "onnx-tensorrt WeightsContext.cpp: types and external data", _constants),
)
