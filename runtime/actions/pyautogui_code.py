# SPDX-License-Identifier: Apache-2.0
"""Read a reply of OpenCUA: a thought, then lines of PyAutoGUI in Python's syntax. They are read, never run.

    reply := [thought] ["```python"] line (line)* ["```"]
    line  := "pyautogui." name "(" literals ")" | "computer." name "(" literals ")" | "time.sleep(" number ")"

Anything else in the code is refused as a whole, a variable or a loop included: what it would do can't be
known without running it. How far a scroll goes is not kept, only where to.
"""

import ast
import re
from collections.abc import Iterator

from starkv.runtime.actions.arguments import ArgumentError
from starkv.runtime.actions.parser import ActionParseError, ParsedResponse
from starkv.runtime.actions.pyautogui_actions import BUILDERS, Call, Literal, read_point
from starkv.runtime.actions.types import Action, Drag, Hover, Point

_CALL = r"(?:pyautogui|computer|time)\.[A-Za-z_]+[ \t]*\("
_FENCE = re.compile(r"```(?:python|code|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_FIRST_CALL = re.compile(
    rf"^[ \t]*(?=(?:import[ \t]+(?:pyautogui|time)[ \t]*(?:$|;|\n)|{_CALL}))", re.MULTILINE
)
_INLINE_CALL = re.compile(rf"(?<![A-Za-z0-9_.]){_CALL}")
_CODE_LABEL = re.compile(r"(?:^|\n)[#\s]*Code[ \t]*:?[ \t]*\Z", re.IGNORECASE)
_THOUGHT = re.compile(
    r"(?:^|\n)[#\s]*Thought[ \t]*:(.*?)(?=\n[#\s]*Action[ \t]*:|\Z)", re.DOTALL | re.IGNORECASE
)
_LEFTOVERS = re.compile(r"(?:\s|```|\[EOS\]|<\|im_end\|>)*\Z")
_LONGEST_CODE = 20_000


def parse_pyautogui(text: str) -> ParsedResponse:
    """Read a reply that ends in PyAutoGUI code.

    Raises:
        ActionParseError: there is no code, or a line of it is none of the calls above.
    """
    code, begin = _find_code(text)
    if len(code) > _LONGEST_CODE:
        raise ActionParseError("the code is too long", text, begin)
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "it can't be read"
        raise ActionParseError(f"the code is no Python: {reason}", text, begin) from None
    try:
        actions = tuple(_actions(body))
    except ArgumentError as refusal:
        raise ActionParseError(str(refusal), text, begin) from None
    if not actions:
        raise ActionParseError("the code does nothing", text, begin)
    return ParsedResponse(_thought(text[:begin]), actions, text)


def _find_code(text: str) -> tuple[str, int]:
    """The code and where it begins: what the last fence holds, else everything from the first call on."""
    fences = [match for match in _FENCE.finditer(text) if _INLINE_CALL.search(match[1])]
    if fences:
        return _dedent(fences[-1][1]), fences[-1].start()
    first = _FIRST_CALL.search(text) or _INLINE_CALL.search(text)
    if first is None:
        raise ActionParseError("no call was found", text, 0)
    return _dedent(_LEFTOVERS.sub("", text[first.start() :])), first.start()


def _dedent(code: str) -> str:
    # A reply may indent its code; the first line's indentation is everyone's.
    code = code.strip("\n")
    margin = code[: len(code) - len(code.lstrip(" \t"))]
    return "\n".join(line.removeprefix(margin) for line in code.split("\n"))


def _thought(before: str) -> str:
    before = _CODE_LABEL.sub("", before.rstrip())
    found = _THOUGHT.search(before)
    return (found[1] if found else before).strip()


def _actions(body: list[ast.stmt]) -> Iterator[Action]:
    """Actions of the statements; a drag begins where the pointer was moved to.

    Raises:
        ArgumentError: a statement is no known call.
    """
    pointer: Point | None = None
    for number, statement in enumerate(body):
        if isinstance(statement, ast.Import):
            continue
        call = _call(statement)
        if call.name == "pyautogui.dragTo":
            if pointer is None:
                raise ArgumentError("dragTo needs a moveTo before it")
            end = read_point(call.take("x", "y", "duration", "button"), call.name)
            yield Drag(pointer, end)
            pointer = end
            continue
        build = BUILDERS.get(call.name)
        if build is None:
            raise ArgumentError(f"unknown call {call.name}")
        for action in build(call):
            pointer = getattr(action, "point", None) or pointer
            following = body[number + 1 : number + 2]
            # The movement is part of the drag after it.
            if not (
                isinstance(action, Hover) and following and _call(following[0]).name == "pyautogui.dragTo"
            ):
                yield action


def _call(statement: ast.stmt) -> Call:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        raise ArgumentError(f"line {statement.lineno} of the code is no call")
    function, arguments = statement.value.func, statement.value
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        raise ArgumentError(f"line {statement.lineno} of the code calls something unknown")
    if any(keyword.arg is None for keyword in arguments.keywords):
        raise ArgumentError(f"line {statement.lineno} of the code has ** arguments")
    return Call(
        f"{function.value.id}.{function.attr}",
        tuple(_literal(argument) for argument in arguments.args),
        {str(keyword.arg): _literal(keyword.value) for keyword in arguments.keywords},
    )


def _literal(node: ast.expr) -> Literal:
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _literal(node.operand)
        if isinstance(number, (int, float)):
            return -number
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_literal(item) for item in node.elts]
        if all(isinstance(item, str) for item in items):
            return [str(item) for item in items]
    raise ArgumentError(f"line {node.lineno} of the code has an argument that is no plain value")
