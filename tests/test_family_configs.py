# SPDX-License-Identifier: Apache-2.0
"""Sizes of the published models are read off their ``config.json``; what no graph computes is refused."""

from pathlib import Path
from typing import Any

import hub_configs
import pytest

from starkv.errors import CheckpointError
from starkv.export.models.config import ModelConfig
from starkv.export.models.families import family_of

PATH = Path("config.json")


def parse(config: dict[str, Any]) -> ModelConfig:
    return family_of(config, PATH).parse_config(config, PATH)


def with_vision(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return config | {"vision_config": config["vision_config"] | changes}


def with_text(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return config | {"text_config": config["text_config"] | changes}


def test_qwen2_5_vl() -> None:
    config = parse(hub_configs.QWEN2_5_VL_7B)
    assert config.text.model_dump() == {
        "layers": 28,
        "hidden": 3584,
        "intermediate": 18944,
        "heads": 28,
        "kv_heads": 4,
        "head_dim": 128,
        "vocab": 152064,
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
        "max_positions": 128000,
        "tied_embedding": False,
    }
    assert config.vision.model_dump() == {
        "depth": 32,
        "hidden": 1280,
        "intermediate": 3420,
        "heads": 16,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "full_attention_blocks": [7, 15, 23, 31],
        "rope_theta": 10000.0,
    }
    assert config.norm_epsilon == 1e-6


@pytest.mark.parametrize(
    "config", [hub_configs.QWEN2_VL_2B, hub_configs.UI_TARS_7B], ids=["2B", "UI-TARS-7B"]
)
def test_qwen2_vl_has_no_windows_and_a_tower_of_its_own_width(config: dict[str, Any]) -> None:
    vision = parse(config).vision
    assert (vision.hidden, vision.intermediate, vision.heads, vision.depth) == (1280, 5120, 16, 32)
    assert vision.window_size is None
    assert vision.full_attention_blocks == list(range(32))


def test_only_the_small_qwen2_vl_ties_its_head() -> None:
    assert parse(hub_configs.QWEN2_VL_2B).text.tied_embedding
    assert not parse(hub_configs.UI_TARS_7B).text.tied_embedding


def test_opencua_is_qwen2_5_vl_with_one_dimensional_positions() -> None:
    opencua, qwen = parse(hub_configs.OPENCUA_7B), parse(hub_configs.QWEN2_5_VL_7B)
    assert opencua.vision == qwen.vision
    assert opencua.text == qwen.text.model_copy(update={"mrope_section": None})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hub_configs.QWEN2_5_VL_7B | {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_type is yarn"),
        (hub_configs.QWEN2_5_VL_7B | {"rope_scaling": None}, "rope_scaling has no mrope_section"),
        (
            with_vision(hub_configs.QWEN2_5_VL_7B, out_hidden_size=2048),
            "out_hidden_size is 2048, not .* 3584",
        ),
        (with_vision(hub_configs.QWEN2_5_VL_7B, window_size=None), "window_size is no multiple"),
        (
            with_vision(hub_configs.QWEN2_VL_2B, hidden_act="gelu"),
            "vision hidden_act is gelu, not quick_gelu",
        ),
        (with_vision(hub_configs.QWEN2_VL_2B, hidden_size=3584), "vision hidden_size is 3584, not .* 1536"),
        (with_vision(hub_configs.QWEN2_VL_2B, in_chans=1), "images have 1 channels, not 3"),
        (with_vision(hub_configs.QWEN2_VL_2B, num_heads=7), "vision num_heads does not divide"),
        (hub_configs.QWEN2_VL_2B | {"rope_scaling": {}}, "rope_scaling has no mrope_section"),
        (
            with_text(hub_configs.OPENCUA_7B, rope_scaling={"mrope_section": [16, 24, 24]}),
            "OpenCUA's decoder",
        ),
        (with_text(hub_configs.OPENCUA_7B, use_sliding_window=True), "use_sliding_window is on"),
        (hub_configs.QWEN2_VL_2B | {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ],
)
def test_what_no_graph_computes_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        parse(config)
