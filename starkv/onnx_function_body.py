# SPDX-License-Identifier: Apache-2.0
"""Writes the body of an ONNX function whose nodes depend on a configuration, such as one node per head.

Bodies that are always the same are text, see ``onnx_ops.py``.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from starkv.onnx_ops import DOMAIN, OPSET


class FunctionBody:
    """Collects the nodes of one function; every method appends and returns names of values."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs."""
        stem = f"{op_type}_{len(self._nodes)}"
        names = [stem if outputs == 1 else f"{stem}_{index}" for index in range(outputs)]
        self._nodes.append(onnx.helper.make_node(op_type, inputs, names, **attributes))
        return names

    def constant(self, array: npt.NDArray[Any]) -> str:
        """A constant tensor; equal ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=onnx.numpy_helper.from_array(array))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """A constant float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def split(self, x: str, sizes: tuple[int, ...], axis: int = -1) -> list[str]:
        """Cut ``x`` into pieces of these sizes."""
        return (
            [x] if len(sizes) == 1 else self.ops("Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis)
        )

    def concat(self, parts: list[str], axis: int = -1) -> str:
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape; 0 keeps a dimension and −1 infers one."""
        return self.op("Reshape", x, self.ints(*shape))

    def function(self, name: str, inputs: tuple[str, ...], outputs: dict[str, str]) -> onnx.FunctionProto:
        """Close the body.

        Args:
            name: the operator's type in the domain ``ai.starkv``.
            inputs: names that the nodes use without an operator that makes them.
            outputs: the function's outputs in their order, and which value each is.
        """
        final = {value: output for output, value in outputs.items()}
        for node in self._nodes:
            node.input[:] = [final.get(value, value) for value in node.input]
            node.output[:] = [final.get(value, value) for value in node.output]
        opsets = [onnx.helper.make_opsetid("", OPSET)]
        return onnx.helper.make_function(DOMAIN, name, inputs, list(outputs), self._nodes, opsets)
