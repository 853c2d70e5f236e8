# SPDX-License-Identifier: Apache-2.0
"""The small files of a checkpoint that an engine needs besides the graphs, and what they say."""

import json
import shutil
from pathlib import Path
from typing import Any

from starkv.errors import CheckpointError
from starkv.manifest import ImageLimits, SpecialTokens

REQUIRED = ("config.json", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("preprocessor_config.json", "generation_config.json")
CHAT_TEMPLATE = "chat_template.jinja"

# The family's normalisation, for checkpoints without preprocessor_config.json.
_DEFAULT_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEFAULT_STD = (0.26862954, 0.26130258, 0.27577711)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, configs and chat template.

    Raises:
        CheckpointError: a required one is missing.
    """
    for name in REQUIRED:
        if not (source / name).is_file():
            raise CheckpointError(f"{source / name} is missing; download the whole checkpoint")
        shutil.copyfile(source / name, target / name)
    for name in OPTIONAL:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    (target / CHAT_TEMPLATE).write_text(_chat_template(source))


def _chat_template(source: Path) -> str:
    if (source / CHAT_TEMPLATE).is_file():
        return (source / CHAT_TEMPLATE).read_text()
    # Older checkpoints keep it inside a JSON file.
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _read_json(source / name).get("chat_template")
        if isinstance(template, str):
            return template
    raise CheckpointError(
        f"{source} has no chat template: neither {CHAT_TEMPLATE} nor a chat_template in tokenizer_config.json"
    )


def special_tokens(source: Path, config: dict[str, Any]) -> SpecialTokens:
    """Collect the token ids; ``generation_config.json`` knows the ends of text best.

    Raises:
        CheckpointError: no end-of-text token, or an image token is missing.
    """
    text = config.get("text_config", config)
    candidates = (
        _read_json(source / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        text.get("eos_token_id"),
    )
    ends = next((found for found in candidates if found is not None), None)
    if ends is None:
        raise CheckpointError(f"{source}: neither generation_config.json nor config.json has an eos_token_id")
    try:
        return SpecialTokens(
            image_pad=config["image_token_id"],
            vision_start=config["vision_start_token_id"],
            vision_end=config["vision_end_token_id"],
            end_of_text=ends if isinstance(ends, list) else [ends],
        )
    except KeyError as error:
        raise CheckpointError(f"{source / 'config.json'}: field {error.args[0]} is missing") from None


def image_limits(source: Path, min_pixels: int, max_pixels: int) -> ImageLimits:
    """Join the card's pixel limits with the checkpoint's normalisation."""
    preprocessor = _read_json(source / "preprocessor_config.json")
    return ImageLimits(
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        mean=tuple(preprocessor.get("image_mean", _DEFAULT_MEAN)),
        std=tuple(preprocessor.get("image_std", _DEFAULT_STD)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Parse an optional JSON object; a missing file is empty."""
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return parsed
