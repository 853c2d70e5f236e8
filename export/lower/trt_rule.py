# SPDX-License-Identifier: Apache-2.0
"""What a rule about graphs is, and what it sees of a graph."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from starkv.export.lower.trt_types import value_types
from starkv.trt_compat.version import TensorRTVersion


@dataclass(frozen=True)
class Violation:
    """A broken rule."""

    rule: str
    node: str
    """Name of the node, or of the graph's part."""
    reason: str
    source: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason} (rule {self.rule}, {self.source})"


@dataclass(frozen=True)
class RuleContext:
    """A graph and what rules want to know of it."""

    model: onnx.ModelProto
    folder: Path
    """Where data files lie."""
    target: TensorRTVersion
    types: dict[str, int]
    """Value → element type, as far as it is known."""
    constants: dict[str, onnx.TensorProto]

    @classmethod
    def of(cls, model: onnx.ModelProto, folder: Path, target: TensorRTVersion) -> "RuleContext":
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        return cls(model, folder, target, value_types(model.graph), constants)

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        return list(self.model.graph.node)

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """Content of a constant, read from the data file if it lies there."""
        tensor = self.constants.get(name)
        return None if tensor is None else onnx.numpy_helper.to_array(tensor, str(self.folder))

    def type_name(self, name: str) -> str:
        """Such as ``FLOAT16``, or ``?`` where it isn't known."""
        found = self.types.get(name)
        return "?" if found is None else onnx.TensorProto.DataType.Name(found)


Check = Callable[[RuleContext], Iterator[tuple[str, str]]]
"""Puts out (node, reason) for each place where the rule is broken."""


@dataclass(frozen=True)
class Rule:
    """A rule, and where it is written."""

    name: str
    source: str
    find: Check

    def check(self, context: RuleContext) -> list[Violation]:
        return [Violation(self.name, node, reason, self.source) for node, reason in self.find(context)]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def text(value: Any) -> str:
    """A string attribute, which ONNX keeps as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
