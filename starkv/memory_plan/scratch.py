# SPDX-License-Identifier: Apache-2.0
"""Bytes of activations: what TensorRT calls device memory of a context.

Nobody knows them before the build: TensorRT chooses what it fuses and what shares memory. The bounds here
are those of an executor that fuses nothing and frees what nothing reads any more: at each point of the
lowered graph, the tensors that are alive. Everything fused makes it less. After a build the manifest has
TensorRT's own figures (``TensorRTBuild.scratch_bytes``), which take the place of these.

Only one of vision, prefill, decode and compress runs at a time: they share one block, that of the largest.
"""

from dataclasses import dataclass

from starkv.export.build.trt_vision_bounds import VisionSizes
from starkv.export.models.config import IMAGE_CHANNELS
from starkv.kernels.c_abi import FULL_ATTENTION_HEAD_DIMS
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import TensorRTBuild, TextShape, VisionShape
from starkv.memory_plan.workspace import (
    attention_workspace,
    code_attention_workspace,
    compress_workspace,
)

_WIDE, _NARROW = 4, 2
"""Bytes of a float32 number, and of one in the compute dtype."""


@dataclass(frozen=True)
class Scratch:
    """Bytes of activations of each stage."""

    vision: int
    prefill: int
    decode: int
    compress: int
    measured: bool = False
    """They are TensorRT's own figures, not bounds."""

    @property
    def shared(self) -> int:
        """Of the one block that all stages use."""
        return max(self.vision, self.prefill, self.decode, self.compress)


@dataclass(frozen=True)
class Limits:
    """Largest sizes that an engine is built for."""

    prefill_rows: int
    """Rows of one prefill call."""
    cache_rows: int
    """Capacity of a cache."""
    sessions: int
    """Sequences of one decode step."""
    window: int
    """Observation window."""
    image: VisionSizes
    """Of one image: the largest of each size."""
    kv_bits: Bits | None
    """Of the codes that kept rows become; None where they stay as they are."""
    position_rows: int
    """Positions that attention to codes can tell apart."""


def measured_scratch(built: TensorRTBuild) -> Scratch:
    """What TensorRT said of an engine that is built."""
    found = built.scratch_bytes
    return Scratch(
        vision=found["vision"],
        prefill=found["decoder.prefill"],
        decode=found["decoder.decode"],
        compress=found["compress"],
        measured=True,
    )


def estimate_scratch(text: TextShape, vision: VisionShape, limits: Limits, expanded: int) -> Scratch:
    """Bounds for an engine that is not built yet.

    Args:
        text: sizes of the decoder.
        vision: sizes of the tower.
        limits: of the engine.
        expanded: bytes in 16 bits of the largest weight that is stored in 4: nothing obliges TensorRT to
            multiply without expanding it first.
    """
    attention = attention_workspace(text, 1, limits.cache_rows)
    batched = attention_workspace(text, limits.sessions, limits.cache_rows)
    if limits.kv_bits is not None:
        # One plugin attends to either cache.
        sizes = limits.sessions, limits.cache_rows, limits.position_rows
        batched = max(batched, code_attention_workspace(text, limits.kv_bits, *sizes))
    return Scratch(
        vision=vision_scratch(vision, text.hidden, limits.image),
        prefill=decoder_scratch(text, 1, limits.prefill_rows, limits.window) + attention + expanded,
        decode=decoder_scratch(text, limits.sessions, 1, limits.window) + batched + expanded,
        compress=compress_workspace(text, limits.window, limits.cache_rows, limits.cache_rows),
    )


def decoder_scratch(text: TextShape, sequences: int, rows: int, window: int) -> int:
    """Most bytes of a decoder step's tensors that are alive at once, plugins' workspace left out.

    H hidden, Q and K widths of queries and keys, I intermediate. For every row the residual stream (4·H) and,
    whichever is the most:

    * a norm in float32: its input's square or quotient, its product (3·4·H);
    * attention: the joint projection before and after its bias, or its three parts with one of them being
      rotated (2·2·(Q + 2·K) and 2·3·Q beside it);
    * the gated MLP: gate and up in one and apart, or both with sigmoid and silu (2·4·I).

    Beside them the rotary tables in 16 bits, and what each layer leaves for compression: the window's last
    queries, which are joined and transposed at the end (3 times), and the rows' norms.
    """
    batch = sequences * rows
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    norm = 3 * _WIDE * text.hidden
    attention = _NARROW * (2 * (queries + 2 * keys) + 3 * queries)
    mlp = _NARROW * 4 * text.intermediate
    row = _WIDE * text.hidden + max(norm, attention, mlp) + _NARROW * text.head_dim
    last = sequences * min(window, rows) * queries * _NARROW
    logits = sequences * text.vocab * _NARROW
    return batch * row + max(3 * text.layers * last, logits) + 2 * text.layers * batch * _WIDE


def vision_scratch(vision: VisionShape, outputs: int, image: VisionSizes) -> int:
    """Most bytes of the tower's tensors that are alive at once.

    As :func:`decoder_scratch`, h being the tower's width: for each slot of a padded window the residual
    stream (4·h) and a norm (3·4·h), attention or the MLP (2·4·I). Attention is the joint projection in its
    parts (2·8·h); or values (2·h) and in float32 the scores of a window of n patches before and after their
    softmax (2·4·n for each head), or those once and queries and keys (2·4·h). Scores of the whole image
    (2·4·N² for each head) are stored only where the plugin ``FullAttention`` does not take the tower's head
    dim; all models with a card are spared them.

    Args:
        vision: sizes of the tower.
        outputs: width of an image token.
        image: its sizes.
    """
    hidden, heads = vision.hidden, vision.heads
    window = 0 if vision.window_size is None else (vision.window_size // vision.patch_size) ** 2
    norm = 3 * _WIDE * hidden
    scores = heads * window
    attention = max(_NARROW * 8 * hidden, _NARROW * hidden + _WIDE * (scores + max(scores, 2 * hidden)))
    mlp = _NARROW * 4 * vision.intermediate
    slot = _WIDE * hidden + max(norm, attention, mlp)
    # Rotary tables in 16 bits, the mask and what is added to scores for it.
    kept = image.slots * (_NARROW * vision.head_dim + _WIDE * window)
    values = IMAGE_CHANNELS * vision.temporal_patch_size * vision.patch_size**2
    embedding = image.patches * _NARROW * (values + hidden)
    merged = image.tokens * _NARROW * (3 * vision.spatial_merge_size**2 * hidden + outputs)
    largest = kept + max(image.slots * slot, embedding, merged)
    if vision.head_dim not in FULL_ATTENTION_HEAD_DIMS:
        largest += 2 * _WIDE * heads * image.patches**2
    return largest
