# SPDX-License-Identifier: Apache-2.0
"""A small vocabulary over onnx_ir in which a model reads like a PyTorch forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from starkv.export.quantize.presets import Storage
from starkv.export.weight_source import NO_PADDING, Padding
from starkv.export.weights import WeightWriter
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, FULL_ATTENTION, KV_ATTENTION, OPSET, standard_functions

# Oldest IR with 4-bit tensors; old readers refuse newer ones.
IR_VERSION = 10
_TO_THE_END = 2**63 - 1

Dim = int | str


class GraphBuilder:
    """Collects the nodes of one graph; every method appends nodes and returns their output.

    Weights are named as in the checkpoint and go to the writer's data file at once.
    """

    def __init__(self, name: str, weights: WeightWriter, storage: Storage) -> None:
        self._name = name
        self._weights = weights
        self._storage = storage
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._scope = ""

    # --- the graph's frame ---

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes made inside, for profilers and error messages."""
        outer, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = outer

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> None:
        """Declare ``value`` a graph output called ``name``."""
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        self._outputs.append(value)

    def model(self) -> ir.Model:
        """Close the graph; the definitions of the custom operators it uses come along."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION},
            name=self._name,
        )
        used = {node.op_type for node in self._nodes if node.domain == DOMAIN}
        functions = [ir.from_proto(proto) for name, proto in standard_functions().items() if name in used]
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="starkv", functions=functions)

    # --- basic operators ---

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output."""
        return self.multi_op(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def multi_op(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """Append a node with several outputs."""
        name = f"{self._scope}{op_type}_{len(self._nodes)}"
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.{index}"
        self._nodes.append(node)
        return list(node.outputs)

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector; equal ones are stored once."""
        return self._constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: int) -> ir.Value:
        """A constant int64 scalar; equal ones are stored once."""
        return self._constant(f"scalar_{value}", np.array(value, np.int64))

    def add(self, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.op("Add", left, right)

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape; 0 keeps a dimension and −1 infers one."""
        return self.op("Reshape", x, self.ints(*shape))

    def gather(self, x: ir.Value, indices: ir.Value, axis: int) -> ir.Value:
        return self.op("Gather", x, indices, axis=axis)

    def split(self, x: ir.Value, *sizes: int) -> list[ir.Value]:
        """Cut the last axis into pieces of these sizes."""
        return self.multi_op("Split", x, self.ints(*sizes), outputs=len(sizes), axis=-1)

    def stack_rows(self, values: Sequence[ir.Value]) -> ir.Value:
        """Join numbers of rows along a new first axis: [B,S,1] each → [L,B,S]."""
        return self.op("Transpose", self.op("Concat", *values, axis=-1), perm=[2, 0, 1])

    def stack_heads(self, values: Sequence[ir.Value], heads: int) -> ir.Value:
        """Join rows of heads along a new first axis: [B,S,heads*D] each → [L,B,heads,S,D]."""
        rows = self.reshape(self.op("Concat", *values, axis=-1), 0, 0, len(values), heads, -1)
        return self.op("Transpose", rows, perm=[2, 0, 3, 1, 4])

    def rows_at(self, x: ir.Value, index: ir.Value) -> ir.Value:
        """Pick the row index[b] of each sequence: x [B,S,H], index [B] → [B,H]."""
        position = self.op("Unsqueeze", self.op("Cast", index, to=ir.DataType.INT64), self.ints(1))
        return self.op("GatherND", x, position, batch_dims=1)

    def l2_norm(self, x: ir.Value, norm: str) -> ir.Value:
        """Length of each row that the norm ``norm`` put out: [..., H] → [..., 1].

        As the model has it, also where calibration has divided the norm's weight.
        """
        divisors = self._weights.input_divisors(f"{norm}.weight")
        if divisors is not None:
            x = self.op("Mul", x, self._initializer(divisors))
        return self.op("ReduceL2", x, self.ints(-1), keepdims=1)

    # --- layers ---

    def linear(
        self,
        x: ir.Value,
        name: str,
        *,
        bias: bool,
        storage: Storage | None = None,
        padding: Padding = NO_PADDING,
    ) -> ir.Value:
        """``torch.nn.Linear`` whose weight is ``{name}.weight``: [..., K] → [..., N]."""
        return self.fused_linear(x, [name], name, bias=bias, storage=storage, padding=padding)

    def fused_linear(
        self,
        x: ir.Value,
        layers: Sequence[str],
        name: str,
        *,
        bias: bool,
        storage: Storage | None = None,
        padding: Padding = NO_PADDING,
    ) -> ir.Value:
        """Several linear layers of the same input as one: outputs lie side by side in the last axis."""
        groups = self._weights.fused_groups([f"{layer}.weight" for layer in layers])
        if len(groups) == 1:
            return self._matmul(x, groups[0], name, bias, storage, padding)
        # Layers that a quantized checkpoint stores in different ways.
        products = [
            self._matmul(x, group, f"{name}.{index}", bias, storage, padding)
            for index, group in enumerate(groups)
        ]
        return self.op("Concat", *products, axis=-1)

    def _matmul(
        self,
        x: ir.Value,
        weights: Sequence[str],
        name: str,
        bias: bool,
        storage: Storage | None,
        padding: Padding,
    ) -> ir.Value:
        stored = self._weights.linear(weights, name, storage or self._storage, padding)
        weight = self._initializer(stored.values)
        if stored.input_order is not None:
            x = self.op("Gather", x, self._initializer(stored.input_order), axis=-1)
        if stored.scales is not None:
            inputs = [weight, self._initializer(stored.scales)]
            if stored.zero_points is not None:
                inputs.append(self._initializer(stored.zero_points))
            weight = self.op("DequantizeLinear", *inputs, axis=0, block_size=stored.block_size)
        product = self.op("MatMul", x, weight)
        if not bias:
            return product
        biases = [weight.removesuffix(".weight") + ".bias" for weight in weights]
        vector = self._weights.vector(biases, f"{name}.bias", padding.outputs)
        return self.add(product, self._initializer(vector))

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """Root-mean-square norm over the last axis with the weight ``{name}.weight``, computed in float32."""
        weight = self._initializer(self._weights.vector([f"{name}.weight"], f"{name}.weight"))
        return self.op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """``torch.nn.LayerNorm`` over the last axis with weight and bias, computed in float32."""
        names = (f"{name}.weight", f"{name}.bias")
        weight, bias = (self._initializer(self._weights.vector([part], part)) for part in names)
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon, stash_type=1)

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        """``x * sigmoid(1.702 * x)``, the activation of CLIP."""
        factor = self._constant("quick_gelu_factor", np.array(1.702, np.float32))
        return self.op("Mul", x, self.op("Sigmoid", self.op("Mul", x, factor)))

    def gated_mlp(self, x: ir.Value, name: str, intermediate: int, *, bias: bool) -> ir.Value:
        """``down(silu(gate(x)) * up(x))``.

        Widths that quantization blocks don't divide are filled up with zeros, which changes no result.
        """
        layers = [f"{name}.gate_proj", f"{name}.up_proj"]
        width = self._weights.padded(intermediate, self._storage, [f"{name}.down_proj.weight"])
        outer, inner = (NO_PADDING, NO_PADDING)
        if width != intermediate:
            outer, inner = Padding(outputs=width), Padding(inputs=width)
        gate_up = self.fused_linear(x, layers, f"{name}.gate_up_proj", bias=bias, padding=outer)
        gate, up = self.split(gate_up, width, width)
        silu = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.linear(self.op("Mul", silu, up), f"{name}.down_proj", bias=bias, padding=inner)

    def rotary(self, x: ir.Value, cos: ir.Value, sin: ir.Value, heads: int) -> ir.Value:
        """Rotate each head's halves: x [B,S,heads*D], cos and sin [B,S,D/2]."""
        return self.op("RotaryEmbedding", x, cos, sin, num_heads=heads, interleaved=0)

    def last_rows(self, x: ir.Value, count: int) -> ir.Value:
        """The last rows: [B,S,N] → [B,min(count,S),N]."""
        return self.op("Slice", x, self.ints(-count), self.ints(_TO_THE_END), self.ints(1))

    def kv_attention(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        past_k: ir.Value,
        past_v: ir.Value,
        kv_len: ir.Value,
        past_extent: ir.Value,
        *,
        heads: int,
        kv_heads: int,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Append to the cache and attend to it, see :mod:`starkv.onnx_ops` → (out, present_k, present_v)."""
        inputs = (q, k, v, past_k, past_v, kv_len, past_extent)
        out, present_k, present_v = self.multi_op(
            KV_ATTENTION, *inputs, outputs=3, domain=DOMAIN, num_heads=heads, kv_num_heads=kv_heads
        )
        return out, present_k, present_v

    def full_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int) -> ir.Value:
        """Every token sees every token: [1,N,heads*D] each → [1,N,heads*D]."""
        return self.op(FULL_ATTENTION, q, k, v, domain=DOMAIN, num_heads=heads)

    def masked_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value, heads: int) -> ir.Value:
        """Attention inside each batch entry: [W,n,heads*D] each, mask bool [W,1,n,n] → [W,n,heads*D]."""
        return self.op("Attention", q, k, v, mask, q_num_heads=heads, kv_num_heads=heads)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = str(tensor.name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self._initializers[name] = value
        return value

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        if name in self._initializers:
            return self._initializers[name]
        return self._initializer(ir.tensor(array, name=name))
