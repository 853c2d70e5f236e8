# SPDX-License-Identifier: Apache-2.0
"""An engine for ONNX Runtime → the same engine with a packed KV cache."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.export.build.files import enough_space, link_or_copy
from starkv.export.build.ort import PREPACKED_CPU, PREPACKED_RUNTIME
from starkv.export.lower.attention_weights import output_weights, projection_biases
from starkv.export.lower.ort_low_rank_kv import LowRankKvLowering
from starkv.export.lower.ort_packed_attention import PackedAttention, add_packed_attention
from starkv.export.lower.ort_quantized_kv import QuantizedKvLowering
from starkv.export.staging import staged_directory
from starkv.kv_packing.file import PACKING_NAME, Packing, save_packing
from starkv.kv_packing.options import PackingOptions
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.manifest import MANIFEST_NAME, KvPacking, Manifest, TextShape, read_manifest, seal, sha256_of

_DECODER = "decoder.onnx"


@dataclass(frozen=True)
class AttentionWeights:
    """What packing must know of a decoder's attention."""

    biases: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    """``[KV heads, D]`` of each layer's key and value projections."""
    outputs: list[NDArray[np.float32]]
    """``[hidden, Hq * D]`` of each layer's output projection."""


def attention_weights(engine: Path) -> AttentionWeights:
    """Read them from an engine.

    Raises:
        UsageError: the engine can't be packed.
        EngineError: it is none.
    """
    check_packable_engine(engine, read_manifest(engine))
    model = ir.load(engine / _DECODER)
    return AttentionWeights(projection_biases(model), output_weights(model))


def check_packable_engine(engine: Path, manifest: Manifest) -> None:
    """Refuse an engine for ONNX Runtime whose cache can't be packed.

    Raises:
        UsageError: it is for a GPU, or packed already.
    """
    if manifest.backend != "ort" or manifest.compute_dtype != "float32":
        raise UsageError(
            f"{engine} is for a GPU; packed caches run in TensorRT (`starkv build MODEL --backend trt "
            "--kv-quant int8`), and in ONNX Runtime on processors (--backend ort --device cpu)"
        )
    if manifest.kv_packing is not None:
        raise UsageError(f"{engine} has a packed cache already; pack the engine that it was made from")


def describe_packing(
    packing: Packing, options: PackingOptions, tokens: int, trained: bool = False
) -> KvPacking:
    """A packing as the manifest tells of it.

    Args:
        packing: what rows are packed with.
        options: what it was made for.
        tokens: of its calibration.
        trained: factors were trained, not calibrated.
    """
    row_bytes = sum(packing.bytes_per_row(layer) for layer in range(len(packing.layers)))
    return KvPacking(
        quant=options.quant,
        rank=options.rank,
        bytes_per_row=row_bytes,
        calibration_tokens=tokens,
        trained=trained,
    )


def pack_ort_engine(
    engine: Path, out: Path, packing: Packing, description: KvPacking, link: bool = False
) -> Manifest:
    """Write the engine directory ``out``; it appears complete or not at all.

    Args:
        engine: for ONNX Runtime on processors, not packed.
        out: an engine there is replaced; anything else is not.
        packing: what rows are packed with.
        description: of it.
        link: share files with ``engine`` by hard links where the file system can.

    Raises:
        UsageError: the engine can't be packed, ``out`` holds something else, or the disk has no room.
    """
    manifest = read_manifest(engine)
    check_packable_engine(engine, manifest)
    # The prepacked form was made from the decoder that is about to change.
    names = [name for name in manifest.files if ".prepacked." not in name]
    versions = {
        tool: version
        for tool, version in manifest.tool_versions.items()
        if tool not in (PREPACKED_RUNTIME, PREPACKED_CPU)
    }
    needed = 0 if link else sum((engine / name).stat().st_size for name in names)
    with staged_directory(out, MANIFEST_NAME) as staging, enough_space(staging, needed):
        for name in names:
            if name != _DECODER:
                link_or_copy(engine / name, staging / name, link)
        model = ir.load(engine / _DECODER)
        add_packed_attention(model, lambda model: _lowering(model, packing, manifest.text))
        ir.save(model, staging / _DECODER)
        hashes = {path.name: sha256_of(path) for path in sorted(staging.iterdir())}
        manifest = manifest.model_copy(update={"files": hashes, "tool_versions": versions})
        return write_packing(staging, manifest, packing, description)


def replace_packing(
    engine: Path, out: Path, packing: Packing, description: KvPacking, link: bool = False
) -> Manifest:
    """Write the engine directory ``out``: ``engine`` with another packing; complete or not at all.

    Args:
        engine: packed.
        out: an engine there is replaced; anything else is not.
        packing: what rows are packed with.
        description: of it.
        link: share files with ``engine`` by hard links where the file system can.

    Raises:
        UsageError: ``out`` holds something else, or the disk has no room.
    """
    manifest = read_manifest(engine)
    names = [name for name in manifest.files if name != PACKING_NAME]
    needed = 0 if link else sum((engine / name).stat().st_size for name in names)
    with staged_directory(out, MANIFEST_NAME) as staging, enough_space(staging, needed):
        for name in names:
            link_or_copy(engine / name, staging / name, link)
        return write_packing(staging, manifest, packing, description)


def write_packing(directory: Path, manifest: Manifest, packing: Packing, description: KvPacking) -> Manifest:
    """Put a packing into an engine directory, with a manifest that tells of it.

    Args:
        directory: all other files are there.
        manifest: of them.
        packing: what rows are packed with.
        description: of it.
    """
    path = directory / PACKING_NAME
    save_packing(packing, path)
    files = {**manifest.files, path.name: sha256_of(path)}
    packed = manifest.model_copy(update={"kv_packing": description, "files": files})
    (directory / MANIFEST_NAME).write_text(seal(packed))
    return packed


def _lowering(model: ir.Model, packing: Packing, text: TextShape) -> PackedAttention:
    sections = text.mrope_section or [text.head_dim // 2]
    if isinstance(packing, QuantizedPacking):
        return QuantizedKvLowering(model, packing, sections)
    return LowRankKvLowering(model, packing, sections)
