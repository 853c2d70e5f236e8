# SPDX-License-Identifier: Apache-2.0
"""A small random Qwen2.5-VL checkpoint whose weights are all far from their defaults, so losing one shows."""

import json
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from starkv.export.cards import ModelCard

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 2, 4, 2, 64, 256, 300
MROPE_SECTION = [8, 12, 12]


def tiny_config(tied: bool) -> Qwen2_5_VLConfig:
    text = {
        "hidden_size": HIDDEN,
        "intermediate_size": 384,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE_SECTION},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "window_size": 112,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=290,
        video_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
        tie_word_embeddings=tied,
    )


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Give every weight a random value; those of norms lie around 1."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            centre = 0.0 if name.endswith("bias") else 1.0
            weight.copy_(centre + 0.3 * torch.randn_like(weight))
        else:
            weight.copy_(0.08 * torch.randn_like(weight))


def make_tiny_model(
    folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32
) -> Qwen2_5_VLForConditionalGeneration:
    """Save a random model with its side files into ``folder`` and return it in eval mode."""
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(tied)).eval()
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return model


def tiny_card(**changes: object) -> ModelCard:
    fields = {
        "name": "tiny",
        "family": "qwen2_5_vl",
        "licence": "Apache-2.0",
        "folder": "tiny",
        "coordinates": "absolute",
        "prompt": "plain",
        "min_pixels": 3136,
        "max_pixels": 50176,
        "quantization": "fp32",
        "observation_window": 8,
        "max_context": 512,
    }
    return ModelCard.model_validate(fields | changes)
