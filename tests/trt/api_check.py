# SPDX-License-Identifier: Apache-2.0
"""Compares every use of TensorRT in sources with what a version's bindings have: attributes, what may be
assigned to, numbers and names of arguments, and the methods of classes that TensorRT calls."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from api_description import Description
from api_types import ALIAS, PACKAGE, Names, Sources, Type, pairs
from live_code import CONSTANTS, Constants, live_code

from starkv.trt_compat.version import TensorRTVersion

_CALLBACKS = {"IStreamReader.read": 1, "IStreamReaderV2.read": 2, "IStreamWriter.write": 1}
"""Arguments that TensorRT passes where the signature is the C++ one: memory comes and goes as bytes (classes
PyStreamReader, PyStreamReaderV2 and PyStreamWriter of pyCore.cpp, v10.3.0 to v11.1)."""


@dataclass
class Checked:
    """What a check found."""

    problems: list[str] = field(default_factory=list)
    """Each with file, line and name."""
    uses: set[str] = field(default_factory=set)
    """Everything of TensorRT that is used, such as ``IBuilderConfig.set_flag``."""


def check_sources(
    sources: Mapping[str, str],
    api: Description,
    version: TensorRTVersion,
    allowed: Iterable[str] = (),
    constants: Constants = CONSTANTS,
) -> Checked:
    """Check what of the sources runs with a version.

    Args:
        sources: text by file name.
        api: names of that version.
        version: which branches are taken.
        allowed: names that may be missing.
        constants: versions that the sources compare with.
    """
    trees = {file: live_code(text, version, constants) for file, text in sources.items()}
    return _walked(trees, api, frozenset(allowed)).checked


def package_expressions(trees: Mapping[str, ast.Module], api: Description) -> set[ast.expr]:
    """Expressions that are the package itself; ``trees`` is what a version runs."""
    return _walked(trees, api, frozenset()).packages


def _walked(trees: Mapping[str, ast.Module], api: Description, allowed: frozenset[str]) -> "_Walk":
    walk = _Walk(Sources(trees, api), allowed)
    for file, tree in trees.items():
        walk.file = file
        names = walk.sources.top(file)
        for statement in tree.body:
            walk.visit(statement, names)
    return walk


class _Walk:
    """Goes through statements in their order and learns names on the way."""

    def __init__(self, sources: Sources, allowed: frozenset[str]) -> None:
        self.sources, self._allowed = sources, allowed
        self.checked = Checked()
        self.packages: set[ast.expr] = set()
        self.file = ""

    def visit(self, node: ast.AST, names: Names) -> None:
        match node:
            case ast.FunctionDef():
                self._function(node, names, None)
            case ast.ClassDef():
                self._class(node, names)
            case ast.Import():
                for alias in node.names:
                    if alias.name == "tensorrt" and alias.asname != ALIAS:
                        names[alias.asname or alias.name] = PACKAGE
            case ast.AnnAssign():
                if node.value:
                    self.visit(node.value, names)
                self.visit(node.target, names)
                if isinstance(node.target, ast.Name):
                    kind = self.sources.annotated(node.target.id, node.annotation, self.file)
                    names[node.target.id] = kind
            case ast.Assign():
                self._children(node, names)
                for target, value in pairs(node):
                    if isinstance(target, ast.Name):
                        names[target.id] = self.sources.infer(value, names)
            case ast.With():
                for item in node.items:
                    self.visit(item.context_expr, names)
                    if isinstance(item.optional_vars, ast.Name):
                        names[item.optional_vars.id] = self.sources.infer(item.context_expr, names)
                for statement in node.body:
                    self.visit(statement, names)
            case _:
                self._children(node, names)
                if isinstance(node, ast.expr) and self.sources.infer(node, names) == PACKAGE:
                    self._package(node)
                if isinstance(node, ast.Attribute):
                    self._attribute(node, names)
                elif isinstance(node, ast.Call):
                    self._call(node, names)
                elif isinstance(node, ast.NamedExpr) and isinstance(node.target, ast.Name):
                    names[node.target.id] = self.sources.infer(node.value, names)

    def _package(self, node: ast.expr) -> None:
        if isinstance(getattr(node, "ctx", None), ast.Load):
            self.packages.add(node)

    def _children(self, node: ast.AST, names: Names) -> None:
        for child in ast.iter_child_nodes(node):
            self.visit(child, names)

    def _function(self, node: ast.FunctionDef, names: Names, owner: str | None) -> None:
        inner = self.sources.parameters(node, names, owner, self.file)
        for statement in node.body:
            self.visit(statement, inner)

    def _class(self, node: ast.ClassDef, names: Names) -> None:
        bases = [self.sources.infer(base, names) for base in node.bases]
        interface = next((base for base in bases if base and base.kind == "class"), None)
        for base in node.bases:
            self.visit(base, names)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                if interface and not statement.name.startswith("_"):
                    self._callback(interface, statement)
                self._function(statement, names, node.name)
            else:
                self.visit(statement, names)

    def _callback(self, interface: Type, method: ast.FunctionDef) -> None:
        """TensorRT calls it, with positional arguments."""
        name = f"{interface.name}.{method.name}"
        member = self.sources.member(interface, method.name)
        if member is None or member.kind != "function":
            self._problem(method, name, "TensorRT never calls that")
            return
        self.checked.uses.add(name)
        passed = {len(signature.parameters) for signature in member.signatures}
        if name in _CALLBACKS:
            passed = {_CALLBACKS[name]}
        if len(method.args.args) - 1 not in passed:
            self._problem(method, name, f"is called with {' or '.join(map(str, passed))} arguments")

    def _attribute(self, node: ast.Attribute, names: Names) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == ALIAS and ALIAS not in names:
            self._problem(node, node.attr, f"{ALIAS} is known to type checkers only")
        owner = self.sources.infer(node.value, names)
        if owner is None or owner.kind not in ("package", "class", "object"):
            return
        name = f"{owner.name}.{node.attr}".lstrip(".")
        member = self.sources.member(owner, node.attr)
        if member is None:
            self._problem(node, name, "is missing")
            return
        self.checked.uses.add(name)
        if isinstance(node.ctx, ast.Store) and not (member.kind == "property" and member.writable):
            self._problem(node, name, "can't be assigned to")

    def _call(self, node: ast.Call, names: Names) -> None:
        called = self.sources.infer(node.func, names)
        if called is None or called.kind not in ("class", "function"):
            return
        member = called.member or self.sources.api.member(called.name, "__init__")
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if member is None or not member.signatures or starred or any(k.arg is None for k in node.keywords):
            return
        # X.__init__(self, …)
        count = len(node.args) - called.name.endswith(".__init__")
        keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
        if not any(signature.accepts(count, keywords) for signature in member.signatures):
            self._problem(node, called.name, f"takes other arguments than {ast.unparse(node)[:80]}")

    def _problem(self, node: ast.expr | ast.stmt, name: str, problem: str) -> None:
        if name not in self._allowed:
            self.checked.problems.append(f"{self.file}:{node.lineno}: {name}: {problem}")
