# SPDX-License-Identifier: Apache-2.0
"""Chat rendering, tokenizing and streaming, against transformers where there is something to compare."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from starkv.errors import EngineError, UsageError
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, expand_image_tokens

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
SPECIAL += ["<|box_start|>", "<|box_end|>"]

TEMPLATE = """\
{%- if messages[0].role != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{% for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- endif %}
    {%- if message.hidden %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
    {% if message.content is string %}
{{ message.content }}<|im_end|>
    {% else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part %}
<|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in part %}
{{ part.text }}
            {%- else %}
{{ part | tojson }}
            {%- endif %}
        {%- endfor %}
<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
{{- eos_token if false }}
"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Click the blue button."}],
    [
        {"role": "system", "content": "You are a GUI agent."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Où est « Valider » ?\n"}]},
        {"role": "assistant", "content": "Action: click(start_box='<|box_start|>(1,2)<|box_end|>')"},
        {"role": "user", "content": [{"type": "text", "text": "再来一次 🙂"}, {"type": "image"}]},
    ],
    [{"role": "user", "content": [{"type": "tool", "payload": {"é": "<b>", "n": 1}}]}],
    [{"role": "user", "content": "x", "hidden": True}, {"role": "user", "content": "  spaces \n\n"}],
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory's tokenizer files: byte-level BPE like Qwen's, trained on a few lines."""
    folder = tmp_path_factory.mktemp("engine")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        ["click the blue button", "Action: click(start_box='(1,2)')", "Où est 🙂"], trainer
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "<|im_end|>"}})
    )
    return folder


@pytest.fixture(scope="module")
def chat(directory: Path) -> ChatTokenizer:
    return ChatTokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), chat_template=TEMPLATE, eos_token="<|im_end|>"
    )


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_and_ids_equal_transformers(
    chat: ChatTokenizer, reference: Any, messages: list[dict[str, Any]], prompt: bool
) -> None:
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    rendered = chat.render(messages, add_generation_prompt=prompt)
    assert rendered == expected
    expected_ids = reference(expected, add_special_tokens=False)["input_ids"]
    assert chat.encode(rendered) == expected_ids
    for skip in (True, False):
        assert chat.decode(expected_ids, skip) == reference.decode(expected_ids, skip_special_tokens=skip)


def test_expanding_ids_equals_expanding_the_text(chat: ChatTokenizer) -> None:
    """HF's processor repeats the placeholder in the text; counts of 0 and 1 are as good as any."""
    rendered = chat.render(CONVERSATIONS[1])
    pieces = rendered.split("<|image_pad|>")
    text = pieces[0] + "<|image_pad|>" * 5 + pieces[1] + "<|image_pad|>" + pieces[2]
    pad = chat.token_id("<|image_pad|>")
    assert expand_image_tokens(chat.encode(rendered), pad, [5, 1]) == chat.encode(text)


@pytest.mark.parametrize("counts", [[], [3], [3, 3, 3]])
def test_images_and_placeholders_must_match(chat: ChatTokenizer, counts: list[int]) -> None:
    ids = chat.encode(chat.render(CONVERSATIONS[1]))
    with pytest.raises(UsageError, match=f"2 image placeholders for {len(counts)} images"):
        expand_image_tokens(ids, chat.token_id("<|image_pad|>"), counts)


def test_a_refusal_of_the_template_is_a_usage_error(chat: ChatTokenizer) -> None:
    with pytest.raises(UsageError, match="unknown role robot"):
        chat.render([{"role": "robot", "content": "beep"}])
    with pytest.raises(UsageError, match="refuses"):
        chat.render([{"role": "user", "content": 5}])


def test_templates_reach_special_tokens_but_no_objects(tmp_path: Path, directory: Path) -> None:
    class Rich:
        def __getattr__(self, name: str) -> str:
            raise AssertionError(f"the template reached {name}")

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages[0].image }}{{ eos_token }}")
    assert ChatTokenizer.from_directory(tmp_path).render([{"image": Rich()}]) == "<Rich><|im_end|>"
    template.write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(UsageError, match="unsafe"):
        ChatTokenizer.from_directory(tmp_path).render([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "can't be read"),
        ("chat_template.jinja", None, "missing"),
        ("chat_template.jinja", b"{% for %}", "not a template"),
        ("tokenizer_config.json", b"[1]", "not a JSON object"),
        ("tokenizer_config.json", b"{", "not a JSON object"),
    ],
)
def test_damaged_directories_are_named(
    tmp_path: Path, directory: Path, name: str, content: bytes | None, message: str
) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EngineError, match=message) as caught:
        ChatTokenizer.from_directory(tmp_path)
    assert name in str(caught.value)


def test_an_unknown_token_is_named(chat: ChatTokenizer) -> None:
    with pytest.raises(EngineError, match="no token '<absent>'"):
        chat.token_id("<absent>")


def test_streaming_holds_a_character_back_until_it_is_whole(chat: ChatTokenizer) -> None:
    ids = chat.encode("é再")
    assert len(ids) > 2, "the tokenizer is meant to split these characters"
    stream = chat.stream()
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["é", "再"]
    assert stream.finish() == ""


def test_half_a_character_comes_out_at_the_end_only(chat: ChatTokenizer) -> None:
    ids = chat.encode("ok 再")[:-1]
    stream = chat.stream()
    assert "".join(stream.push(token) for token in ids) == "ok "
    assert stream.finish() == "\ufffd"


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=40))
def test_streamed_text_is_the_text(chat: ChatTokenizer, text: str) -> None:
    ids = chat.encode(text)
    stream = chat.stream(skip_special_tokens=False)
    assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == chat.decode(ids, False)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_streaming_arbitrary_tokens_equals_decoding_them_at_once(
    chat: ChatTokenizer, data: st.DataObject, skip: bool
) -> None:
    """A model may emit bytes that are no UTF-8 at all; nothing may be lost, doubled or split."""
    last = chat.token_id("<|box_end|>")
    ids = data.draw(st.lists(st.integers(0, last), max_size=30))
    stream = chat.stream(skip_special_tokens=skip)
    pieces = [stream.push(token) for token in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == chat.decode(ids, skip)
