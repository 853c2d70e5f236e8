# SPDX-License-Identifier: Apache-2.0
"""Names everything that an export depends on, so that a finished or interrupted one is recognised."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir

import starkv
from starkv.export.cards import ModelCard
from starkv.export.quantize.presets import Preset
from starkv.export.record import Route

_LARGE = 64 << 20


def export_fingerprint(folder: Path, card: ModelCard, preset: Preset, route: Route, calibration: str) -> str:
    """sha256 over the checkpoint, the options and the versions of what writes.

    Small files count with their content, weights with name, size and time of change: reading them would take
    as long as exporting them.

    Args:
        folder: checkpoint.
        card: as exported.
        preset: as exported.
        route: as exported.
        calibration: digest of the calibration prompts, or nothing.
    """
    files = {path.name: _identity(path) for path in sorted(folder.iterdir()) if path.is_file()}
    inputs = {
        "files": files,
        "card": card.model_dump(mode="json"),
        "preset": repr(preset),
        "route": route,
        "calibration": calibration,
        "versions": [starkv.__version__, ir.__version__, np.__version__],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _identity(path: Path) -> str:
    status = path.stat()
    if status.st_size > _LARGE or path.suffix == ".safetensors":
        return f"{status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
