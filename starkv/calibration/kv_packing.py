# SPDX-License-Identifier: Apache-2.0
"""From statistics to a packing: scales, or factors and ranks."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from starkv.calibration.kv_statistics import Biases, KvStatistics
from starkv.kv_packing.file import Packing
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.options import KvQuant, PackingOptions
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.factor import key_metric, output_pca
from starkv.lowrank.hadamard import fold, random_rotation
from starkv.lowrank.latent_format import FLOAT32, INT8, NIBBLES, LatentFormat, key_bytes
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.plan import LayerSpectra, SplitBudget, flat_plan, plan_ranks
from starkv.lowrank.quantized_rows import Bits, row_quantization
from starkv.lowrank.statistics import LayerStatistics

RECENT_ROWS = 16
"""Newest rows of a prompt that stay as they are: those that a reply looks at most."""
_LATENTS: dict[KvQuant, LatentFormat] = {"none": FLOAT32, "int8": INT8, "int4": NIBBLES}
_BITS: dict[KvQuant, Bits] = {"int8": 8, "int4": 4}


def make_packing(options: PackingOptions, statistics: KvStatistics, biases: Sequence[Biases]) -> Packing:
    """Work out scales, or factors and ranks.

    Raises:
        UsageError: no ranks reach the share that is asked for.
    """
    if options.rank is None:
        return _quantized(_BITS[options.quant], statistics, biases)
    return _low_rank(options.rank, _LATENTS[options.quant], statistics, biases)


def _low_rank(
    share: float, latent: LatentFormat, statistics: KvStatistics, biases: Sequence[Biases]
) -> LowRankPacking:
    """Output PCA, the query-pair metric for keys; ranks where they keep the most energy."""
    decompositions = [
        (
            [output_pca(moment, key_metric(energies)) for moment, energies in _key_groups(layer)],
            output_pca(layer.value_moment),
        )
        for layer in statistics.layers
    ]
    spectra = [
        LayerSpectra(tuple(key.energies for key in keys), values.energies) for keys, values in decompositions
    ]
    dense = biases[0][0].size * 2 * np.dtype(np.float32).itemsize
    flat = flat_plan(share, spectra, latent, dense)
    key_share = sum(key_bytes(ranks.keys, latent) for ranks in flat.layers if ranks is not None)
    plan = plan_ranks(spectra, latent, dense, SplitBudget(key_share, flat.total_bytes - key_share))
    layers = []
    for (keys, values), ranks, (key_bias, value_bias) in zip(
        decompositions, plan.layers, biases, strict=True
    ):
        assert ranks is not None
        factors = [
            *(key.truncated(rank) for key, rank in zip(keys, ranks.keys, strict=True)),
            values.truncated(ranks.values),
        ]
        if latent.quantized:
            factors = [fold(factor, random_rotation(factor.rank)) for factor in factors]
        *of_keys, of_values = factors
        both = (bias.astype(np.float64) for bias in (key_bias, value_bias))
        layers.append(LowRankLayer(tuple(of_keys), of_values, *both))
    return LowRankPacking(latent, tuple(layers), RECENT_ROWS)


def _key_groups(layer: LayerStatistics) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Moment and query energies of each group of KV heads."""
    energies = np.split(layer.query_energies, len(layer.key_moments))
    return zip(layer.key_moments, energies, strict=True)


def _quantized(bits: Bits, statistics: KvStatistics, biases: Sequence[Biases]) -> QuantizedPacking:
    # By the largest magnitude, also with four bits: clicks hang on the few large numbers, and scales with a
    # smaller squared error, which cut them off, change the logits more.
    layers = tuple(
        row_quantization(layer, bits, key_bias.astype(np.float64), value_bias.astype(np.float64))
        for layer, (key_bias, value_bias) in zip(statistics.layers, biases, strict=True)
    )
    return QuantizedPacking(bits, layers)
