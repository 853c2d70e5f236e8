# SPDX-License-Identifier: Apache-2.0
"""The vision tower of Qwen2.5-VL, right for every image size.

Windows at the image's edge hold fewer patches than others. Here every window is padded to full size and
the tower runs on the padded sequence, so a window layer is a reshape and one masked attention; layers that
see the whole image pick out the real patches first. The host works out all indices from the image's size.
Symbols: N patches, M padded slots, nW windows, T merged tokens.
"""

import onnx_ir as ir

from starkv.export.graph import GraphBuilder
from starkv.export.models.config import IMAGE_CHANNELS, VISION_NORM_EPSILON, ModelConfig
from starkv.export.models.tensor_shapes import TOWER


def build_vision(graph: GraphBuilder, config: ModelConfig) -> None:
    """Write the forward pass into ``graph``.

    Raises:
        ValueError: the tower has no windows.
    """
    shape = config.vision
    hidden, heads, half = shape.hidden, shape.heads, shape.head_dim // 2
    patch_values = IMAGE_CHANNELS * shape.temporal_patch_size * shape.patch_size**2
    if shape.window_size is None:
        raise ValueError("this tower attends within windows, but the config has no window_size")
    window_patches = (shape.window_size // shape.patch_size) ** 2

    pixels = graph.input("pixel_values", ir.DataType.FLOAT, ["N", patch_values])
    cos = graph.input("rope_cos", ir.DataType.FLOAT, ["M", half])
    sin = graph.input("rope_sin", ir.DataType.FLOAT, ["M", half])
    gather_idx = graph.input("gather_idx", ir.DataType.INT64, ["M"])
    window_valid = graph.input("window_valid", ir.DataType.BOOL, ["nW", window_patches])
    real_slots = graph.input("real_slots", ir.DataType.INT64, ["N"])
    back_slots = graph.input("back_slots", ir.DataType.INT64, ["M"])
    unpad_idx = graph.input("unpad_idx", ir.DataType.INT64, ["T"])

    cos, sin = (graph.op("Unsqueeze", table, graph.ints(0)) for table in (cos, sin))
    # [nW,1,n,n]: ONNX Runtime doesn't broadcast a mask over the queries.
    mask = graph.op("Unsqueeze", window_valid, graph.ints(1, 2))
    mask = graph.op("Expand", mask, graph.ints(1, 1, window_patches, 1))

    # The patch convolution's stride is its kernel, so it is a linear layer over the patch's values.
    patches = graph.linear(pixels, f"{TOWER}.patch_embed.proj", bias=False, storage="fp32")
    x = graph.op("Unsqueeze", graph.gather(patches, gather_idx, axis=0), graph.ints(0))

    for i in range(shape.depth):
        with graph.scope(f"blocks.{i}"):
            block = f"{TOWER}.blocks.{i}"
            h = graph.rms_norm(x, f"{block}.norm1", VISION_NORM_EPSILON)
            q, k, v = graph.split(graph.linear(h, f"{block}.attn.qkv", bias=True), hidden, hidden, hidden)
            q, k = graph.rotary(q, cos, sin, heads), graph.rotary(k, cos, sin, heads)
            if i in shape.full_attention_blocks:
                q, k, v = (graph.gather(rows, real_slots, axis=1) for rows in (q, k, v))
                h = graph.gather(graph.full_attention(q, k, v, heads), back_slots, axis=1)
            else:
                q, k, v = (graph.reshape(rows, -1, window_patches, hidden) for rows in (q, k, v))
                h = graph.reshape(graph.masked_attention(q, k, v, mask, heads), 1, -1, hidden)
            x = graph.add(x, graph.linear(h, f"{block}.attn.proj", bias=True))
            h = graph.rms_norm(x, f"{block}.norm2", VISION_NORM_EPSILON)
            x = graph.add(x, graph.gated_mlp(h, f"{block}.mlp", shape.intermediate, bias=True))

    with graph.scope("merger"):
        merger = f"{TOWER}.merger"
        h = graph.rms_norm(x, f"{merger}.ln_q", VISION_NORM_EPSILON)
        h = graph.reshape(h, -1, hidden * shape.spatial_merge_size**2)
        h = graph.gather(h, unpad_idx, axis=0)
        h = graph.op("Gelu", graph.linear(h, f"{merger}.mlp.0", bias=True), approximate="none")
        embeds = graph.linear(h, f"{merger}.mlp.2", bias=True)
    graph.output(embeds, "image_embeds", ir.DataType.FLOAT, ["T", config.text.hidden])
