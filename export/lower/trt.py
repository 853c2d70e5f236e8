# SPDX-License-Identifier: Apache-2.0
"""The TensorRT dialect: the canonical graph as the ONNX parsers of all supported TensorRT versions read it.

Plugins for attention and compression, primitives for what old parsers lack, 16-bit numbers with float32 where
they would spoil something, 4-bit weights in the form that TensorRT multiplies with. One form serves every
version: what differs between versions is checked, not written twice.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from starkv.export.lower.compute_dtype import narrow_activations
from starkv.export.lower.graph_edit import copy_others, remove_unused
from starkv.export.lower.trt_packed_caches import add_packed_caches
from starkv.export.lower.trt_plugins import POOLING, POOLING_KERNEL, lower_plugins
from starkv.export.lower.trt_primitives import lower_to_primitives
from starkv.export.lower.trt_rules import require_valid
from starkv.export.lower.trt_weights import expand_foreign_weights, round_scales
from starkv.export.progress import NoProgress, Progress
from starkv.export.record import ExportRecord, read_record
from starkv.export.tensor_file import TensorFile
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import ComputeDtype
from starkv.onnx_compress import COMPRESS, compress_model
from starkv.trt_compat.version import TensorRTVersion

VISION, DECODER, COMPRESSION = "vision", "decoder", "compress"
GRAPHS = (VISION, DECODER, COMPRESSION)
OPSET = 21
"""The newest that the parser of 10.3 reads (it is built with ONNX 1.16), and the oldest with 4-bit blocks."""
IR_VERSION = 10
_DTYPES: dict[ComputeDtype, ir.DataType] = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
_CACHES = ("k", "v", "q_window", "dst_k", "dst_v", "new_k", "new_v")
"""Tensors of ``compress`` in the cache's dtype."""


@dataclass(frozen=True)
class LoweredGraph:
    """A graph in the TensorRT dialect."""

    name: str
    path: Path
    data: Path | None
    """Its weights, beside it."""
    weight_bytes: int
    expanded: int
    """Quantized weights that became 16-bit numbers, since TensorRT doesn't take their form."""
    sha256: str
    """Of the graph's file, then of its data."""

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,) if self.data is None else (self.path, self.data)


def lower_to_trt(
    export_dir: Path,
    out: Path,
    target: TensorRTVersion,
    compute_dtype: ComputeDtype,
    progress: Progress | None = None,
    kv_bits: Bits | None = None,
) -> tuple[LoweredGraph, ...]:
    """Write ``vision``, ``decoder`` and ``compress`` in the TensorRT dialect.

    Tensors are those of the canonical graphs, but: ``past_extent`` is gone, the KV cache and ``q_window``
    have the compute dtype. Weights are copied in stripes: memory never holds the model.

    Args:
        export_dir: what ``export_model`` wrote.
        out: directory for the graphs and their data files.
        target: TensorRT that will parse them.
        compute_dtype: ``bfloat16`` or ``float16``.
        progress: told about each graph.
        kv_bits: the decoder can also attend to codes of so many bits; see :mod:`trt_packed_caches`.

    Raises:
        UsageError: the export is none, its weights have a form that TensorRT can't take, or the disk is full.
        LoweringError: a rule of the target's parser is broken.
    """
    record = read_record(export_dir)
    progress = progress or NoProgress()
    progress.start("lowering", len(GRAPHS))
    dtype, lowered = _DTYPES[compute_dtype], []
    for name in (VISION, DECODER):
        path = out / f"{name}.onnx"
        model = ir.load(export_dir / path.name)
        codes = kv_bits if name == DECODER else None
        lowered.append(_lower(model, path, target, dtype, record, codes))
        progress.advance(path.name)
    text = record.text
    sizes = {"G": text.kv_heads, "H": text.heads, "D": text.head_dim, "B": 1, "L": text.layers}
    lowered.append(_lower_compress(out / f"{COMPRESSION}.onnx", target, dtype, sizes))
    progress.advance(f"{COMPRESSION}.onnx")
    return tuple(lowered)


def _lower(
    model: ir.Model,
    path: Path,
    target: TensorRTVersion,
    dtype: ir.DataType,
    record: ExportRecord,
    kv_bits: Bits | None,
) -> LoweredGraph:
    graph = model.graph
    data = TensorFile(path.with_suffix(".data"))
    lower_plugins(model)
    expanded = expand_foreign_weights(graph, dtype, data)
    round_scales(graph, dtype, data)
    narrow_activations(model, dtype, data)
    if kv_bits is not None:
        add_packed_caches(graph, kv_bits, record.text.rotary_sections)
    lower_to_primitives(graph, record.vision.head_dim)
    remove_unused(graph)
    copy_others(graph, data)
    graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    ir.save(model, path)
    require_valid(path, target)
    return _described(path, data.path, expanded)


def _lower_compress(
    path: Path, target: TensorRTVersion, dtype: ir.DataType, sizes: dict[str, int]
) -> LoweredGraph:
    model: ir.Model = ir.from_proto(compress_model(COMPRESS, sizes, POOLING, POOLING_KERNEL))
    lower_plugins(model)
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        if value.name in _CACHES:
            value.dtype = dtype
        elif value.name == "rows":
            # As wide as a slot: a plugin's shapes follow from shapes.
            value.shape = ir.Shape([sizes["L"], sizes["B"], 1, "E"])
    graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    ir.save(model, path)
    require_valid(path, target)
    return _described(path, None, 0)


def _described(path: Path, data: Path | None, expanded: int) -> LoweredGraph:
    digest = hashlib.sha256()
    for file in (path,) if data is None else (path, data):
        for piece in _pieces(file):
            digest.update(piece)
    return LoweredGraph(path.stem, path, data, _weight_bytes(path), expanded, digest.hexdigest())


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            yield piece


def _weight_bytes(path: Path) -> int:
    """Bytes of a graph's constants, wherever they lie."""
    graph: Any = onnx.load(path, load_external_data=False).graph
    return sum(_constant_bytes(tensor) for tensor in graph.initializer)


def _constant_bytes(tensor: onnx.TensorProto) -> int:
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else onnx.numpy_helper.to_array(tensor).nbytes
