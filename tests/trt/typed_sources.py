# SPDX-License-Identifier: Apache-2.0
"""``starkv/trt_compat`` as mypy must see it to check its use of TensorRT: with the package in place of
``Any``, and without what the version in question never runs."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api_check import package_expressions
from api_description import Description
from api_types import ALIAS
from live_code import live_code

from starkv.trt_compat.version import TensorRTVersion

PACKAGE = "trt_compat_typed"
_ORIGINAL = "starkv.trt_compat"


def write_typed_sources(
    sources: Mapping[str, str], api: Description, version: TensorRTVersion, folder: Path
) -> None:
    """Write the package :data:`PACKAGE` into a folder.

    Args:
        sources: text by file name.
        api: names of the version; annotations with others become ``Any``.
        version: decides which branches are there.
        folder: where to.
    """
    trees = {file: live_code(text, version) for file, text in sources.items()}
    packages = package_expressions(trees, api)
    target = folder / PACKAGE
    target.mkdir()
    for file, tree in trees.items():
        typed = ast.fix_missing_locations(_Typed(packages, api).visit(tree))
        head = "import typing\nimport tensorrt as trt\n"
        (target / file).write_text(head + ast.unparse(typed) + "\n")


class _Typed(ast.NodeTransformer):
    def __init__(self, packages: set[ast.expr], api: Description) -> None:
        self._packages, self._api = packages, api

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and node in self._packages:
            return ast.Name(ALIAS, ast.Load())
        if isinstance(node, ast.ImportFrom) and node.module:
            node.module = node.module.replace(_ORIGINAL, PACKAGE)
        for field in ("annotation", "returns"):
            if (annotation := getattr(node, field, None)) is not None:
                setattr(node, field, _Annotation(self._api).visit(annotation))
        return super().visit(node)


class _Annotation(ast.NodeTransformer):
    """Without quotes, and without classes that this version lacks."""

    def __init__(self, api: Description) -> None:
        self._api = api

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.visit(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == ALIAS:
            return node if self._api.is_class(node.attr) else ast.parse("typing.Any", mode="eval").body
        return super().visit(node)
