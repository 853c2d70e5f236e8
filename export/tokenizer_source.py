# SPDX-License-Identifier: Apache-2.0
"""The pattern of a tokenizer that a checkpoint brings as Python code, which is read and never run."""

import ast
import re
from pathlib import Path

from starkv.errors import CheckpointError

_PATTERN = "pat_str"


def read_pattern(folder: Path, reference: str) -> str:
    """Find the value of a tokenizer class's ``pat_str``.

    Args:
        folder: the checkpoint.
        reference: ``module.Class`` from ``auto_map`` in ``tokenizer_config.json``.

    Raises:
        CheckpointError: the file is missing or no Python, or the pattern is none that can be read off.
    """
    # Files that were downloaded and saved again say whose code it is: "owner/repository--module.Class".
    module, _, name = reference.rpartition("--")[2].rpartition(".")
    if not re.fullmatch(r"\w+", module):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: auto_map names {reference!r} as tokenizer, which is no "
            "module and class; download it again"
        )
    path = folder / f"{module}.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download the whole checkpoint") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise CheckpointError(f"{path} is not readable Python ({error}); download it again") from None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    pattern = _pattern_of(name, classes)
    if pattern is None:
        raise CheckpointError(
            f"{path}: class {name} has no {_PATTERN} made of literals; add a tokenizer.json to the checkpoint"
        )
    return pattern


def _pattern_of(name: str, classes: dict[str, ast.ClassDef]) -> str | None:
    """The pattern in the class's body, or in that of the first base that has one."""
    found = classes.pop(name, None)
    if found is None:
        return None
    for statement in found.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if any(isinstance(target, ast.Name) and target.id == _PATTERN for target in targets):
            assert isinstance(statement, (ast.Assign, ast.AnnAssign))
            return _text(statement.value)
    bases = (_pattern_of(base.id, classes) for base in found.bases if isinstance(base, ast.Name))
    return next((pattern for pattern in bases if pattern is not None), None)


def _text(node: ast.expr | None) -> str | None:
    """Value of a string literal, of a sum of them, or of ``"…".join`` over a list of them."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _joined("", [left, right])
        case ast.Call(
            func=ast.Attribute(value=between, attr="join"),
            args=[ast.List(elts=parts) | ast.Tuple(elts=parts)],
        ):
            separator = _text(between)
            return None if separator is None else _joined(separator, parts)
    return None


def _joined(separator: str, nodes: list[ast.expr]) -> str | None:
    texts = [_text(node) for node in nodes]
    known = [text for text in texts if text is not None]
    return separator.join(known) if len(known) == len(texts) else None
