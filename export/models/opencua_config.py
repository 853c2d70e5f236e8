# SPDX-License-Identifier: Apache-2.0
"""``config.json`` of OpenCUA: Qwen2.5-VL's tower before a Qwen2 decoder with one-dimensional RoPE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starkv.export.models.config import ModelConfig, read_config
from starkv.export.models.qwen2_5_vl_config import tower_problems, vision_shape


def parse_config(config: dict[str, Any], path: Path) -> ModelConfig:
    """Read the sizes out of a parsed ``config.json``; ``path`` is named in errors.

    Raises:
        CheckpointError: a field is missing, or asks for something that the graphs don't do.
    """
    return read_config(config, path, vision_shape, _problems)


def _problems(vision: Mapping[str, Any], parsed: ModelConfig) -> dict[str, bool]:
    return {
        **tower_problems(vision, parsed),
        "rope_scaling has an mrope_section, which OpenCUA's decoder hasn't": (
            parsed.text.mrope_section is not None
        ),
    }
