# SPDX-License-Identifier: Apache-2.0
"""What a decoder's attention reads, and the weights around it: projections' biases, output projections."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.export.lower.ort_attention import MICROSOFT
from starkv.export.tensor_file import stored_values
from starkv.onnx_ops import DOMAIN, KV_ATTENTION

GROUP_QUERY_ATTENTION = "GroupQueryAttention"
_ATTENTION = ((MICROSOFT, GROUP_QUERY_ATTENTION), (DOMAIN, KV_ATTENTION))
"""Of ONNX Runtime's dialect, and of an export."""
UNKNOWN_FORM = (
    "this engine's decoder was not written by starkv's builder, so its attention biases can't be found and "
    "its cache can't be packed; export the model with the builder (no --route trace) and build it again"
)


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
            raise UsageError(UNKNOWN_FORM)
        return node


def projection_biases(model: ir.Model) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Biases ``[G, D]`` of each layer's key projection, before rotation, and value projection; zeros where
    there is none.

    Args:
        model: decoder of an export, or of an engine for ONNX Runtime.

    Raises:
        UsageError: the graph has another form than the builder's, so that nobody knows where its biases are.
    """
    found = []
    for node in attention_nodes(model.graph):
        inputs = attention_inputs(node)
        biases = []
        for value in (inputs.rotary.inputs[0], inputs.v):
            bias = _bias_of(value)
            if bias is None:
                raise UsageError(UNKNOWN_FORM)
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
    for node in attention_nodes(model.graph):
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type not in ("MatMul", "MatMulNBits"):
            raise UsageError(UNKNOWN_FORM)
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


def attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    nodes = [node for node in graph if (node.domain, node.op_type) in _ATTENTION]
    if not nodes:
        raise UsageError(
            "this engine's decoder can be packed only once, before it is; take the unpacked engine"
        )
    return nodes


def attention_inputs(node: ir.Node) -> AttentionInputs:
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
