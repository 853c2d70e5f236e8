# SPDX-License-Identifier: Apache-2.0
"""What the graphs need to know of a ``config.json``, and the reading that all families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from starkv.errors import CheckpointError
from starkv.manifest import TextShape, VisionShape

IMAGE_CHANNELS = 3
VISION_NORM_EPSILON = 1e-6
"""The towers' norms have a fixed epsilon that no config mentions."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything the graphs depend on."""

    text: TextShape
    vision: VisionShape
    norm_epsilon: float
    """Epsilon of the text decoder's RMSNorm."""


def read_config(
    config: Mapping[str, Any],
    path: Path,
    vision_shape: Callable[[Mapping[str, Any]], VisionShape],
    problems: Callable[[Mapping[str, Any], ModelConfig], Mapping[str, bool]],
) -> ModelConfig:
    """Read the sizes out of a parsed ``config.json``.

    Args:
        config: the text decoder's fields lie in ``text_config`` or, in older files, beside ``vision_config``.
        path: named in errors.
        vision_shape: reads a family's ``vision_config``.
        problems: a family's own reasons to refuse (description → whether it applies), from ``vision_config``
            and what was read.

    Raises:
        CheckpointError: a field is missing, or asks for something that the graphs don't do.
    """
    text = config.get("text_config", config)
    vision = config.get("vision_config", {})
    try:
        parsed = ModelConfig(
            text=_text_shape(text, config),
            vision=vision_shape(vision),
            norm_epsilon=float(text["rms_norm_eps"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: field {error.args[0]} is missing; download the file again") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: field {first['loc'][0]}: {first['msg']}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: a size is no number ({error})") from None
    except ZeroDivisionError:
        raise CheckpointError(f"{path}: num_attention_heads is 0; download the file again") from None
    for problem, present in {**_text_problems(text, parsed), **problems(vision, parsed)}.items():
        if present:
            raise CheckpointError(f"{path}: {problem}; starkv has no graph for such a model")
    return parsed


def _text_shape(text: Mapping[str, Any], config: Mapping[str, Any]) -> TextShape:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return TextShape(
        layers=text["num_hidden_layers"],
        hidden=hidden,
        intermediate=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        vocab=text["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
        mrope_section=rope.get("mrope_section"),
        max_positions=text["max_position_embeddings"],
        tied_embedding=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    )


def _text_problems(text: Mapping[str, Any], parsed: ModelConfig) -> dict[str, bool]:
    shape, tower = parsed.text, parsed.vision
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    sections = shape.mrope_section
    return {
        "use_sliding_window is on": bool(text.get("use_sliding_window")),
        f"hidden_act is {text.get('hidden_act')}, not silu": text.get("hidden_act", "silu") != "silu",
        f"rope_type is {rope_type}, not default": rope_type not in ("default", "mrope"),
        "num_attention_heads does not divide hidden_size": (
            not text.get("head_dim") and shape.hidden % shape.heads != 0
        ),
        "num_key_value_heads does not divide num_attention_heads": shape.heads % shape.kv_heads != 0,
        "mrope_section does not add up to half a head": (
            sections is not None and 2 * sum(sections) != shape.head_dim
        ),
        "vision num_heads does not divide its width": tower.hidden % tower.heads != 0,
    }
