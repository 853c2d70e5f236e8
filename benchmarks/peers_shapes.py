# SPDX-License-Identifier: Apache-2.0
"""Text decoders of Qwen2.5 in three sizes, as a Qwen2.5-VL ``config.json`` with next to no vision tower."""

from dataclasses import dataclass
from typing import Any

ROPE_THETA = 1e6
NORM_EPSILON = 1e-6
MAX_POSITIONS = 32768


@dataclass(frozen=True)
class TextSize:
    """Sizes of a text decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    """Whether the embedding is also the head."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def multiplied_weights(self) -> int:
        """Weights that every decoded token is multiplied with: all layers and the head."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    def kv_row_bytes(self, item_size: int) -> int:
        """Bytes of one token's keys and values with numbers of ``item_size`` bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * item_size


SIZES = {
    "0.5b": TextSize(896, 24, 14, 2, 4864, 151936, tied=True),
    "1.5b": TextSize(1536, 28, 12, 2, 8960, 151936, tied=True),
    "7b": TextSize(3584, 28, 28, 4, 18944, 152064, tied=False),
}
"""Those of Qwen2.5-0.5B, Qwen2.5-1.5B and Qwen2.5-7B; the last is also UI-TARS-1.5-7B's."""


def checkpoint_config(size: TextSize) -> dict[str, Any]:
    """``config.json`` of a Qwen2.5-VL checkpoint with this text decoder and one tiny vision block."""
    half = size.head_dim // 2
    height = 3 * half // 8
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_THETA,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * height, height, height]},
        "max_position_embeddings": MAX_POSITIONS,
        "use_sliding_window": False,
        "tie_word_embeddings": size.tied,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [0],
            "hidden_act": "silu",
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
    }
