# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's small files say about special tokens."""

import base64
import json
from pathlib import Path
from typing import Any

import hub_configs
import pytest

from starkv.errors import CheckpointError
from starkv.export.side_files import copy_side_files, special_tokens
from starkv.runtime.preprocess.tokenizer import ChatTokenizer


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


def test_generation_config_knows_the_ends_of_text_best(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": [151645, 151643]})
    tokens = special_tokens(tmp_path, hub_configs.QWEN2_5_VL_7B | {"eos_token_id": 1})
    assert (tokens.image_pad, tokens.end_of_text) == (151655, [151645, 151643])


def test_config_knows_the_end_of_text_where_nothing_else_does(tmp_path: Path) -> None:
    assert special_tokens(tmp_path, hub_configs.QWEN2_VL_2B).end_of_text == [151645]
    assert special_tokens(tmp_path, hub_configs.OPENCUA_7B).end_of_text == [151644]


def test_opencuas_reply_ends_with_its_turn(tmp_path: Path) -> None:
    added = {"151644": {"content": "[EOS]"}, "151645": {"content": "<|im_end|>"}}
    write(tmp_path, "generation_config.json", {"max_length": 32768, "eos_token_id": 151644})
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    tokens = special_tokens(tmp_path, hub_configs.OPENCUA_7B)
    assert (tokens.image_pad, tokens.end_of_text) == (151664, [151645, 151644])


@pytest.mark.parametrize("field", ["image_token_id", "eos_token_id"])
def test_a_missing_token_is_named(tmp_path: Path, field: str) -> None:
    config = {key: value for key, value in hub_configs.QWEN2_5_VL_7B.items() if key != field}
    with pytest.raises(CheckpointError, match=field):
        special_tokens(tmp_path, config)


@pytest.mark.parametrize("added", [[1], {"x": {"content": "a"}}, {"1": "a"}, {"1": {}}])
def test_damaged_added_tokens_are_named(tmp_path: Path, added: Any) -> None:
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: field added_tokens_decoder is damaged"
    ):
        special_tokens(tmp_path, hub_configs.QWEN2_5_VL_7B)


# OpenCUA's: a turn begins with a token for its role, and the role again in words.
OPENCUA_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|media_begin|>image<|media_content|><|media_placeholder|><|media_end|>' }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_assistant|>assistant<|im_middle|>' }}
{%- endif -%}
"""


def test_an_opencua_checkpoint_gets_a_tokenizer_that_lays_out_its_prompt(tmp_path: Path) -> None:
    source, target = tmp_path / "checkpoint", tmp_path / "engine"
    source.mkdir()
    target.mkdir()
    lines = [f"{base64.b64encode(bytes([value])).decode()} {value}" for value in range(256)]
    (source / "tiktoken.model").write_text("\n".join([*lines, "dXNlcg== 256"]))
    (source / "tokenization_opencua.py").write_text("class TikTokenV3:\n    pat_str = r'\\s+|\\S+'\n")
    names = "im_user im_assistant im_middle im_end media_begin media_content media_placeholder media_end"
    ids = {f"<|{name}|>": 300 + index for index, name in enumerate(names.split())}
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_opencua.TikTokenV3", None]},
        "added_tokens_decoder": {str(number): {"content": name} for name, number in ids.items()},
        "chat_template": OPENCUA_TEMPLATE,
    }
    write(source, "tokenizer_config.json", config)
    write(source, "config.json", hub_configs.OPENCUA_7B)

    copy_side_files(source, target)
    tokenizer = ChatTokenizer.from_directory(target)
    parts = [{"type": "image"}, {"type": "text", "text": "Go"}]
    encoded = tokenizer.encode(tokenizer.render([{"role": "user", "content": parts}]))
    image = [304, *b"image", 305, 306, 307]
    assert encoded == [300, 256, 302, *image, *b"Go", 303, 301, *b"assistant", 302]
