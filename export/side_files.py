# SPDX-License-Identifier: Apache-2.0
"""The small files of a checkpoint that an engine needs besides the graphs, and what they say."""

import shutil
from pathlib import Path
from typing import Any

from starkv.errors import CheckpointError
from starkv.export.json_file import read_json_object
from starkv.export.tokenizer_file import added_tokens, write_tokenizer
from starkv.manifest import ImageLimits, SpecialTokens

_TOKENIZER_CONFIG = "tokenizer_config.json"
REQUIRED = ("config.json", _TOKENIZER_CONFIG)
OPTIONAL = ("preprocessor_config.json", "generation_config.json")
CHAT_TEMPLATE = "chat_template.jinja"

_END_OF_TURN = "<|im_end|>"

# The families' normalisation, for checkpoints without preprocessor_config.json.
_DEFAULT_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEFAULT_STD = (0.26862954, 0.26130258, 0.27577711)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy configs and chat template, copy or make the tokenizer.

    Raises:
        CheckpointError: a required one is missing or damaged.
    """
    for name in REQUIRED:
        if not (source / name).is_file():
            raise CheckpointError(f"{source / name} is missing; download the whole checkpoint")
        shutil.copyfile(source / name, target / name)
    for name in OPTIONAL:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    write_tokenizer(source, target, read_json_object(source / _TOKENIZER_CONFIG))
    (target / CHAT_TEMPLATE).write_text(_chat_template(source))


def _chat_template(source: Path) -> str:
    if (source / CHAT_TEMPLATE).is_file():
        return (source / CHAT_TEMPLATE).read_text()
    # Older checkpoints keep it inside a JSON file.
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json_object(source / name).get("chat_template")
        if isinstance(template, str):
            return template
    raise CheckpointError(
        f"{source} has no chat template: neither {CHAT_TEMPLATE} nor a chat_template in tokenizer_config.json"
    )


def special_tokens(source: Path, config: dict[str, Any]) -> SpecialTokens:
    """Collect the token ids; ``generation_config.json`` knows the ends of text best.

    The end of the reply's turn comes first; OpenCUA's ``generation_config.json`` doesn't mention it.

    Raises:
        CheckpointError: no end-of-text token, or the image token is missing.
    """
    text = config.get("text_config", config)
    candidates = (
        read_json_object(source / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        text.get("eos_token_id"),
    )
    ends = next((found for found in candidates if found is not None), None)
    if ends is None:
        raise CheckpointError(f"{source}: neither generation_config.json nor config.json has an eos_token_id")
    image_pad = config.get("image_token_id", config.get("media_placeholder_token_id"))
    if image_pad is None:
        raise CheckpointError(
            f"{source / 'config.json'}: field image_token_id is missing; download the file again"
        )
    ends = ends if isinstance(ends, list) else [ends]
    path = source / _TOKENIZER_CONFIG
    added = added_tokens(path, read_json_object(path))
    turn_ends = [number for number, token in added if token.content == _END_OF_TURN]
    return SpecialTokens(image_pad=image_pad, end_of_text=list(dict.fromkeys([*turn_ends, *ends])))


def image_limits(source: Path, min_pixels: int, max_pixels: int) -> ImageLimits:
    """Join the card's pixel limits with the checkpoint's normalisation."""
    preprocessor = read_json_object(source / "preprocessor_config.json")
    return ImageLimits(
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        mean=tuple(preprocessor.get("image_mean", _DEFAULT_MEAN)),
        std=tuple(preprocessor.get("image_std", _DEFAULT_STD)),
    )
