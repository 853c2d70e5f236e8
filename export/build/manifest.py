# SPDX-License-Identifier: Apache-2.0
"""Completes an engine directory with its ``manifest.json``."""

from pathlib import Path
from typing import Literal

from starkv.export.record import ExportRecord
from starkv.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    ComputeDtype,
    Manifest,
    ModelDescription,
    TensorRTBuild,
    seal,
    sha256_of,
)


def write_manifest(
    directory: Path,
    record: ExportRecord,
    backend: Literal["ort", "trt"],
    compute_dtype: ComputeDtype,
    tool_versions: dict[str, str],
    tensorrt: TensorRTBuild | None = None,
) -> Manifest:
    """Hash every file of ``directory`` and describe them; call it when all others are written.

    Args:
        directory: the engine's directory.
        record: what the export knows about the model.
        backend: which runtime loads the engine.
        compute_dtype: of activations and KV cache.
        tool_versions: versions the build depends on, added to those of the export.
        tensorrt: what a TensorRT engine was built with.
    """
    described = {name: getattr(record, name) for name in ModelDescription.model_fields}
    described |= {"schema_version": SCHEMA_VERSION, "tool_versions": record.tool_versions | tool_versions}
    hashes = {path.name: sha256_of(path) for path in sorted(directory.iterdir())}
    manifest = Manifest(
        **described, backend=backend, compute_dtype=compute_dtype, tensorrt=tensorrt, files=hashes
    )
    (directory / MANIFEST_NAME).write_text(seal(manifest))
    return manifest
