# SPDX-License-Identifier: Apache-2.0
"""Read a model's reply: its thought, then one call or several. Nothing is evaluated, nothing is guessed.

    response := [thought] "Action:" call (call)*        call := name "(" [argument ("," argument)*] ")"
    argument := name "=" quoted | name "=" place         quoted := '…' | "…", with backslash escapes

Models forget to escape quotes, so a quote closes its string only where the call can go on: before another
argument, or before a parenthesis that ends the reply or is followed by the next call. A reply that does not
read through to its end is refused as a whole: acting on its second half, or on half a string, would be worse
than asking the model again.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from starkv.errors import StarkvError
from starkv.runtime.actions.arguments import ACTION_NAMES, ARGUMENT_NAMES, ArgumentError, build_action
from starkv.runtime.actions.types import Action

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_MARKER = r"Action[ \t]*[:：]"
_LINE_MARKER = re.compile(rf"^[ \t]*{_MARKER}", re.MULTILINE)
_INLINE_MARKER = re.compile(rf"(?<![A-Za-z0-9_]){_MARKER}")
_BARE_CALL = re.compile(
    rf"(?:^|(?<={_THINK_CLOSE}))[ \t]*(?=(?:{'|'.join(sorted(ACTION_NAMES))})[ \t]*\()",
    re.MULTILINE | re.IGNORECASE,
)
_SUMMARY = re.compile(r"Action_Summary[ \t]*[:：]")
_LABEL = re.compile(r"(?:Thought|Reflection|Action_Summary)[ \t]*[:：]")

_CALL = re.compile(r"([A-Za-z_][A-Za-z_0-9]*)[ \t]*\(")
# Between calls; the model may repeat the marker.
_GAP = re.compile(rf"(?:\s|;|{_MARKER})*")
# Decoders and code fences leave these behind the last call.
_LEFTOVERS = re.compile(r"(?:\s|```|\[EOS\]|<\|im_end\|>|<\|endoftext\|>)*\Z")
_FENCE = re.compile(r"\s*(?:```[a-z]*)?\s*")
_SPACE = re.compile(r"\s*")
_ARGUMENT = re.compile(r"([A-Za-z_][A-Za-z_0-9]*)\s*=\s*")
_NEXT_ARGUMENT = re.compile(rf"\s*,\s*(?:{'|'.join(sorted(ARGUMENT_NAMES))})\s*=")
_UNQUOTED = re.compile(r"<[^<>]+>[^<>]*<[^<>]+>|\([^()]*\)|\[[^\[\]]*\]")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


class ActionParseError(StarkvError):
    """A reply that is no action."""

    def __init__(self, reason: str, text: str, position: int) -> None:
        excerpt = " ".join(text[position : position + 40].split())
        super().__init__(f"the reply is no action: {reason}, at character {position}: {excerpt!r}")
        self.reason = reason
        """What is wrong, in a few words."""
        self.text = text
        """The whole reply, unchanged."""
        self.position = position
        """Where in ``text`` reading failed, in characters."""


@dataclass(frozen=True)
class ParsedResponse:
    """A reply that was understood."""

    thought: str
    """Why the model acts, without labels; empty if it didn't say."""
    actions: tuple[Action, ...]
    """At least one, in order."""
    text: str
    """The whole reply, unchanged."""
    reflection: str = ""
    """What the model says about its last step, where its dialect has that."""


def parse_response(text: str) -> ParsedResponse:
    """Read a reply in any UI-TARS dialect.

    Raises:
        ActionParseError: there is no action, or anything in the reply can't be read.
    """
    begin = 0
    if text.lstrip().startswith(_THINK_OPEN):
        begin = text.find(_THINK_CLOSE) + len(_THINK_CLOSE)
        if begin < len(_THINK_CLOSE):
            raise ActionParseError("the thought never ends", text, len(text) - len(text.lstrip()))
    for before, after in _places_of_actions(text, begin):
        start = _skip(_FENCE, text, after)
        # "my last Action: failed" is prose; something that looks like a call has to be one.
        if _CALL.match(text, start):
            thought, reflection = _split_thought(text[:before])
            return ParsedResponse(thought, tuple(_read_calls(text, start)), text, reflection)
    raise ActionParseError("no call was found", text, begin)


def _places_of_actions(text: str, begin: int) -> Iterator[tuple[int, int]]:
    """Where the thought may end and the calls may begin; the first pattern that occurs decides."""
    for pattern in (_LINE_MARKER, _INLINE_MARKER, _BARE_CALL):
        matches = list(pattern.finditer(text, begin))
        if matches:
            yield from (match.span() for match in matches)
            return


def _split_thought(before: str) -> tuple[str, str]:
    """Thought and reflection from everything before the calls."""
    before = before.strip().removeprefix(_THINK_OPEN)
    inner, closing, rest = before.partition(_THINK_CLOSE)
    parts = [inner, rest] if closing else [before]
    reflection = ""
    if parts[-1].lstrip().startswith("Reflection"):
        first, *summary = _SUMMARY.split(parts[-1], maxsplit=1)
        if summary:
            reflection, parts[-1] = _without_label(first), summary[0]
    return "\n".join(filter(None, map(_without_label, parts))), reflection


def _without_label(part: str) -> str:
    return _LABEL.sub("", part.strip(), count=1).strip() if _LABEL.match(part.strip()) else part.strip()


def _read_calls(text: str, position: int) -> Iterator[Action]:
    while True:
        action, position = _read_call(text, position)
        yield action
        if _LEFTOVERS.match(text, position):
            return
        position = _skip(_GAP, text, position)


def _read_call(text: str, begin: int) -> tuple[Action, int]:
    """Read one call; returns it and the position behind its parenthesis."""
    head = _CALL.match(text, begin)
    if head is None:
        raise ActionParseError("text that is no call", text, begin)
    arguments: dict[str, str] = {}
    position = _skip(_SPACE, text, head.end())
    while not text.startswith(")", position):
        if arguments:
            if not text.startswith(",", position):
                raise ActionParseError("expected ',' or ')'", text, position)
            position = _skip(_SPACE, text, position + 1)
        name = _ARGUMENT.match(text, position)
        if name is None:
            raise ActionParseError("expected an argument", text, position)
        ours = ARGUMENT_NAMES.get(name[1])
        if ours is None or ours in arguments:
            raise ActionParseError(
                "unknown argument" if ours is None else "argument given twice", text, position
            )
        arguments[ours], position = _read_value(text, name.end())
        position = _skip(_SPACE, text, position)
    try:
        return build_action(head[1], arguments), position + 1
    except ArgumentError as error:
        raise ActionParseError(str(error), text, begin) from None


def _read_value(text: str, begin: int) -> tuple[str, int]:
    """Read a quoted string or a bare place; returns its value and the position behind it."""
    quote = text[begin : begin + 1]
    if quote not in ("'", '"'):
        bare = _UNQUOTED.match(text, begin)
        if bare is None:
            raise ActionParseError("expected a quoted value", text, begin)
        return bare[0], bare.end()
    for match in re.compile(rf"\\.|{quote}", re.DOTALL).finditer(text, begin + 1):
        if match[0] == quote and _call_goes_on(text, match.end()):
            value = text[begin + 1 : match.start()]
            return _ESCAPE.sub(lambda escape: _ESCAPES.get(escape[1], escape[0]), value), match.end()
    raise ActionParseError("no quote closes this value and its call", text, begin)


def _call_goes_on(text: str, position: int) -> bool:
    """Whether an argument's string can end here."""
    if _NEXT_ARGUMENT.match(text, position):
        return True
    position = _skip(_SPACE, text, position)
    if not text.startswith(")", position):
        return False
    position += 1
    if _LEFTOVERS.match(text, position):
        return True
    following = _skip(_GAP, text, position)
    # Without a gap, name and parenthesis are part of the string: 'f('a')g()'.
    return following > position and _CALL.match(text, following) is not None


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position
