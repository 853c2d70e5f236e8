# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and chat template of a random checkpoint: bytes for text, special tokens at the model's ids.

Ids that are neither decode to their own number, so the nonsense that random weights say can be seen.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from starkv.errors import CheckpointError

# Ids of the published tokenizers.
_QWEN_TOKENS = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
)
_QWEN_IDS = {f"<|{name}|>": number for number, name in enumerate(_QWEN_TOKENS.split(), start=151643)}
_OPENCUA_IDS = {
    "[BOS]": 151643,
    "[EOS]": 151644,
    "<|im_end|>": 151645,
    "<|im_user|>": 151646,
    "<|im_assistant|>": 151647,
    "<|im_system|>": 151653,
    "<|im_middle|>": 151660,
    "<|media_begin|>": 151661,
    "<|media_content|>": 151662,
    "<|media_end|>": 151663,
    "<|media_placeholder|>": 151664,
}
# Field of config.json → the token that has this id.
_QWEN_FIELDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "eos_token_id": "<|im_end|>",
}
_OPENCUA_FIELDS = {
    "media_placeholder_token_id": "<|media_placeholder|>",
    "vision_start_token_id": "<|media_begin|>",
    "vision_end_token_id": "<|media_end|>",
}
_QWEN_NEEDED = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)


def _chat_template(default: str, begin: str, image: str, end: str) -> str:
    """A chat template like those on the Hub.

    Args:
        default: system prompt of a conversation without one.
        begin: of a turn, with ``ROLE`` for its role.
        image: what stands for an image.
        end: of a turn.
    """
    turn = "{{- '" + begin.replace("ROLE", "' + message['role'] + '") + "' -}}"
    system, assistant = (begin.replace("ROLE", role) for role in ("system", "assistant"))
    return f"""\
{{%- if messages[0]['role'] != 'system' -%}}
{{{{- '{system}{default}{end}' -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
{turn}
{{%- if message['content'] is string -%}}
{{{{- message['content'] -}}}}
{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' or part['type'] == 'image_url' -%}}
{{{{- '{image}' -}}}}
{{%- elif part['type'] == 'text' -%}}
{{{{- part['text'] -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- '{end}' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- '{assistant}' -}}}}
{{%- endif -%}}
"""


_QWEN_TEMPLATE = _chat_template(
    "You are a helpful assistant.",
    "<|im_start|>ROLE\\n",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|im_end|>\\n",
)
_OPENCUA_TEMPLATE = _chat_template(
    "You are a helpful assistant",
    "<|im_ROLE|>ROLE<|im_middle|>",
    "<|media_begin|>image<|media_content|><|media_placeholder|><|media_end|>",
    "<|im_end|>",
)


def special_token_ids(config: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens and their ids: those of the published tokenizer, or what ``config`` says.

    A vocabulary that is too small for the published ids gets the tokens that a prompt needs: where ``config``
    has them, else at its end.

    Raises:
        CheckpointError: the vocabulary has no room for 256 bytes and the special tokens.
    """
    text = config.get("text_config") or config
    vocabulary = int(text["vocab_size"])
    opencua = "media_placeholder_token_id" in config
    published = _OPENCUA_IDS if opencua else _QWEN_IDS
    needed = tuple(_OPENCUA_IDS) if opencua else _QWEN_NEEDED
    fields = _OPENCUA_FIELDS if opencua else _QWEN_FIELDS
    named = {token: config.get(field, text.get(field)) for field, token in fields.items()}
    ids = {token: number for token, number in named.items() if isinstance(number, int)}
    if vocabulary > max(published.values()):
        ids = published | ids
    free = (number for number in range(vocabulary - 1, -1, -1) if number not in set(ids.values()))
    for token in needed:
        if token not in ids:
            ids[token] = next(free, -1)
    if len(set(ids.values())) < len(ids) or vocabulary < 256 + len(ids) or min(ids.values()) < 0:
        raise CheckpointError(
            f"config.json: a vocabulary of {vocabulary} has no room for 256 bytes and {len(ids)} special "
            "tokens with ids of their own; choose a larger vocab_size"
        )
    return ids


def end_of_text(ids: Mapping[str, int]) -> list[int]:
    """Ids that end a reply."""
    return [ids[token] for token in ("<|im_end|>", "<|endoftext|>", "[EOS]") if token in ids]


def write_tokenizer(config: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template; returns the special tokens.

    Raises:
        CheckpointError: as :func:`special_token_ids`.
    """
    special = special_token_ids(config)
    size = int((config.get("text_config") or config)["vocab_size"])
    taken = set(special.values())
    plain = (number for number in range(size) if number not in taken)
    # Sorted, the alphabet is in the order of the published vocabularies.
    vocabulary = {character: next(plain) for character in sorted(pre_tokenizers.ByteLevel.alphabet())}
    # "Ġ" stands for a space. No text becomes these tokens, because there are no merges.
    vocabulary |= {f"Ġ{number}": number for number in plain} | special
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
    )
    opencua = "<|media_placeholder|>" in special
    (folder / "chat_template.jinja").write_text(_OPENCUA_TEMPLATE if opencua else _QWEN_TEMPLATE)
    return special
