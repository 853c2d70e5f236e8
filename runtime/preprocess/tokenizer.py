# SPDX-License-Identifier: Apache-2.0
"""Chat template and tokenizer of an engine directory, without transformers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from starkv.errors import EngineError, UsageError

Message = Mapping[str, object]
"""``{"role": …, "content": …}``; content is text or a list of ``{"type": "text" | "image", …}`` parts."""

_REPLACEMENT = "\ufffd"


class ChatTokenizer:
    """Turns messages into token ids and back."""

    def __init__(self, tokenizer: Tokenizer, template: Template, special_tokens: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_directory(cls, directory: Path) -> "ChatTokenizer":
        """Read ``tokenizer.json``, ``chat_template.jinja`` and, if it is there, ``tokenizer_config.json``.

        Raises:
            EngineError: a file is missing or can't be parsed.
        """
        tokenizer_path = directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(_read_text(tokenizer_path))
        except EngineError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise EngineError(
                f"{tokenizer_path} is not a tokenizer: {error}; build the engine again"
            ) from None
        template_path = directory / "chat_template.jinja"
        try:
            template = _environment().from_string(_read_text(template_path))
        except TemplateError as error:
            raise EngineError(f"{template_path} is not a template: {error}; build the engine again") from None
        return cls(tokenizer, template, _special_tokens(directory / "tokenizer_config.json"))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Lay the conversation out as the model was trained to see it.

        Raises:
            UsageError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt; adds no tokens, the template has them all."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int:
        """Id of one token of the vocabulary.

        Raises:
            EngineError: the vocabulary doesn't have it.
        """
        found = self.find_token(token)
        if found is None:
            raise EngineError(f"the tokenizer has no token {token!r}; its checkpoint is of another family")
        return found

    def find_token(self, token: str) -> int | None:
        """Id of one token of the vocabulary, or None if the vocabulary doesn't have it."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def stream(self, skip_special_tokens: bool = True) -> "StreamDecoder":
        """Decoder for the tokens of one reply as they come."""
        return StreamDecoder(self, skip_special_tokens)


class StreamDecoder:
    """Gives out text token by token, whole characters only.

    The pieces joined together are the text that decoding all tokens at once would give.
    """

    def __init__(self, tokenizer: ChatTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Tokens of the previous piece are decoded again as context: some decoders treat the first token of a
        # text differently (a leading space, for one).
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Add one token; returns the text that became certain, often empty within a character."""
        self._pending.append(token_id)
        text = self._text_of_pending()
        # U+FFFD at the end may be a character whose last bytes are still to come.
        return "" if text.endswith(_REPLACEMENT) else self._release(text)

    def finish(self) -> str:
        """Give out what is left; half a character becomes U+FFFD."""
        return self._release(self._text_of_pending())

    def _text_of_pending(self) -> str:
        context = self._tokenizer.decode(self._context, self._skip)
        return self._tokenizer.decode(self._context + self._pending, self._skip)[len(context) :]

    def _release(self, text: str) -> str:
        if text:
            self._context, self._pending = self._pending, []
        return text


def expand_image_tokens(ids: Sequence[int], image_pad: int, counts: Sequence[int]) -> list[int]:
    """Repeat each image placeholder as often as its image has tokens.

    Works on ids because a special token never merges with its neighbours: the result is that of repeating it
    in the text, without tokenizing thousands of copies.

    Args:
        ids: tokens of a rendered prompt, one ``image_pad`` per image.
        image_pad: id of the placeholder.
        counts: tokens of each image, in order of appearance.

    Raises:
        UsageError: there are more or fewer placeholders than images.
    """
    found = sum(1 for token in ids if token == image_pad)
    if found != len(counts):
        raise UsageError(
            f"the prompt has {found} image placeholders for {len(counts)} images; give one image part per "
            "image and keep placeholder tokens out of the text"
        )
    remaining = iter(counts)
    expanded: list[int] = []
    for token in ids:
        expanded += [image_pad] * next(remaining) if token == image_pad else [token]
    return expanded


def _environment() -> ImmutableSandboxedEnvironment:
    """The dialect of Jinja that chat templates are written in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _plain(value: object) -> object:
    """Rebuild a message from plain JSON values; images and other objects stay out of the template's reach."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _special_tokens(path: Path) -> dict[str, str]:
    """Tokens that templates may name, such as ``bos_token``; empty when the file is not there."""
    if not path.is_file():
        return {}
    try:
        config: dict[str, Any] = dict(json.loads(_read_text(path)))
    except (ValueError, TypeError) as error:
        raise EngineError(f"{path} is not a JSON object ({error}); build the engine again") from None
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EngineError(f"{path} is missing from the engine; build it again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} can't be read ({error}); build the engine again") from None
