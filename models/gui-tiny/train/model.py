# SPDX-License-Identifier: Apache-2.0
"""The architecture: Hugging Face's own Qwen2.5-VL class, only small."""

import math

import torch
from tokens import VOCABULARY_SIZE
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

PATCH, MERGE, WINDOW = 14, 2, 112
FIRST_LAYERS, LAYERS = 4, 6
"""Decoder layers at first, and once the model has grown."""
GROWN_AT = 2
"""New layers come in front of this one: behind those in which visual tokens learn what they show, and before
those that look at the target and write down where it is."""
CELL = PATCH * MERGE
"""Pixels per side of the square that one visual token covers."""


def build_config(tokenizer: PreTrainedTokenizerFast, layers: int) -> Qwen2_5_VLConfig:
    """Sizes that every backend's kernels take: head_dim 64, grouped queries, widths in blocks of 128."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            # Theta 10: with the usual 1e6 the w section turns by less than 0.001 rad per column, and a
            # screen of eight columns would look the same everywhere. Columns come last and turn slowest all
            # the same, so they get more of the pairs than Qwen's 3/8.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 10, 18]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
            "window_size": WINDOW,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, layers: int
) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model in fp32."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, layers))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            deviation = 0.02 if "embed_tokens" in name else 0.7 / math.sqrt(parameter.flatten(1).shape[1])
            torch.nn.init.normal_(parameter, 0.0, deviation)
    model.tie_weights()
    return model


def grow(
    small: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    """A model of ``LAYERS`` layers that computes the same: what the new ones write is zero at first."""
    model = build_model(tokenizer, seed, LAYERS)
    added = LAYERS - small.config.text_config.num_hidden_layers
    state = model.state_dict()
    for name, value in small.state_dict().items():
        head, layers, rest = name.partition("language_model.layers.")
        number, _, parameter = rest.partition(".")
        if layers and int(number) >= GROWN_AT:
            name = f"{head}{layers}{int(number) + added}.{parameter}"
        state[name] = value.float()
    for number in range(GROWN_AT, GROWN_AT + added):
        for parameter in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"model.language_model.layers.{number}.{parameter}.weight"].zero_()
    model.load_state_dict(state)
    model.tie_weights()
    return model
