# SPDX-License-Identifier: Apache-2.0
"""Bytes of the graphs' inputs and outputs in device memory, caches left out.

As ``runtime/engines/trt*.py`` allocate them: those of an image, of a prefill call and of a compression are
there while it runs; those of decoding are there as long as the pool, once for every number of sequences that
it has decoded. Names, shapes and dtypes are those of the TensorRT dialect (``export/lower/trt.py``,
docs/tensorrt-plugin.md). Symbols: B sequences, S new tokens, L layers.
"""

from collections.abc import Mapping

from starkv.export.build.trt_vision_bounds import VisionSizes
from starkv.export.models.config import IMAGE_CHANNELS
from starkv.manifest import TextShape, VisionShape
from starkv.methods.rows import ROW_COLUMNS
from starkv.methods.star_kv_plan import StarKVPlan
from starkv.runtime.engines.stepping import chunk_lengths
from starkv.trt_compat.running import ALIGNMENT

_LONG, _WIDE, _NARROW, _BYTE = 8, 4, 2, 1
"""Bytes of an int64, of a float32 or int32, of a number in the compute dtype, of a bool."""
_FRAME, _LIMITS = 5, 3
"""Numbers that describe a compression's newest screenshot, and its budget."""
_DRAWS = ("temperature", "top_p", "uniform")

Buffers = Mapping[str, int]
"""Tensor → bytes."""


def decoder_inputs(text: TextShape, sequences: int, rows: int) -> Buffers:
    """Inputs of a step with B = ``sequences`` and S = ``rows``."""
    tokens = sequences * rows
    return {
        "inputs_embeds": tokens * text.hidden * _WIDE,
        "rope_cos": tokens * text.head_dim // 2 * _WIDE,
        "rope_sin": tokens * text.head_dim // 2 * _WIDE,
        "kv_len": text.layers * sequences * _WIDE,
        "last_index": sequences * _WIDE,
    }


def decoder_outputs(text: TextShape, window: int, sequences: int, rows: int) -> Buffers:
    """Outputs of a step whose q_window has at most ``window`` rows."""
    queries = text.layers * sequences * text.heads * min(window, rows) * text.head_dim
    return {
        "q_window": queries * _NARROW,
        "hidden_norm": text.layers * sequences * rows * _WIDE,
        "logits": sequences * text.vocab * _WIDE,
    }


def prefill_bytes(text: TextShape, window: int, prompt_rows: int, prefill_rows: int) -> int:
    """Most bytes during the calls of a prompt's prefill.

    Args:
        text: sizes of the decoder.
        window: observation window.
        prompt_rows: of the prompt.
        prefill_rows: most rows of a call.
    """
    calls = chunk_lengths(prompt_rows, prefill_rows, window)
    return max(_call_bytes(text, window, rows, index > 0) for index, rows in enumerate(calls))


def _call_bytes(text: TextShape, window: int, rows: int, again: bool) -> int:
    """Of one call; the queries of the call before are there until the new ones have a place."""
    outputs = decoder_outputs(text, window, 1, rows)
    queries = (2 if again else 1) * outputs["q_window"]
    return sum(decoder_inputs(text, 1, rows).values()) + max(sum(outputs.values()), queries)


def decode_bytes(text: TextShape, sessions: int) -> int:
    """Bytes of the decode steps of a pool that has decoded every number of sequences up to ``sessions``."""
    return sum(step_bytes(text, sequences) for sequences in range(1, sessions + 1))


def step_bytes(text: TextShape, sequences: int) -> int:
    """Bytes of one decode step: inputs in one block, outputs, picked tokens."""
    inputs = {**decoder_inputs(text, sequences, 1), **dict.fromkeys(_DRAWS, sequences * _WIDE)}
    block = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in inputs.values())
    return block + sum(decoder_outputs(text, 1, sequences, 1).values()) + sequences * _WIDE


def vision_bytes(vision: VisionShape, outputs: int, image: VisionSizes) -> int:
    """Bytes of an image's inputs and outputs; the indices are only there where the tower has windows.

    Args:
        vision: sizes of the tower.
        outputs: width of an image token.
        image: its sizes.
    """
    values = IMAGE_CHANNELS * vision.temporal_patch_size * vision.patch_size**2
    tables = 2 * image.slots * vision.head_dim // 2 * _WIDE
    floats = image.patches * values * _WIDE + tables + image.tokens * outputs * _WIDE
    if vision.window_size is None:
        return floats
    gathers = (2 * image.slots + image.patches + image.tokens) * _LONG
    return floats + gathers + image.slots * _BYTE


def compress_bytes(
    text: TextShape,
    windows: tuple[int, int],
    capacity: int,
    slots: int,
    slot_capacity: int,
    cells: int,
) -> int:
    """Bytes during a compression by STaR-KV, the arena's queries included.

    Args:
        text: sizes of the decoder.
        windows: rows of queries that the prefill left, and those of them that score.
        capacity: of the arena.
        slots: of the pool.
        slot_capacity: of each.
        cells: tokens of the largest screenshot, as many as a pattern holds.
    """
    layers, heads = text.layers, text.layers * text.kv_heads
    left, scoring = windows
    query = layers * text.heads * text.head_dim * _NARROW
    queries = (left + (scoring if scoring != left else 0)) * query
    arena = layers * capacity * (_WIDE + ROW_COLUMNS * _WIDE)
    state = (heads + heads * cells + layers) * _WIDE
    plan = (_FRAME + len(StarKVPlan.__dataclass_fields__) + 1 + layers) * _WIDE + _LIMITS * _LONG
    pool = layers * slots * slot_capacity * ROW_COLUMNS * _WIDE
    results = layers * _WIDE + layers * slot_capacity * _LONG + layers * capacity * (_WIDE + 4 * _WIDE)
    return queries + arena + 2 * state + plan + pool + results
