# SPDX-License-Identifier: Apache-2.0
"""``config.json`` of the Qwen2-VL family, UI-TARS-2B and 7B among them.

Its ``vision_config`` is not what the names suggest: the tower's width is ``embed_dim``, and ``hidden_size``
is the text decoder's.
"""

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
    return read_config(config, path, _vision_shape, _problems)


def _vision_shape(vision: Mapping[str, Any]) -> VisionShape:
    depth, hidden = vision.get("depth", 32), vision.get("embed_dim", 1280)
    return VisionShape(
        depth=depth,
        hidden=hidden,
        intermediate=int(hidden * vision.get("mlp_ratio", 4)),
        heads=vision.get("num_heads", 16),
        patch_size=vision.get("patch_size", 14),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        window_size=None,
        full_attention_blocks=list(range(depth)),
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    )


def _problems(vision: Mapping[str, Any], parsed: ModelConfig) -> dict[str, bool]:
    activation = vision.get("hidden_act", "quick_gelu")
    outputs = vision.get("hidden_size", parsed.text.hidden)
    channels = vision.get("in_channels", vision.get("in_chans", IMAGE_CHANNELS))
    return {
        f"vision hidden_act is {activation}, not quick_gelu": activation != "quick_gelu",
        f"vision hidden_size is {outputs}, not the text's hidden_size {parsed.text.hidden}": (
            outputs != parsed.text.hidden
        ),
        f"images have {channels} channels, not {IMAGE_CHANNELS}": channels != IMAGE_CHANNELS,
        "rope_scaling has no mrope_section": parsed.text.mrope_section is None,
    }
