# SPDX-License-Identifier: Apache-2.0
"""starkv's operators as TensorRT's plugins.

Function bodies go: parsers before 10.7 prefer a body to a plugin of the same name. The names of plugin and
version are attributes that the ONNX parser looks for (onnx-tensorrt, FallbackPluginImporter).
"""

import onnx_ir as ir

from starkv.export.lower.graph_edit import remove_unused
from starkv.methods.star_kv_config import Pooling
from starkv.onnx_compress import COMPRESS
from starkv.onnx_ops import DOMAIN, KV_ATTENTION
from starkv.trt_compat.plugins import NAMESPACE, VERSION

PLUGIN_NAMES = {COMPRESS: "KVCompress"}
"""Operators whose plugin has another name. TensorRT's parser looks at names without their domain, and its
static checks refuse ONNX's own Compress (onnx-tensorrt 10.1, onnxOpCheckers.cpp)."""
POOLING: Pooling = "avgpool"
POOLING_KERNEL = 5
"""How window scores are pooled, as in the exported ``compress.onnx``, whose definition has it built in."""
_PAST_EXTENT = 6
"""Input of KVAttention that only carries a shape."""


def lower_plugins(model: ir.Model) -> None:
    """Mark starkv's nodes as plugins and drop the functions that define them.

    ``past_extent`` is no input any more: the plugin reads only its shape, and TensorRT's int8 tensors are
    quantized ones. The lengths take its place.
    """
    graph = model.graph
    for node in graph:
        if node.domain != DOMAIN:
            continue
        if node.op_type == KV_ATTENTION:
            node.replace_input_with(_PAST_EXTENT, node.inputs[_PAST_EXTENT - 1])
        elif node.op_type == COMPRESS:
            node.attributes["pooling"] = ir.AttrString("pooling", POOLING)
            node.attributes["pooling_kernel"] = ir.AttrInt64("pooling_kernel", POOLING_KERNEL)
        node.op_type = PLUGIN_NAMES.get(node.op_type, node.op_type)
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", NAMESPACE)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", VERSION)
    model.functions.clear()
    remove_unused(graph)
    graph.inputs[:] = [value for value in graph.inputs if value.name != "past_extent"]
