# SPDX-License-Identifier: Apache-2.0
"""Source without what one version of TensorRT never runs: the other branch of every comparison of versions,
what comes after a return, and private functions that nobody is left to call."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from starkv.trt_compat import version as version_module
from starkv.trt_compat.version import TensorRTVersion

CONSTANTS: Mapping[str, TensorRTVersion] = {
    name: value for name, value in vars(version_module).items() if isinstance(value, TensorRTVersion)
}
"""Versions that the code compares with, by name."""
_COMPARISONS: dict[type[ast.cmpop], Callable[[TensorRTVersion, TensorRTVersion], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
Constants = Mapping[str, TensorRTVersion]


def live_code(source: str, version: TensorRTVersion, constants: Constants = CONSTANTS) -> ast.Module:
    """The part of a module that a version of TensorRT can run.

    Args:
        source: of the module.
        version: of TensorRT.
        constants: versions by name.
    """
    tree: ast.Module = _Branches(version, constants).visit(ast.parse(source))
    while unused := _unused(tree):
        tree = _Without(unused).visit(tree)
    return ast.fix_missing_locations(tree)


def _truth(test: ast.expr, version: TensorRTVersion, constants: Constants) -> bool | None:
    """What a condition comes to for a version; None where it depends on other things."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        truth = _truth(test.operand, version, constants)
        return None if truth is None else not truth
    if isinstance(test, ast.BoolOp):
        # One that is true settles an "or", one that is false an "and".
        settles = isinstance(test.op, ast.Or)
        truths = [_truth(value, version, constants) for value in test.values]
        if settles in truths:
            return settles
        return None if None in truths else not settles
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or type(test.ops[0]) not in _COMPARISONS:
        return None
    compare = _COMPARISONS[type(test.ops[0])]
    left, right = test.left, test.comparators[0]
    if _is_version(left) and isinstance(right, ast.Name) and right.id in constants:
        return compare(version, constants[right.id])
    if _is_version(right) and isinstance(left, ast.Name) and left.id in constants:
        return compare(constants[left.id], version)
    return None


def _is_version(value: ast.expr) -> bool:
    name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
    return name == "version"


def _ends(statement: ast.stmt) -> bool:
    """Whether nothing behind a statement runs."""
    if isinstance(statement, ast.If):
        return bool(statement.orelse) and _ends(statement.body[-1]) and _ends(statement.orelse[-1])
    return isinstance(statement, _ENDS) or (isinstance(statement, ast.With) and _ends(statement.body[-1]))


class _Branches(ast.NodeTransformer):
    def __init__(self, version: TensorRTVersion, constants: Constants) -> None:
        self._version, self._constants = version, constants

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                self._cut(statements)
                if field == "body" and not statements:
                    statements.append(ast.Pass())
        return node

    def _cut(self, statements: list[ast.stmt]) -> None:
        last = next((index for index, statement in enumerate(statements) if _ends(statement)), None)
        if last is not None:
            del statements[last + 1 :]

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, ast.If | ast.IfExp):
            return super().visit(node)
        truth = _truth(node.test, self._version, self._constants)
        if truth is None:
            return super().visit(node)
        if isinstance(node, ast.IfExp):
            return self.visit(node.body if truth else node.orelse)
        self.generic_visit(node)
        return node.body if truth else node.orelse


class _Without(ast.NodeTransformer):
    """Takes definitions away."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, _DEFINITIONS) and node.name in self._names:
            return None
        return super().visit(node)


def _unused(tree: ast.AST) -> set[str]:
    """Private functions and classes that nothing else mentions."""
    nodes = list(ast.walk(tree))
    mentioned = {node.id for node in nodes if isinstance(node, ast.Name)}
    mentioned |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    defined = {node.name for node in nodes if isinstance(node, _DEFINITIONS)}
    return {name for name in defined - mentioned if name.startswith("_") and not name.startswith("__")}
