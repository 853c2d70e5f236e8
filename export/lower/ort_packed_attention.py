# SPDX-License-Identifier: Apache-2.0
"""A lowered decoder that can also attend to a packed cache.

Both attentions of a layer stand behind one ``If``: the exact one over float rows, as a prefill needs it, and
one over packed rows. So weights exist once, and either attention writes its new rows in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.export.lower.branch import Branch
from starkv.export.lower.graph_edit import new_input, replace_node
from starkv.export.lower.ort_attention import MICROSOFT
from starkv.export.tensor_file import stored_values

PACKED = "packed"
"""Input of a decoder that can attend to a packed cache: [1] bool in host memory, whether it is to."""
_ATTENTION = "GroupQueryAttention"


@dataclass(frozen=True)
class AttentionInputs:
    """What attention reads in a layer of the lowered decoder."""

    q: ir.Value
    """``[B, S, Hq * D]``, rotated."""
    k: ir.Value
    """``[B, S, G * D]``, likewise."""
    v: ir.Value
    """``[B, S, G * D]``."""
    past_k: ir.Value
    """``[B, G, C, D]``."""
    past_v: ir.Value
    """``[B, G, C, D]``."""
    last_rows: ir.Value
    """``[B]``: this layer's part of the input."""
    longest: ir.Value
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        """D."""
        assert self.past_k.shape is not None
        return int(self.past_k.shape[3])

    @property
    def rotary(self) -> ir.Node:
        """The node that rotates the new keys.

        Raises:
            UsageError: they don't come from one.
        """
        node = self.k.producer()
        if node is None or node.op_type != "RotaryEmbedding":
            raise UsageError(_UNKNOWN_FORM)
        return node


class PackedAttention(Protocol):
    """How a decoder attends to a packed cache."""

    def updated_inputs(self, layer: int, inputs: AttentionInputs) -> dict[str, ir.Value]:
        """New inputs of the graph that a layer writes to, by the names of the outputs that they become."""
        ...

    def write_branch(
        self, branch: Branch, layer: int, inputs: AttentionInputs, updated: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Write a layer's attention to the packed cache.

        Args:
            branch: where to.
            layer: its index.
            inputs: what the exact attention reads.
            updated: values of :meth:`updated_inputs`.

        Returns:
            out ``[B, S, Hq * D]``, ``past_k`` and ``past_v`` afterwards, and ``updated`` afterwards.
        """
        ...


def add_packed_attention(model: ir.Model, packed: Callable[[ir.Model], PackedAttention]) -> None:
    """Put a second attention beside every layer's, which the new input ``packed`` chooses.

    Args:
        model: decoder of an engine for ONNX Runtime.
        packed: makes that attention for a model.
    """
    graph = model.graph
    attention = packed(model)
    flag = new_input(graph, PACKED, ir.DataType.BOOL, [1])
    for layer, node in enumerate(_attention_nodes(graph)):
        inputs = _inputs_of(node)
        updated = attention.updated_inputs(layer, inputs)
        types = [ir.DataType.FLOAT] * 3 + [value.dtype or ir.DataType.FLOAT for value in updated.values()]
        branch = Branch(graph, f"layers.{layer}/packed")
        results = attention.write_branch(branch, layer, inputs, list(updated.values()))
        exact = Branch(graph, f"layers.{layer}/exact")
        floats = exact.append(
            ir.node(
                _ATTENTION,
                node.inputs,
                dict(node.attributes.items()),
                domain=MICROSOFT,
                num_outputs=3,
                name=f"layers.{layer}/exact/{_ATTENTION}",
            )
        )
        untouched = [exact.op("Identity", value) for value in updated.values()]
        branches = {
            "then_branch": branch.finish(results, types),
            "else_branch": exact.finish([*floats, *untouched], types),
        }
        either = ir.node("If", [flag], branches, num_outputs=len(types), name=f"layers.{layer}/If")
        replace_node(graph, node, either)
        for (name, before), after in zip(updated.items(), either.outputs[3:], strict=True):
            after.name, after.type, after.shape = name, before.type, before.shape
            graph.outputs.append(after)


def projection_biases(model: ir.Model) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Biases ``[G, D]`` of each layer's key projection, before rotation, and value projection; zeros where
    there is none.

    Args:
        model: decoder of an engine for ONNX Runtime.

    Raises:
        UsageError: the graph has another form than the builder's, so that nobody knows where its biases are.
    """
    found = []
    for node in _attention_nodes(model.graph):
        inputs = _inputs_of(node)
        biases = []
        for value in (inputs.rotary.inputs[0], inputs.v):
            bias = _bias_of(value)
            if bias is None:
                raise UsageError(_UNKNOWN_FORM)
            flat = np.broadcast_to(bias, inputs.kv_heads * inputs.head_dim)
            biases.append(flat.reshape(inputs.kv_heads, inputs.head_dim).astype(np.float32))
        found.append((biases[0], biases[1]))
    return found


def output_weights(model: ir.Model) -> list[NDArray[np.float32]]:
    """Weights ``[hidden, Hq * D]`` of each layer's output projection, dequantized.

    Raises:
        UsageError: the graph has another form than the builder's.
    """
    found = []
    for node in _attention_nodes(model.graph):
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type not in ("MatMul", "MatMulNBits"):
            raise UsageError(_UNKNOWN_FORM)
        found.append(_weight_of(users[0]))
    return found


def _weight_of(node: ir.Node) -> NDArray[np.float32]:
    """``[outputs, inputs]`` of a linear layer."""
    constants = [None if x is None else ir.convenience.get_const_tensor(x) for x in node.inputs]
    stored = [_values(tensor) for tensor in constants[1:4] if tensor is not None]
    if node.op_type == "MatMul":
        transposed: NDArray[np.float32] = stored[0].T
        return transposed
    sizes = {name: node.attributes[name].as_int() for name in ("K", "N", "bits", "block_size")}
    codes, scales, *points = stored
    blocks = _unpack(codes, sizes["bits"]).reshape(sizes["N"], -1, sizes["block_size"])
    zero: NDArray[np.float32] = np.full((1, 1, 1), 1 << (sizes["bits"] - 1), np.float32)
    if points:
        by_block = _unpack(points[0].reshape(sizes["N"], -1), sizes["bits"])
        zero = by_block[:, : blocks.shape[1], None]
    weight: NDArray[np.float32] = (blocks - zero) * scales.reshape(sizes["N"], -1, 1)
    return weight.reshape(sizes["N"], -1)[:, : sizes["K"]]


def _unpack(codes: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Bytes ``[..., n]`` → values, the low half of a byte first where two values share it."""
    if bits == 8:
        return codes
    halves: NDArray[np.float32] = np.stack([codes % 16, codes // 16], axis=-1)
    return halves.reshape(*codes.shape[:-1], -1)


_UNKNOWN_FORM = (
    "this engine's decoder was not written by starkv's builder, so its attention biases can't be found and "
    "its cache can't be packed; export the model with the builder (no --route trace) and build it again"
)


def _attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    nodes = [node for node in graph if node.op_type == _ATTENTION and node.domain == MICROSOFT]
    if not nodes:
        raise UsageError(
            "this engine's decoder can be packed only once, before it is; take the unpacked engine"
        )
    return nodes


def _inputs_of(node: ir.Node) -> AttentionInputs:
    counts = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    values = [value for value in node.inputs if value is not None]
    return AttentionInputs(*values, *counts)


def _bias_of(value: ir.Value | None) -> NDArray[np.float32] | None:
    """What a projection adds in the end: its bias, one zero without any, None if it is no projection."""
    node = None if value is None else value.producer()
    if node is None or value is None:
        return None
    constants = [None if x is None else ir.convenience.get_const_tensor(x) for x in node.inputs]
    match node.op_type:
        case "MatMulNBits":
            # Input 5 is the bias.
            bias = constants[5] if len(constants) > 5 else None
            return np.zeros(1, np.float32) if bias is None else _values(bias)
        case "MatMul":
            return np.zeros(1, np.float32)
        case "Add":
            known = [_values(tensor) for tensor in constants if tensor is not None]
            return known[0] if len(known) == 1 else None
        case "Split":
            whole, sizes = _bias_of(node.inputs[0]), constants[1]
            if whole is None or sizes is None or whole.size == 1:
                return whole
            return np.split(whole, np.cumsum(sizes.numpy())[:-1])[value.index() or 0]
        case "Concat":
            parts = [part for x in node.inputs if (part := _bias_of(x)) is not None and part.size > 1]
            return np.concatenate(parts) if len(parts) == len(node.inputs) else None
    return None


def _values(tensor: ir.TensorProtocol) -> NDArray[np.float32]:
    # onnx_ir refuses data that other engines share by hard links.
    found = stored_values(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
    return found.astype(np.float32)
