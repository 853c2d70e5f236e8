# SPDX-License-Identifier: Apache-2.0
"""``config.json`` of the Qwen2.5-VL family, as older files on the Hub or transformers today spell it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from starkv.errors import CheckpointError
from starkv.manifest import TextShape, VisionShape

VISION_NORM_EPSILON = 1e-6
"""The vision tower's norms have a fixed epsilon that no config mentions."""
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class Qwen25VLConfig:
    """Everything the graphs depend on."""

    text: TextShape
    vision: VisionShape
    norm_epsilon: float
    """Epsilon of the text decoder's RMSNorm."""


def parse_config(config: dict[str, Any], path: Path) -> Qwen25VLConfig:
    """Read the sizes out of a parsed ``config.json``; ``path`` is named in errors.

    Raises:
        CheckpointError: a field is missing, or asks for something that the graphs don't do.
    """
    text = config.get("text_config", config)
    vision = config.get("vision_config", {})
    try:
        parsed = Qwen25VLConfig(
            text=_text_shape(text, config),
            vision=_vision_shape(vision),
            norm_epsilon=float(text["rms_norm_eps"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: field {error.args[0]} is missing; download the file again") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: field {first['loc'][0]}: {first['msg']}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: a size is no number ({error})") from None
    _refuse_unsupported(text, vision, parsed, path)
    return parsed


def _text_shape(text: dict[str, Any], config: dict[str, Any]) -> TextShape:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    head_dim = hidden // heads
    return TextShape(
        layers=text["num_hidden_layers"],
        hidden=hidden,
        intermediate=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab=text["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
        mrope_section=rope["mrope_section"],
        max_positions=text["max_position_embeddings"],
        tied_embedding=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    )


def _vision_shape(vision: dict[str, Any]) -> VisionShape:
    # Some published configs leave out every field that has the family's usual value.
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


def _refuse_unsupported(
    text: dict[str, Any], vision: dict[str, Any], parsed: Qwen25VLConfig, path: Path
) -> None:
    shape, tower = parsed.text, parsed.vision
    rope_type = (text.get("rope_parameters") or {}).get("rope_type", "default")
    problems = {
        "use_sliding_window is on": bool(text.get("use_sliding_window")),
        f"hidden_act is {text.get('hidden_act')}, not silu": text.get("hidden_act", "silu") != "silu",
        f"vision hidden_act is {vision.get('hidden_act')}, not silu": vision.get("hidden_act", "silu")
        != "silu",
        f"rope_type is {rope_type}, not default": rope_type not in ("default", "mrope"),
        "num_attention_heads does not divide hidden_size": shape.hidden % shape.heads != 0,
        "num_key_value_heads does not divide num_attention_heads": shape.heads % shape.kv_heads != 0,
        "mrope_section does not add up to half a head": 2 * sum(shape.mrope_section or []) != shape.head_dim,
        "vision num_heads does not divide hidden_size": tower.hidden % tower.heads != 0,
        "window_size is no multiple of a merged patch": (
            tower.window_size % (tower.patch_size * tower.spatial_merge_size) != 0
        ),
    }
    for problem, present in problems.items():
        if present:
            raise CheckpointError(f"{path}: {problem}; starkv has no graph for such a model")
