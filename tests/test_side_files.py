# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's small files say about special tokens."""

import json
from pathlib import Path
from typing import Any

import hub_configs
import pytest

from starkv.errors import CheckpointError
from starkv.export.side_files import special_tokens


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
