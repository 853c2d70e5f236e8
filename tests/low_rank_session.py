# SPDX-License-Identifier: Apache-2.0
"""Runs ``LowRankKVAttention`` alone in ONNX Runtime."""

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
from decoder_runner import open_session
from low_rank_cases import Arrays

from starkv.onnx_low_rank import OUTPUTS, low_rank_function
from starkv.onnx_low_rank_shape import LaneStorage, LowRankShape
from starkv.onnx_ops import DOMAIN, DOMAIN_VERSION, OPSET

_TYPES = {
    "k_codes": {"int4": onnx.TensorProto.UINT8, "int8": onnx.TensorProto.INT8},
    "v_codes": {"int4": onnx.TensorProto.UINT8, "int8": onnx.TensorProto.INT8},
}
_INTEGERS = ("packed_len", "positions", "tail_len")
_RANKS = {"packed_len": 1, "tail_len": 1, "k_bias": 1, "v_bias": 1, "up_k": 2, "up_v": 2, "cos_table": 2} | {
    "sin_table": 2,
    "k_scales": 4,
    "tail_k": 4,
    "tail_v": 4,
    "present_tail_k": 4,
    "present_tail_v": 4,
}


def model_of(shape: LowRankShape, scales: int = onnx.TensorProto.FLOAT) -> bytes:
    """A model that is one call of the operator, with scales of this type."""
    function = low_rank_function(shape)

    def declare(name: str) -> onnx.ValueInfoProto:
        element = _TYPES.get(name, {}).get(shape.storage, onnx.TensorProto.FLOAT)
        if name in _INTEGERS:
            element = onnx.TensorProto.INT32
        if name in ("k_scales", "v_scales"):
            element = scales
        return onnx.helper.make_tensor_value_info(name, element, [None] * _RANKS.get(name, 3))

    node = onnx.helper.make_node(function.name, function.input, function.output, domain=DOMAIN)
    graph = onnx.helper.make_graph(
        [node], "one_node", [declare(name) for name in function.input], [declare(name) for name in OUTPUTS]
    )
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@cache
def session(shape: LowRankShape) -> ort.InferenceSession:
    return open_session(model_of(shape))


def run(shape: LowRankShape, feeds: Arrays) -> list[np.ndarray]:
    return session(shape).run(None, feeds)


GQA = {"heads": 14, "kv_heads": 2, "head_dim": 8, "key_ranks": (5, 8), "value_rank": 13}
SHAPES = {
    "one key factor per head, 7 queries each": GQA,
    "no grouping of queries": GQA | {"heads": 2},
    "one key factor for both heads": GQA | {"key_ranks": (11,)},
    "two heads to a factor, ranks over a tile": {
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 16,
        "key_ranks": (17, 32),
        "value_rank": 50,
    },
    "ranks too small for outliers": GQA | {"key_ranks": (1, 4), "value_rank": 3},
    "full ranks": {"heads": 4, "kv_heads": 2, "head_dim": 16, "key_ranks": (16, 16), "value_rank": 32},
}
STORAGES: tuple[LaneStorage, ...] = ("int4", "int8", "float")


def shape_of(name: str, storage: LaneStorage, *, sections: bool = True) -> LowRankShape:
    sizes = SHAPES[name]
    half = sizes["head_dim"] // 2
    section = (1, half // 2, half - half // 2 - 1) if sections else (half,)
    return LowRankShape(**sizes, mrope_section=section, storage=storage)
