# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


@dataclass(frozen=True)
class TinyModel:
    """A small random Qwen2.5-VL: PyTorch model, checkpoint, its exports and ONNX Runtime engine."""

    model: "Qwen2_5_VLForConditionalGeneration"
    checkpoint: Path
    exports: dict[str, Path]
    """Preset → export directory."""
    engine: Path
    """Engine of the fp32 export."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Make the tiny model once; tests must not change its files or weights."""
    for package in ("torch", "transformers", "onnx_ir", "onnxruntime"):
        pytest.importorskip(package)
    from tiny_model import make_tiny_model, tiny_card

    from starkv.export.build.ort import build_ort_engine
    from starkv.export.export_model import export_model
    from starkv.export.quantize.presets import PRESETS

    root = tmp_path_factory.mktemp("tiny")
    model = make_tiny_model(root / "checkpoint")
    exports = {name: root / name for name in PRESETS}
    for name, out in exports.items():
        export_model(root / "checkpoint", tiny_card(), out, PRESETS[name])
    build_ort_engine(exports["fp32"], root / "engine")
    return TinyModel(model, root / "checkpoint", exports, root / "engine")
