# SPDX-License-Identifier: Apache-2.0
"""Factors with float latents, as training leaves them, made ready for a cache of another format."""

from dataclasses import replace

from starkv.errors import UsageError
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.options import KvQuant
from starkv.lowrank.hadamard import fold, random_rotation
from starkv.lowrank.latent_format import FLOAT32, INT8, NIBBLES, LatentFormat
from starkv.lowrank.layer import LowRankLayer
from starkv.manifest import TextShape

LATENTS: dict[KvQuant, LatentFormat] = {"none": FLOAT32, "int8": INT8, "int4": NIBBLES}
"""How latents of each quantization are stored."""


def packing_from_factors(packing: LowRankPacking, quant: KvQuant) -> LowRankPacking:
    """The same factors for latents of another format.

    For int8 and int4 a block Hadamard rotation is folded into them. It is the same for a rank wherever it is
    made, so factors that were trained for int4 meet the latents that they were trained with.

    Args:
        packing: with float latents.
        quant: of the cache.

    Raises:
        UsageError: the latents are quantized, so a rotation is folded in already.
    """
    if packing.latent.quantized:
        raise UsageError(
            f"these factors are for latents of the format {packing.latent.name} already; give the file that "
            "`starkv train-kv` wrote"
        )
    latent = LATENTS[quant]
    layers = tuple(folded(layer) for layer in packing.layers) if latent.quantized else packing.layers
    return replace(packing, latent=latent, layers=layers)


def check_factors(packing: LowRankPacking, text: TextShape, source: str) -> None:
    """Refuse factors of a model of other sizes.

    Args:
        packing: with factors.
        text: the model's sizes.
        source: where the factors come from, such as the file's name.

    Raises:
        UsageError: layers, heads or head sizes differ.
    """
    expected = (text.kv_heads, text.head_dim)
    shapes = {layer.key_bias.shape for layer in packing.layers}
    if len(packing.layers) != text.layers or shapes != {expected}:
        raise UsageError(
            f"{source} holds factors of {len(packing.layers)} layers with KV heads of {sorted(shapes)}, but "
            f"the model has {text.layers} with {expected}; train factors of it with `starkv train-kv`"
        )


def folded(layer: LowRankLayer) -> LowRankLayer:
    """The same function, with latents that quantize well."""
    keys = tuple(fold(factor, random_rotation(factor.rank)) for factor in layer.keys)
    values = fold(layer.values, random_rotation(layer.values.rank))
    return replace(layer, keys=keys, values=values)
