# SPDX-License-Identifier: Apache-2.0
"""Small configs of each family, as the Hub spells them, to make random checkpoints from."""

from typing import Any

Config = dict[str, Any]


def small_config(tied: bool = False) -> Config:
    """Qwen2.5-VL in the spelling of the Hub: the text decoder's sizes at the top."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": tied,
        "eos_token_id": 300,
        "image_token_id": 301,
        "video_token_id": 302,
        "vision_start_token_id": 303,
        "vision_end_token_id": 304,
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
    }


def qwen2_vl_config() -> Config:
    config = small_config(tied=True)
    return config | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vision_config": {"depth": 2, "embed_dim": 64, "mlp_ratio": 2, "num_heads": 2, "hidden_size": 128},
    }


def narrow() -> Config:
    """Sizes that keep a large vocabulary small on disk."""
    return {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
        "vision_config": small_config()["vision_config"] | {"out_hidden_size": 8},
    }


def opencua_config() -> Config:
    """Narrow, with the published vocabulary."""
    config = small_config() | narrow()
    vision = config.pop("vision_config")
    text = {name: value for name, value in config.items() if not name.endswith("token_id")}
    del text["rope_scaling"]
    return {
        "architectures": ["OpenCUAForConditionalGeneration"],
        "model_type": "opencua",
        "media_placeholder_token_id": 151664,
        "text_config": text | {"vocab_size": 152064, "hidden_size": 32, "intermediate_size": 32},
        "vision_config": vision | {"out_hidden_size": 32},
    }
