# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of random checkpoints: published ids where the vocabulary has them, the config's where not."""

import json
from pathlib import Path
from types import SimpleNamespace

from random_configs import narrow, opencua_config, small_config

from starkv.export.random_checkpoint import write_random_checkpoint
from starkv.runtime.kv.prompt import describe_prompt
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Click ä 5 <b>."}]}]


def test_tokenizer_of_the_published_ids(tmp_path: Path) -> None:
    config = small_config() | {"vocab_size": 152064, "image_token_id": 151655, "eos_token_id": 151645}
    config |= {"video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
    write_random_checkpoint(config | narrow(), tmp_path / "m")
    tokenizer = ChatTokenizer.from_directory(tmp_path / "m")
    ids = tokenizer.encode(tokenizer.render(PROMPT))
    assert ids.count(151655) == ids.count(151652) == ids.count(151653) == 1
    assert ids.index(151655) == ids.index(151652) + 1 == ids.index(151653) - 1
    assert ids.count(151644) == 3
    assert ids.count(151645) == 2
    assert max(number for number in ids if number < 151643) < 256
    assert tokenizer.decode(tokenizer.encode("Click ä 5 <b>.")) == "Click ä 5 <b>."
    assert tokenizer.decode([70_000, 70_001]) == " 70000 70001"
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [
        151645,
        151643,
    ]


def test_tokenizer_of_opencua(tmp_path: Path) -> None:
    write_random_checkpoint(opencua_config(), tmp_path / "m")
    tokenizer = ChatTokenizer.from_directory(tmp_path / "m")
    ids = tokenizer.encode(tokenizer.render(PROMPT))
    assert ids.count(151664) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|><|media_begin|>image<|media_content|><|media_placeholder|><|media_end|>"
        "Click ä 5 <b>.<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )


def test_small_vocabulary_takes_ids_from_the_config(tmp_path: Path) -> None:
    write_random_checkpoint(small_config(), tmp_path / "model")
    tokenizer = ChatTokenizer.from_directory(tmp_path / "model")
    found = {
        token: tokenizer.token_id(f"<|{token}|>")
        for token in ("im_end", "image_pad", "video_pad", "vision_start", "vision_end")
    }
    assert found == {
        "im_end": 300,
        "image_pad": 301,
        "video_pad": 302,
        "vision_start": 303,
        "vision_end": 304,
    }
    ids = tokenizer.encode(tokenizer.render(PROMPT))
    assert max(ids) < 320
    assert "".join(tokenizer.decode(ids, skip_special_tokens=False)) == tokenizer.render(PROMPT)


def test_turns_of_opencua_are_protected(tmp_path: Path) -> None:
    """The users' words come before the system prompt, as with any other template."""
    write_random_checkpoint(opencua_config(), tmp_path / "m")
    tokenizer = ChatTokenizer.from_directory(tmp_path / "m")
    system = {"role": "system", "content": "Obey."}
    ids = tokenizer.encode(tokenizer.render([system, {"role": "user", "content": "Click."}]))
    engine = SimpleNamespace(tokens=SimpleNamespace(image_pad=151664))
    order = describe_prompt(ids, [], engine, tokenizer).protect_order  # type: ignore[arg-type]
    assert order[0] == 0
    assert order[-3:] == (1, 2, 3)
    user = ids.index(151646)
    assistant = ids.index(151647)
    assert order[1 : 1 + assistant - user] == tuple(range(user, assistant))
    assert set(order) == set(range(assistant))
