# SPDX-License-Identifier: Apache-2.0
"""Bytes of the graphs' inputs and outputs in device memory, caches left out.

Names, shapes and dtypes are those of the TensorRT dialect (``export/lower/trt.py``, docs/tensorrt-plugin.md).
Symbols: B sequences, S new tokens, L layers, C and E rows of capacity.
"""

from starkv.export.build.trt_vision_bounds import VisionSizes
from starkv.export.models.config import IMAGE_CHANNELS
from starkv.manifest import TextShape, VisionShape

_LONG, _WIDE, _NARROW, _BYTE = 8, 4, 2, 1
"""Bytes of an int64, of a float32 or int32, of a number in the compute dtype, of a bool."""

Buffers = dict[str, int]
"""Tensor → bytes."""


def decoder_buffers(text: TextShape, window: int, sequences: int, rows: int) -> Buffers:
    """Of a decoder step with ``sequences`` of B and ``rows`` of S."""
    tokens = sequences * rows
    queries = text.layers * sequences * text.heads * min(window, rows) * text.head_dim
    return {
        "inputs_embeds": tokens * text.hidden * _WIDE,
        "rope_cos": tokens * text.head_dim // 2 * _WIDE,
        "rope_sin": tokens * text.head_dim // 2 * _WIDE,
        "kv_len": text.layers * sequences * _WIDE,
        "last_index": sequences * _WIDE,
        "logits": sequences * text.vocab * _WIDE,
        "q_window": queries * _NARROW,
        "hidden_norm": text.layers * tokens * _WIDE,
    }


def vision_buffers(vision: VisionShape, outputs: int, image: VisionSizes) -> Buffers:
    """Of the tower; the indices only where it has windows.

    Args:
        vision: sizes of the tower.
        outputs: width of an image token.
        image: its sizes.
    """
    values = IMAGE_CHANNELS * vision.temporal_patch_size * vision.patch_size**2
    table = image.slots * vision.head_dim // 2 * _WIDE
    buffers = {
        "pixel_values": image.patches * values * _WIDE,
        "rope_cos": table,
        "rope_sin": table,
        "image_embeds": image.tokens * outputs * _WIDE,
    }
    if vision.window_size is not None:
        buffers |= {
            "gather_idx": image.slots * _LONG,
            "window_valid": image.slots * _BYTE,
            "real_slots": image.patches * _LONG,
            "back_slots": image.slots * _LONG,
            "unpad_idx": image.tokens * _LONG,
        }
    return buffers
