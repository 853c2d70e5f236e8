# SPDX-License-Identifier: Apache-2.0
"""The operators' ONNX definitions in ONNX Runtime, behind the interface of the other implementations.

ONNX Runtime's CPU provider works in float32, so caches of other types are widened before the call and their
kept rows narrowed after it, which is exact.
"""

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from starkv.kernels.attention_call import AttentionCall
from starkv.kernels.c_abi_quantized import QUANTIZED_INPUTS
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.full_attention_call import FullAttentionCall
from starkv.kernels.quantized_attention_call import QuantizedAttentionCall
from starkv.onnx_ops import (
    DOMAIN,
    DOMAIN_VERSION,
    FULL_ATTENTION,
    KV_ATTENTION,
    OPSET,
    standard_functions,
)

Array = NDArray[Any]


class OnnxImplementation:
    """Runs the definitions on the processor, wherever the tensors are."""

    def __init__(self, threads: int = 0) -> None:
        """Sessions are opened when first needed.

        Args:
            threads: of ONNX Runtime; 0: its own choice.
        """
        self._threads = threads
        self._sessions: dict[tuple[object, ...], Any] = {}

    def compress(self, call: CompressCall) -> CompressResult:
        """``Compress``; ``dst_*`` of the call are written.

        Raises:
            UsageError: tensors don't fit each other.
        """
        from starkv.onnx_compress import COMPRESS, compress_model

        call.check()
        key = (COMPRESS, call.pooling, call.pooling_kernel)
        if key not in self._sessions:
            model = compress_model(COMPRESS, None, call.pooling, call.pooling_kernel)
            self._sessions[key] = self._open(model.SerializeToString())
        session = self._sessions[key]
        feeds = {item.name: _array(getattr(call, item.name)) for item in session.get_inputs()}
        names = [item.name for item in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        result = CompressResult.empty_for(call)
        rows = outputs["rows"].shape[-1]
        result.rows.fill_(-1)
        result.rows[..., :rows] = torch.from_numpy(outputs["rows"])
        fields = {"new_len": result.new_len, "scores": result.scores, "stages": result.stages}
        state = {"new_mi_ema": result.mi_ema, "new_temperature": result.temperature}
        moved = {"new_k": call.dst_k, "new_v": call.dst_v, "new_meta": call.dst_meta}
        pattern = {"new_pattern_ema": result.pattern_ema}
        for name, tensor in {**fields, **state, **moved, **pattern}.items():
            tensor.copy_(torch.from_numpy(outputs[name]))
        return result

    def attention(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """``KVAttention``: ``out`` and both caches in the call's dtype.

        Raises:
            UsageError: tensors don't fit each other.
        """
        call.check()
        groups, dim = call.past_k.shape[1], call.past_k.shape[3]
        key = (KV_ATTENTION, call.heads, groups, dim)
        if key not in self._sessions:
            function = standard_functions()[KV_ATTENTION]
            model = _model_of(function, num_heads=call.heads, kv_num_heads=groups)
            self._sessions[key] = self._open(model)
        feeds = {name: _array(getattr(call, name)) for name in ("q", "k", "v", "past_k", "past_v", "kv_len")}
        feeds["past_extent"] = np.zeros(int(call.kv_len.max()), np.int8)
        outputs = self._sessions[key].run(["out", "present_k", "present_v"], feeds)
        out, keys, values = (torch.from_numpy(array).to(call.q) for array in outputs)
        return out, keys, values

    def quantized_attention(self, call: QuantizedAttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """``QuantizedKVAttention``: ``out`` in the call's dtype, and both caches.

        Raises:
            UsageError: tensors don't fit each other.
        """
        from starkv.onnx_quantized_kv import QUANTIZED_KV_ATTENTION, quantized_kv_function

        call.check()
        attributes: dict[str, int | list[int]] = {
            "num_heads": call.heads,
            "kv_num_heads": int(call.past_k.shape[1]),
            "bits": call.bits,
            "mrope_section": list(call.mrope_section),
        }
        key = (QUANTIZED_KV_ATTENTION, str(attributes))
        if key not in self._sessions:
            self._sessions[key] = self._open(_model_of(quantized_kv_function(), **attributes))
        feeds = {name: _array(getattr(call, name)) for name in QUANTIZED_INPUTS}
        # It looks rows up that no query sees; any place in the tables will do for those.
        feeds["positions"] = feeds["positions"].clip(0, len(call.cos_table) - 1)
        outputs = self._sessions[key].run(["out", "present_k", "present_v"], feeds)
        out, keys, values = map(torch.from_numpy, outputs)
        return out.to(call.q), keys.to(call.past_k.device), values.to(call.past_v.device)

    def full_attention(self, call: FullAttentionCall) -> Tensor:
        """``FullAttention`` in the call's dtype.

        Raises:
            UsageError: tensors don't fit each other.
        """
        call.check()
        key = (FULL_ATTENTION, call.heads)
        if key not in self._sessions:
            function = standard_functions()[FULL_ATTENTION]
            self._sessions[key] = self._open(_model_of(function, num_heads=call.heads))
        feeds = {name: _array(getattr(call, name)) for name in ("q", "k", "v")}
        return torch.from_numpy(self._sessions[key].run(["out"], feeds)[0]).to(call.q)

    def _open(self, model: bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _array(tensor: Tensor) -> Array:
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    array: Array = wide.cpu().numpy()
    return array


def _model_of(function: onnx.FunctionProto, **attributes: int | list[int]) -> bytes:
    """A model that is one node of an operator of attention."""
    node = onnx.helper.make_node(function.name, function.input, function.output, domain=DOMAIN, **attributes)
    codes = onnx.TensorProto.UINT8 if attributes.get("bits") == 4 else onnx.TensorProto.INT8
    types = {"kv_len": onnx.TensorProto.INT32, "positions": onnx.TensorProto.INT32}
    types["past_extent"] = onnx.TensorProto.INT8
    if "bits" in attributes:
        types |= dict.fromkeys(("past_k", "past_v", "present_k", "present_v"), codes)
    ranks = dict.fromkeys(("kv_len", "past_extent", "k_scale", "v_scale", "k_bias", "v_bias"), 1)
    ranks |= dict.fromkeys(("q", "k", "v", "out", "positions"), 3)
    ranks |= dict.fromkeys(("cos_table", "sin_table"), 2)

    def declare(name: str) -> onnx.ValueInfoProto:
        element = types.get(name, onnx.TensorProto.FLOAT)
        shape = [f"{name}_{axis}" for axis in range(ranks.get(name, 4))]
        return onnx.helper.make_tensor_value_info(name, element, shape)

    inputs, outputs = ([declare(name) for name in side] for side in (function.input, function.output))
    graph = onnx.helper.make_graph([node], function.name, inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    return bytes(model.SerializeToString())
