# SPDX-License-Identifier: Apache-2.0
"""Canonical name and shape of every weight that the graphs read, from the sizes in ``config.json``.

Shapes are those of PyTorch: ``[outputs, inputs]`` for linear layers, ``[outputs, channels, frames, rows,
columns]`` for the patch convolution.
"""

from starkv.export.models.config import IMAGE_CHANNELS, ModelConfig

Shapes = dict[str, tuple[int, ...]]

TEXT = "model.language_model"
TOWER = "model.visual"


def text_shapes(config: ModelConfig) -> Shapes:
    """Weights of the decoder that all families share; without a head where it is the embedding."""
    shape = config.text
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes: Shapes = {f"{TEXT}.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        layer = f"{TEXT}.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (shape.hidden,)
        shapes |= _linear(f"{layer}.self_attn.q_proj", width, shape.hidden)
        shapes |= _linear(f"{layer}.self_attn.k_proj", kv_width, shape.hidden)
        shapes |= _linear(f"{layer}.self_attn.v_proj", kv_width, shape.hidden)
        shapes |= _linear(f"{layer}.self_attn.o_proj", shape.hidden, width, bias=False)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (shape.hidden,)
        shapes |= _linear(f"{layer}.mlp.gate_proj", shape.intermediate, shape.hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.up_proj", shape.intermediate, shape.hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.down_proj", shape.hidden, shape.intermediate, bias=False)
    shapes[f"{TEXT}.norm.weight"] = (shape.hidden,)
    if not shape.tied_embedding:
        shapes["lm_head.weight"] = (shape.vocab, shape.hidden)
    return shapes


def qwen2_5_tower_shapes(config: ModelConfig) -> Shapes:
    """Weights of Qwen2.5-VL's vision tower: RMSNorms and gated MLPs."""
    hidden, intermediate = config.vision.hidden, config.vision.intermediate
    shapes = _patch_embedding(config)
    for i in range(config.vision.depth):
        block = f"{TOWER}.blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (hidden,), f"{block}.norm2.weight": (hidden,)}
        shapes |= _vision_attention(block, hidden)
        shapes |= _linear(f"{block}.mlp.gate_proj", intermediate, hidden)
        shapes |= _linear(f"{block}.mlp.up_proj", intermediate, hidden)
        shapes |= _linear(f"{block}.mlp.down_proj", hidden, intermediate)
    return {**shapes, f"{TOWER}.merger.ln_q.weight": (hidden,), **_merger(config)}


def qwen2_tower_shapes(config: ModelConfig) -> Shapes:
    """Weights of Qwen2-VL's vision tower: LayerNorms and plain MLPs."""
    hidden, intermediate = config.vision.hidden, config.vision.intermediate
    shapes = _patch_embedding(config)
    for i in range(config.vision.depth):
        block = f"{TOWER}.blocks.{i}"
        shapes |= _layer_norm(f"{block}.norm1", hidden) | _layer_norm(f"{block}.norm2", hidden)
        shapes |= _vision_attention(block, hidden)
        shapes |= _linear(f"{block}.mlp.fc1", intermediate, hidden)
        shapes |= _linear(f"{block}.mlp.fc2", hidden, intermediate)
    return {**shapes, **_layer_norm(f"{TOWER}.merger.ln_q", hidden), **_merger(config)}


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def _layer_norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _patch_embedding(config: ModelConfig) -> Shapes:
    shape = config.vision
    kernel = (shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    return {f"{TOWER}.patch_embed.proj.weight": (shape.hidden, IMAGE_CHANNELS, *kernel)}


def _vision_attention(block: str, hidden: int) -> Shapes:
    return _linear(f"{block}.attn.qkv", 3 * hidden, hidden) | _linear(f"{block}.attn.proj", hidden, hidden)


def _merger(config: ModelConfig) -> Shapes:
    merged = config.vision.hidden * config.vision.spatial_merge_size**2
    return {
        **_linear(f"{TOWER}.merger.mlp.0", merged, merged),
        **_linear(f"{TOWER}.merger.mlp.2", config.text.hidden, merged),
    }
