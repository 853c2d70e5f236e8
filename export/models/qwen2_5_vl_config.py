# SPDX-License-Identifier: Apache-2.0
"""``config.json`` of the Qwen2.5-VL family, as older files on the Hub or transformers today spell it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starkv.export.models.config import IMAGE_CHANNELS, ModelConfig, read_config
from starkv.manifest import VisionShape


def parse_config(config: dict[str, Any], path: Path) -> ModelConfig:
    """Read the sizes out of a parsed ``config.json``; ``path`` is named in errors.

    Raises:
        CheckpointError: a field is missing, or asks for something that the graphs don't do.
    """

    def problems(vision: Mapping[str, Any], parsed: ModelConfig) -> dict[str, bool]:
        return {
            **tower_problems(vision, parsed),
            "rope_scaling has no mrope_section": parsed.text.mrope_section is None,
        }

    return read_config(config, path, vision_shape, problems)


def vision_shape(vision: Mapping[str, Any]) -> VisionShape:
    """Read a ``vision_config``; some published ones leave out whatever has the family's usual value."""
    return VisionShape(
        depth=vision.get("depth", 32),
        hidden=vision["hidden_size"],
        intermediate=vision.get("intermediate_size", 3420),
        heads=vision.get("num_heads", 16),
        patch_size=vision.get("patch_size", 14),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        window_size=vision.get("window_size", 112),
        full_attention_blocks=vision.get("fullatt_block_indexes", [7, 15, 23, 31]),
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    )


def tower_problems(vision: Mapping[str, Any], parsed: ModelConfig) -> dict[str, bool]:
    """What a ``vision_config`` may ask for that the tower's graph doesn't do."""
    tower = parsed.vision
    activation = vision.get("hidden_act", "silu")
    outputs = vision.get("out_hidden_size", parsed.text.hidden)
    channels = vision.get("in_channels", vision.get("in_chans", IMAGE_CHANNELS))
    return {
        f"vision hidden_act is {activation}, not silu": activation != "silu",
        f"vision out_hidden_size is {outputs}, not the text's hidden_size {parsed.text.hidden}": (
            outputs != parsed.text.hidden
        ),
        f"images have {channels} channels, not {IMAGE_CHANNELS}": channels != IMAGE_CHANNELS,
        "window_size is no multiple of a merged patch": (
            tower.window_size is None
            or tower.window_size % (tower.patch_size * tower.spatial_merge_size) != 0
        ),
    }
