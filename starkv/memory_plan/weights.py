# SPDX-License-Identifier: Apache-2.0
"""Bytes of weights in the TensorRT dialect, as ``export/lower/trt.py`` stores them.

Which weights there are, and their shapes, is read where the export checks a checkpoint
(``export/models/tensor_shapes.py``).
"""

from dataclasses import dataclass
from math import prod

from starkv.export.models.config import ModelConfig
from starkv.export.models.tensor_shapes import (
    TEXT,
    Shapes,
    qwen2_5_tower_shapes,
    qwen2_tower_shapes,
    text_shapes,
)
from starkv.export.quantize.blockwise import fitting_block_size
from starkv.manifest import Quantization, TextShape, VisionShape

NATIVE_BLOCKS = (64, 128)
"""Inputs that share a scale of a 4-bit weight which TensorRT multiplies with as it is."""
CALIBRATED = "int4-awq"
"""Preset whose decoder also stores what the outputs of each layer's first norm were divided by."""
_WIDE, _NARROW = 4, 2
"""Bytes of a float32 number, and of one in the compute dtype."""
_STORED = {"bf16": 2, "fp16": 2, "fp32": 4}
_EMBEDDING, _HEAD = f"{TEXT}.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights. Constants of the graphs, a few bytes each, are left out."""

    vision: int
    layers: int
    """Of the text decoder, its last norm included."""
    head: int
    """The weight that makes logits."""
    largest: int
    """The largest of the weights in 4 bits, were it expanded to 16; 0 without any."""
    embedding: int
    """In host memory: its rows are looked up there, in a file that is mapped."""

    @property
    def decoder(self) -> int:
        """Of the decoder's engine."""
        return self.layers + self.head

    @property
    def device(self) -> int:
        """In device memory."""
        return self.vision + self.decoder


def weight_bytes(text: TextShape, vision: VisionShape, quantization: Quantization) -> WeightBytes:
    """Bytes of all weights.

    A weight [K, N] of a linear layer takes 2·K·N bytes in 16 bits. One in 4 bits takes K·N/2 for its codes
    and 2·N·K/block for its scales where 64 or 128 inputs share one; with smaller blocks, and in 8 bits, it is
    expanded to 16 (``export/lower/trt_weights.py``). Biases have 16 bits, norms 32
    (``export/lower/compute_dtype.py``). The width of a gated MLP is filled up to whole blocks
    (``WeightWriter.padded``).
    """
    config = ModelConfig(text, vision, norm_epsilon=0.0)
    shapes = text_shapes(config)
    embedding, head = shapes.pop(_EMBEDDING), shapes.pop(_HEAD, None)
    decoder = _Stored(quantization.decoder, quantization.block_size)
    logits = _Stored(quantization.head, quantization.block_size)
    layers = decoder.bytes_of(shapes)
    if quantization.preset == CALIBRATED:
        layers += text.layers * text.hidden * _WIDE
    tower_shapes = qwen2_tower_shapes if vision.window_size is None else qwen2_5_tower_shapes
    tower = _Stored(quantization.vision, quantization.block_size)
    return WeightBytes(
        vision=tower.bytes_of(tower_shapes(config)),
        layers=layers,
        head=logits.bytes_of({_HEAD: head or embedding}),
        largest=_largest_native(decoder, logits, text),
        embedding=prod(embedding) * _STORED[quantization.embedding],
    )


@dataclass(frozen=True)
class _Stored:
    """How the linear layers of one group are stored."""

    storage: str
    block_size: int | None

    def bytes_of(self, shapes: Shapes) -> int:
        return sum(self._tensor(name, shape) for name, shape in shapes.items())

    def _tensor(self, name: str, shape: tuple[int, ...]) -> int:
        outputs, features = shape[0], prod(shape[1:])
        if ".gate_proj." in name or ".up_proj." in name:
            outputs = self._padded(outputs)
        if ".down_proj.weight" in name:
            features = self._padded(features)
        if len(shape) == 1:
            return outputs * (_WIDE if "norm" in name or "ln_q" in name else _NARROW)
        # The patch projection is never quantized.
        return self.matrix(features, outputs) if "patch_embed" not in name else features * outputs * _NARROW

    def native_block(self, features: int) -> int | None:
        """Inputs that share a scale of a weight that stays in 4 bits, or None."""
        if self.storage != "int4" or self.block_size is None:
            return None
        block = fitting_block_size(features, self.block_size)
        return block if block in NATIVE_BLOCKS else None

    def matrix(self, features: int, outputs: int) -> int:
        """Bytes of a weight [features, outputs]."""
        block = self.native_block(features)
        if block is None:
            return features * outputs * _NARROW
        return features * outputs // 2 + features // block * outputs * _NARROW

    def _padded(self, width: int) -> int:
        if self.storage == "fp32" or self.block_size is None:
            return width
        if fitting_block_size(width, self.block_size) is not None:
            return width
        return -(-width // self.block_size) * self.block_size


def _largest_native(decoder: _Stored, head: _Stored, text: TextShape) -> int:
    """Bytes in 16 bits of the largest weight that stays in 4."""
    hidden, intermediate = text.hidden, text.intermediate
    width = text.heads * text.head_dim
    candidates = [
        (decoder, hidden, 2 * intermediate),
        (decoder, intermediate, hidden),
        (decoder, width, hidden),
        (head, hidden, text.vocab),
    ]
    native = [
        features * outputs * _NARROW
        for stored, features, outputs in candidates
        if stored.native_block(features) is not None
    ]
    return max(native, default=0)
