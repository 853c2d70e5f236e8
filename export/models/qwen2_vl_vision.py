# SPDX-License-Identifier: Apache-2.0
"""The vision tower of Qwen2-VL: every patch sees the whole image, so there are no windows to plan.

Symbols: N patches, T merged tokens. Patches come merge block after merge block.
"""

import onnx_ir as ir

from starkv.export.graph import GraphBuilder
from starkv.export.models.config import IMAGE_CHANNELS, VISION_NORM_EPSILON, ModelConfig
from starkv.export.models.tensor_shapes import TOWER


def build_vision(graph: GraphBuilder, config: ModelConfig) -> None:
    """Write the forward pass into ``graph``."""
    shape = config.vision
    hidden, heads, half = shape.hidden, shape.heads, shape.head_dim // 2
    patch_values = IMAGE_CHANNELS * shape.temporal_patch_size * shape.patch_size**2

    pixels = graph.input("pixel_values", ir.DataType.FLOAT, ["N", patch_values])
    cos = graph.input("rope_cos", ir.DataType.FLOAT, ["N", half])
    sin = graph.input("rope_sin", ir.DataType.FLOAT, ["N", half])
    cos, sin = (graph.op("Unsqueeze", table, graph.ints(0)) for table in (cos, sin))

    # The patch convolution's stride is its kernel, so it is a linear layer over the patch's values.
    patches = graph.linear(pixels, f"{TOWER}.patch_embed.proj", bias=False, storage="fp32")
    x = graph.op("Unsqueeze", patches, graph.ints(0))

    for i in range(shape.depth):
        with graph.scope(f"blocks.{i}"):
            block = f"{TOWER}.blocks.{i}"
            h = graph.layer_norm(x, f"{block}.norm1", VISION_NORM_EPSILON)
            q, k, v = graph.split(graph.linear(h, f"{block}.attn.qkv", bias=True), hidden, hidden, hidden)
            q, k = graph.rotary(q, cos, sin, heads), graph.rotary(k, cos, sin, heads)
            h = graph.full_attention(q, k, v, heads)
            x = graph.add(x, graph.linear(h, f"{block}.attn.proj", bias=True))
            h = graph.layer_norm(x, f"{block}.norm2", VISION_NORM_EPSILON)
            h = graph.quick_gelu(graph.linear(h, f"{block}.mlp.fc1", bias=True))
            x = graph.add(x, graph.linear(h, f"{block}.mlp.fc2", bias=True))

    with graph.scope("merger"):
        merger = f"{TOWER}.merger"
        h = graph.layer_norm(x, f"{merger}.ln_q", VISION_NORM_EPSILON)
        h = graph.reshape(h, -1, hidden * shape.spatial_merge_size**2)
        h = graph.op("Gelu", graph.linear(h, f"{merger}.mlp.0", bias=True), approximate="none")
        embeds = graph.linear(h, f"{merger}.mlp.2", bias=True)
    graph.output(embeds, "image_embeds", ir.DataType.FLOAT, ["T", config.text.hidden])
