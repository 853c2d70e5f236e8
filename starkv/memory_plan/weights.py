# SPDX-License-Identifier: Apache-2.0
"""Bytes of weights in the TensorRT dialect, as ``export/lower/trt.py`` stores them.

Which weights there are, and their shapes, is read where the export checks a checkpoint
(``export/models/tensor_shapes.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from starkv.export.models.config import ModelConfig
from starkv.export.models.tensor_shapes import TOWER, qwen2_5_tower_shapes, qwen2_tower_shapes, text_shapes
from starkv.export.quantize.blockwise import fitting_block_size
from starkv.manifest import ModelDescription, Quantization, TextShape, VisionShape

NATIVE_BLOCKS = (64, 128)
"""Inputs that share a scale of a 4-bit weight which TensorRT multiplies with as it is."""
CALIBRATED = "int4-awq"
"""Preset whose decoder also stores what the outputs of norms were divided by."""
_WIDE, _NARROW = 4, 2
"""Bytes of a float32 number, and of one in the compute dtype."""
_EMBEDDING_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights, constants of a few bytes left out."""

    vision: int
    layers: int
    """Layers of the text decoder and its last norm."""
    head: int
    """The weight that makes logits."""
    embedding: int
    """In host memory: its rows are looked up there, by a file that is mapped."""

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

    A weight [K, N] of a linear layer takes 2·K·N bytes in 16 bits. One in 4 bits takes K·N/2 for its codes and
    2·N·K/block for its scales, where 64 or 128 inputs share a scale; with smaller blocks, and in 8 bits, it is
    expanded to 16 (``export/lower/trt_weights.py``). Biases have 16 bits, norms 32
    (``export/lower/compute_dtype.py``). The width of a gated MLP is filled up to whole blocks
    (``WeightWriter.padded``).
    """
    config = ModelConfig(text, vision, norm_epsilon=0.0)
    embedding, head = f"{_EMBEDDING_NAME}.weight", f"{_HEAD_NAME}.weight"
    if text.tied_embedding:
        head = embedding
    shapes = text_shapes(config)
    decoder_layers = {name: shape for name, shape in shapes.items() if name not in (embedding, head)}
    layers = _Storage(quantization.decoder, quantization.block_size).total(decoder_layers)
    if quantization.preset == CALIBRATED:
        layers += text.layers * text.hidden * _WIDE
    heads = _Storage(quantization.head, quantization.block_size)
    tower_shapes = qwen2_tower_shapes if vision.window_size is None else qwen2_5_tower_shapes
    tower = _Storage(quantization.vision, quantization.block_size).total(tower_shapes(config))
    return WeightBytes(
        vision=tower,
        layers=layers,
        head=heads.matrix(*_inputs_outputs(shapes[head])),
        embedding=prod(shapes[embedding]) * _EMBEDDING_BYTES[quantization.embedding],
    )
