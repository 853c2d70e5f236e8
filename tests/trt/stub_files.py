# SPDX-License-Identifier: Apache-2.0
"""Type stubs of TensorRT, made from a version's bindings when they are needed and never kept.

pybind11-stubgen writes what the bindings' docstrings say. Some of that is no Python, or not what the bindings
do: it is put right here.
"""

import ast
import re
from pathlib import Path
from typing import Any

from bindings import Bindings

_KEYWORD = re.compile(r"\bin: ")
_DEFINITION = re.compile(r"( *)def (\w+)\(")
_BUFFER = "typing_extensions.Buffer"
_CALLBACKS = {
    ("IStreamReader", "read"): f"def read(self, size: int) -> {_BUFFER}: ...",
    ("IStreamReaderV2", "read"): f"def read(self, num_bytes: int, stream: int) -> {_BUFFER}: ...",
    ("IStreamWriter", "write"): "def write(self, data: bytes) -> int: ...",
    ("IDebugListener", "process_debug_tensor"): (
        "def process_debug_tensor(self, addr: int, location: TensorLocation, type: DataType, shape: Dims, "
        "name: str, stream: int) -> None: ..."
    ),
}
"""How TensorRT calls these, where the stub has the C++ signature (pyCore.cpp, v10.3.0 to v11.1)."""
_POINTERS = ("profiler", "set_debug_listener")
"""What these take is a pointer in C++, so it may be None (pyCore.cpp; NvInferRuntime.h)."""
_FUNCTIONS = {"get_plugin_registry": "def get_plugin_registry() -> IPluginRegistry: ..."}
_ADDED = {
    # Through its length and items, as Python takes it; mypy does not.
    "Dims": "def __iter__(self) -> typing.Iterator[int]: ...",
    # pybind11's buffer protocol, which Python's own types know by this method.
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
}


def write_stubs(bindings: Bindings, folder: Path) -> list[str]:
    """Write ``tensorrt/__init__.pyi`` into a folder; returns functions whose signature was given up.

    Raises:
        UnavailableError: the bindings can't be had here.
    """
    scratch = folder / "raw"
    module = "tensorrt_bindings.tensorrt"
    bindings.python("-m", "pybind11_stubgen", module, "--ignore-all-errors", "-o", scratch)
    raw = (scratch / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    tree, given_up = _parse(raw)
    fixed = ast.fix_missing_locations(_Fixes().visit(tree))
    target = folder / "tensorrt" / "__init__.pyi"
    target.parent.mkdir()
    target.write_text(f"{ast.unparse(fixed)}\nimport builtins\n__version__: str\n")
    return given_up


def _parse(text: str) -> tuple[ast.Module, list[str]]:
    lines = _KEYWORD.sub("in_: ", text).splitlines()
    given_up: list[str] = []
    while True:
        try:
            return ast.parse("\n".join(lines)), given_up
        except SyntaxError as error:
            number = (error.lineno or 1) - 1
            found = _DEFINITION.match(lines[number])
            if not found:
                raise
            given_up.append(found[2])
            lines[number] = f"{found[1]}def {found[2]}(*all: typing.Any, **named: typing.Any) -> typing.Any:"


class _Fixes(ast.NodeTransformer):
    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.ClassDef):
            node.body = [self._method(node.name, statement) for statement in node.body]
            if node.name in _ADDED:
                node.body += ast.parse(_ADDED[node.name]).body
        elif isinstance(node, ast.FunctionDef) and node.name in _POINTERS:
            node.args.args[1].annotation = _or_none(node.args.args[1].annotation)
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in _POINTERS:
            node.annotation = _or_none(node.annotation)
        elif isinstance(node, ast.Module):
            node.body = [self._function(statement) for statement in node.body]
        elif isinstance(node, ast.arg) and node.annotation:
            node.annotation = _taken(node.annotation)
        node = super().visit(node)
        if isinstance(node, ast.Name) and node.id == "bool":
            # The package has a number type of that name.
            return ast.Attribute(ast.Name("builtins", ast.Load()), "bool", node.ctx)
        return node

    def _method(self, owner: str, statement: ast.stmt) -> ast.stmt:
        if isinstance(statement, ast.FunctionDef) and (owner, statement.name) in _CALLBACKS:
            return ast.parse(_CALLBACKS[owner, statement.name]).body[0]
        return statement

    def _function(self, statement: ast.stmt) -> ast.stmt:
        if isinstance(statement, ast.FunctionDef) and statement.name in _FUNCTIONS:
            return ast.parse(_FUNCTIONS[statement.name]).body[0]
        return statement


def _taken(annotation: ast.expr) -> ast.expr:
    """What a parameter takes: pybind11 makes dimensions of tuples and lists.

    Newer bindings write ``SupportsInt`` for ``int``, also where TensorRT is the caller and passes an int; the
    same for ``float``.
    """
    taken = {
        "Dims": "Dims | tuple[int, ...] | list[int]",
        "typing.SupportsInt": "int",
        "typing.SupportsFloat": "float",
    }
    written = ast.unparse(annotation)
    return ast.parse(taken[written], mode="eval").body if written in taken else annotation


def _or_none(annotation: ast.expr | None) -> ast.expr:
    return ast.BinOp(annotation or ast.Name("object", ast.Load()), ast.BitOr(), ast.Constant(None))
