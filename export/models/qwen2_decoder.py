# SPDX-License-Identifier: Apache-2.0
"""The text decoder of all families, Qwen2 in its parts: one graph for prefill and decode.

Symbols: B sequences, S new tokens, P rows cached before, C rows of cache capacity, V vocabulary.
Positions enter as ``rope_cos`` and ``rope_sin`` and the cache's length as ``kv_len``, so a compacted cache,
where row and position differ, needs nothing special here.
"""

import onnx_ir as ir

from starkv.export.graph import Dim, GraphBuilder
from starkv.export.models.config import ModelConfig
from starkv.export.models.tensor_shapes import TEXT
from starkv.export.quantize.presets import Storage

EMBEDDING = f"{TEXT}.embed_tokens"
HEAD = "lm_head"


def build_decoder(
    graph: GraphBuilder, config: ModelConfig, observation_window: int, head: str, head_storage: Storage
) -> None:
    """Write the forward pass into ``graph``.

    Args:
        graph: collects nodes and weights.
        config: sizes.
        observation_window: W, how many of the last queries are put out.
        head: layer whose weight makes logits: ``lm_head``, or the embedding where the two are tied.
        head_storage: storage of that weight.
    """
    shape = config.text
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    half = shape.head_dim // 2
    cache: list[Dim] = ["B", shape.kv_heads, "C", shape.head_dim]

    x = graph.input("inputs_embeds", ir.DataType.FLOAT, ["B", "S", shape.hidden])
    cos = graph.input("rope_cos", ir.DataType.FLOAT, ["B", "S", half])
    sin = graph.input("rope_sin", ir.DataType.FLOAT, ["B", "S", half])
    kv_len = graph.input("kv_len", ir.DataType.INT32, [shape.layers, "B"])
    past_extent = graph.input("past_extent", ir.DataType.INT8, ["P"])
    last_index = graph.input("last_index", ir.DataType.INT32, ["B"])
    past_k = [graph.input(f"past_k.{i}", ir.DataType.FLOAT, cache) for i in range(shape.layers)]
    past_v = [graph.input(f"past_v.{i}", ir.DataType.FLOAT, cache) for i in range(shape.layers)]

    present_k, present_v, windows, norms = [], [], [], []
    for i in range(shape.layers):
        with graph.scope(f"layers.{i}"):
            layer = f"{TEXT}.layers.{i}"
            attention = f"{layer}.self_attn"

            h = graph.rms_norm(x, f"{layer}.input_layernorm", config.norm_epsilon)
            norms.append(graph.l2_norm(h, f"{layer}.input_layernorm"))
            projections = [f"{attention}.{name}_proj" for name in "qkv"]
            qkv = graph.fused_linear(h, projections, f"{attention}.qkv_proj", bias=True)
            q, k, v = graph.split(qkv, width, kv_width, kv_width)
            q = graph.rotary(q, cos, sin, shape.heads)
            k = graph.rotary(k, cos, sin, shape.kv_heads)
            windows.append(graph.last_rows(q, observation_window))
            layer_len = graph.gather(kv_len, graph.scalar(i), axis=0)
            h, new_k, new_v = graph.kv_attention(
                q,
                k,
                v,
                past_k[i],
                past_v[i],
                layer_len,
                past_extent,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
            )
            present_k.append(new_k)
            present_v.append(new_v)
            x = graph.add(x, graph.linear(h, f"{attention}.o_proj", bias=False))

            h = graph.rms_norm(x, f"{layer}.post_attention_layernorm", config.norm_epsilon)
            x = graph.add(x, graph.gated_mlp(h, f"{layer}.mlp", shape.intermediate, bias=False))

    with graph.scope("head"):
        # Rows are picked before the head: full-sequence logits would be gigabytes.
        last = graph.rms_norm(graph.rows_at(x, last_index), f"{TEXT}.norm", config.norm_epsilon)
        logits = graph.linear(last, head, bias=False, storage=head_storage)

    graph.output(logits, "logits", ir.DataType.FLOAT, ["B", shape.vocab])
    for i in range(shape.layers):
        graph.output(present_k[i], f"present_k.{i}", ir.DataType.FLOAT, cache)
        graph.output(present_v[i], f"present_v.{i}", ir.DataType.FLOAT, cache)
    window_shape: list[Dim] = [shape.layers, "B", shape.heads, "window", shape.head_dim]
    graph.output(graph.stack_heads(windows, shape.heads), "q_window", ir.DataType.FLOAT, window_shape)
    graph.output(graph.stack_rows(norms), "hidden_norm", ir.DataType.FLOAT, [shape.layers, "B", "S"])
