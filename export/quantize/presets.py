# SPDX-License-Identifier: Apache-2.0
"""Named choices of how each group of weights is stored."""

from dataclasses import dataclass, replace
from typing import Literal

from starkv.errors import UsageError
from starkv.export.quantize.columns import ImportedQuantization
from starkv.manifest import Quantization

Storage = Literal["fp32", "int8", "int4"]


@dataclass(frozen=True)
class Preset:
    """Storage of each group of weights.

    Vision tower and merger keep fp32: they are a small part of the weights, and coordinates break first
    there. The embedding keeps the checkpoint's dtype, because a row is looked up and never multiplied.
    """

    name: str
    decoder: Storage
    """Linear layers of the text decoder."""
    head: Storage
    vision: Storage = "fp32"
    calibrated: bool = False
    """Whether weights are scaled to the activations of calibration prompts before they are rounded."""
    keep_packed: bool = False
    """Whether integers of a checkpoint that is quantized already are stored as they are."""
    block_size: int = 128
    """Input features that share one scale, where it divides their number."""

    def describe(self, embedding: str, imported: ImportedQuantization | None = None) -> Quantization:
        """Return the manifest's record.

        Args:
            embedding: the checkpoint's dtype, e.g. ``bf16``.
            imported: what a quantized checkpoint's decoder is stored as.
        """
        quantized = {self.decoder, self.head, self.vision} != {"fp32"}
        block_size = self.block_size
        if self.keep_packed and imported is not None and imported.group_size > 0:
            block_size = imported.group_size
        return Quantization(
            preset=self.name,
            decoder=self.decoder,
            head=self.head,
            vision=self.vision,
            embedding=embedding,
            block_size=block_size if quantized else None,
        )


# The head decides between neighbouring coordinates: it keeps 8 bits even where the decoder has 4.
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("fp32", decoder="fp32", head="fp32"),
        Preset("int8", decoder="int8", head="int8"),
        Preset("int4", decoder="int4", head="int8"),
        Preset("int4-awq", decoder="int4", head="int8", calibrated=True),
        # For the smallest machines: nothing but norms, biases and the patch projection keeps 32 bits.
        Preset("int4-small", decoder="int4", head="int4", vision="int8"),
    )
}


def load_preset(name: str) -> Preset:
    """Find a preset by name.

    Raises:
        UsageError: no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown quantization {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_for(preset: Preset, imported: ImportedQuantization | None) -> Preset:
    """The preset that fits a checkpoint: one that is quantized already keeps its integers.

    Args:
        preset: asked for.
        imported: what the checkpoint is quantized with, if it is.

    Returns:
        For a quantized checkpoint a preset named after its method. Layers that it left in floating point are
        stored as ``preset`` says for the head and the vision tower, and as int8 in the decoder.

    Raises:
        UsageError: ``preset`` would round the integers a second time.
    """
    if imported is None or preset.name == "fp32" or preset.keep_packed:
        return preset
    if preset.calibrated:
        raise UsageError(
            f"the checkpoint is quantized already ({imported.method}, {imported.bits} bits), which "
            f"{preset.name} would do again; choose int8 or int4-small for the layers that it left out, or "
            "fp32 to undo it"
        )
    return replace(
        preset,
        name=imported.method,
        decoder="int4" if imported.bits == 4 else "int8",
        keep_packed=True,
    )
