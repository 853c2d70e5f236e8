# SPDX-License-Identifier: Apache-2.0
"""Plugin nodes run by another implementation of the operator, on the fake card's memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.full_attention_call import FullAttentionCall, reference_full_attention
from starkv.kernels.packable_attention_call import PackableAttentionCall, reference_packable_attention
from starkv.kernels.plugin_driver import COMPRESS_INPUTS
from starkv.validation.implementations import Implementation
from starkv.validation.onnx_adapter import OnnxImplementation

Array = NDArray[Any]
DOMAIN = "ai.starkv"
ALIASES = {
    "KVAttention": {1: 3, 2: 4},
    "KVCompress": {0: 12, 1: 13, 2: 14},
    "FullAttention": {},
    "PackableKVAttention": {1: 3, 2: 4, 3: 7, 4: 8},
}
"""Operator → output → input whose memory it shares (docs/tensorrt-plugin.md)."""


def reference() -> Implementation:
    """The operators' references: PyTorch for attention, the ONNX definition for compression."""
    definition = OnnxImplementation(threads=1)

    def attention(call: AttentionCall) -> tuple[torch.Tensor, ...]:
        out, keys, values = reference_attention(call)
        call.past_k.copy_(keys)
        call.past_v.copy_(values)
        return out, call.past_k, call.past_v

    return Implementation(
        "reference",
        definition.compress,
        attention,
        reference_full_attention,
        packable_attention=reference_packable_attention,
    )


def tensor_of(array: Array) -> torch.Tensor:
    """A tensor on the array's memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor: torch.Tensor, dtype: Any) -> Array:
    if tensor.dtype == torch.bfloat16:
        array: Array = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.astype(dtype, copy=False)
    array = tensor.contiguous().numpy()
    return array.astype(dtype, copy=False)


def run_plugin(
    implementation: Implementation, node: onnx.NodeProto, values: Mapping[str, Array]
) -> dict[str, Array]:
    """Outputs of a plugin node. Inputs that outputs alias are written in place."""
    inputs = [tensor_of(values[name]) for name in node.input]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return _RUNNERS[node.op_type](implementation, node, inputs, attributes)


def _kv_attention(
    implementation: Implementation, node: onnx.NodeProto, inputs: list[torch.Tensor], attributes: Any
) -> dict[str, Array]:
    assert implementation.attention is not None
    call = AttentionCall(*inputs[:6])
    assert call.heads == attributes["num_heads"]
    assert call.past_k.shape[1] == attributes["kv_num_heads"]
    out, keys, values = implementation.attention(call)
    dtype = _numpy(inputs[0])
    _keep((call.past_k, call.past_v), (keys, values))
    return dict(zip(node.output, (array_of(x, dtype) for x in (out, call.past_k, call.past_v)), strict=True))


def _full_attention(
    implementation: Implementation, node: onnx.NodeProto, inputs: list[torch.Tensor], attributes: Any
) -> dict[str, Array]:
    assert implementation.full_attention is not None
    out = implementation.full_attention(FullAttentionCall(*inputs, attributes["num_heads"]))
    return {node.output[0]: array_of(out, _numpy(inputs[0]))}


def _packable_attention(
    implementation: Implementation, node: onnx.NodeProto, inputs: list[torch.Tensor], attributes: Any
) -> dict[str, Array]:
    assert implementation.packable_attention is not None
    carrier = inputs[7].dtype
    code_type = {8: torch.int8, 4: torch.uint8}[attributes["bits"]]
    codes = [tensor.view(code_type) for tensor in inputs[7:9]]
    call = PackableAttentionCall(*inputs[:6], *codes, *inputs[9:], tuple(attributes["mrope_section"]))
    assert call.of_floats.heads == attributes["num_heads"]
    assert call.past_k.shape[1] == attributes["kv_num_heads"]
    out, *presents = implementation.packable_attention(call)
    _keep((call.past_k, call.past_v, *codes), presents)
    dtype = _numpy(inputs[0])
    floats = [array_of(tensor, dtype) for tensor in (out, call.past_k, call.past_v)]
    return dict(zip(node.output, [*floats, *(code.view(carrier).numpy() for code in codes)], strict=True))


def _compress(
    implementation: Implementation, node: onnx.NodeProto, inputs: list[torch.Tensor], attributes: Any
) -> dict[str, Array]:
    assert implementation.compress is not None
    fields = dict(zip(COMPRESS_INPUTS, inputs, strict=True))
    pooling = attributes.get("pooling", b"avgpool").decode()
    call = CompressCall(**fields, pooling=pooling, pooling_kernel=attributes.get("pooling_kernel", 5))
    result: CompressResult = implementation.compress(call)
    dtype = _numpy(inputs[0])
    moved = [array_of(x, dtype) for x in (call.dst_k, call.dst_v)] + [call.dst_meta.numpy()]
    others = [result.new_len, result.rows, result.scores, result.stages]
    state = [result.mi_ema, result.pattern_ema, result.temperature]
    return dict(zip(node.output, moved + [x.numpy() for x in others + state], strict=True))


def _keep(caches: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
    """Whoever wrote elsewhere: the aliased memory holds the result."""
    for own, new in zip(caches, results, strict=True):
        if new.data_ptr() != own.data_ptr():
            own.copy_(new)


def _numpy(tensor: torch.Tensor) -> Any:
    kinds: dict[torch.dtype, Any] = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
    return kinds.get(tensor.dtype, np.float32)


_RUNNERS: dict[str, Callable[..., dict[str, Array]]] = {
    "KVAttention": _kv_attention,
    "FullAttention": _full_attention,
    "KVCompress": _compress,
    "PackableKVAttention": _packable_attention,
}
