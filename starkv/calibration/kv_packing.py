# SPDX-License-Identifier: Apache-2.0
"""From statistics to a packing: scales, or factors and ranks."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from starkv.calibration.kv_sensitivity import LayerFactors, Sensitivity
from starkv.calibration.kv_statistics import Biases, KvStatistics
from starkv.errors import UsageError
from starkv.kv_packing.file import Packing
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.options import PackingOptions, code_bits
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.kv_packing.retarget import LATENTS, folded
from starkv.lowrank.factor import key_metric, output_pca, value_metric
from starkv.lowrank.latent_format import LatentFormat
from starkv.lowrank.plan import FLOOR, LayerSpectra, RankPlan, flat_plan, plan_ranks
from starkv.lowrank.quantized_rows import Bits, row_quantization

RECENT_ROWS = 16
"""Newest rows of a prompt that stay as they are: those that a reply looks at most."""


def make_packing(
    options: PackingOptions,
    statistics: KvStatistics,
    biases: Sequence[Biases],
    output_weights: Sequence[NDArray[np.floating]],
    sensitivities: Callable[[Sequence[LayerFactors], float], Sequence[Sensitivity]] | None = None,
) -> Packing:
    """Work out scales, or factors and ranks.

    Args:
        options: what is asked for.
        statistics: of the model's keys and values.
        biases: of each layer.
        output_weights: ``[hidden, Hq * D]`` of each layer's output projection.
        sensitivities: measures layers at a share of their rank; the same ranks everywhere without it.

    Raises:
        UsageError: no ranks reach the share that is asked for.
    """
    if options.rank is None:
        bits = code_bits(options.quant)
        assert bits is not None, "options ask for codes or a rank"
        return quantized_packing(bits, statistics, biases)
    latent = LATENTS[options.quant]
    factors = layer_factors(statistics, biases, output_weights)
    plan = plan_of(factors, options.rank, latent, sensitivities)
    layers = []
    for layer, ranks in zip(factors, plan.layers, strict=True):
        assert ranks is not None
        truncated = layer.truncated(ranks.keys, ranks.values)
        layers.append(folded(truncated) if latent.quantized else truncated)
    return LowRankPacking(latent, tuple(layers), RECENT_ROWS)


def layer_factors(
    statistics: KvStatistics, biases: Sequence[Biases], output_weights: Sequence[NDArray[np.floating]]
) -> list[LayerFactors]:
    """Output PCA of each layer: an error of a key counts as queries are long, one of a value as the output
    projection carries it."""
    found = []
    for layer, (key_bias, value_bias), weight in zip(statistics.layers, biases, output_weights, strict=True):
        energies = np.split(layer.query_energies, len(layer.key_moments))
        keys = [
            output_pca(moment, key_metric(of_group))
            for moment, of_group in zip(layer.key_moments, energies, strict=True)
        ]
        values = output_pca(layer.value_moment, value_metric(weight, *value_bias.shape))
        both = (bias.astype(np.float64) for bias in (key_bias, value_bias))
        found.append(LayerFactors(tuple(keys), values, *both))
    return found


def plan_of(
    factors: Sequence[LayerFactors],
    share: float,
    latent: LatentFormat,
    sensitivities: Callable[[Sequence[LayerFactors], float], Sequence[Sensitivity]] | None,
) -> RankPlan:
    """Ranks for the bytes that the same share of rank everywhere would take.

    Raises:
        UsageError: the least ranks take more.
    """
    energies = [(tuple(key.energies for key in layer.keys), layer.values.energies) for layer in factors]
    dense = factors[0].key_bias.size * 2 * np.dtype(np.float32).itemsize
    check_share(share, min(len(channels) for keys, values in energies for channels in (*keys, values)))
    flat = flat_plan(share, [LayerSpectra(*both) for both in energies], latent, dense)
    if sensitivities is None or share == 1:
        return flat
    measured = sensitivities(factors, share)
    spectra = [
        LayerSpectra(*both, key_sensitivity=each.keys, value_sensitivity=each.values)
        for both, each in zip(energies, measured, strict=True)
    ]
    return plan_ranks(spectra, latent, dense, flat.total_bytes)


def check_share(share: float, narrowest: int) -> None:
    """Refuse a share of rank that is nearer to no rank at all than to the least one.

    Args:
        share: of full rank.
        narrowest: channels of the narrowest group of keys, or of a layer's values.

    Raises:
        UsageError: it is.
    """
    if share * narrowest < FLOOR / 2:
        raise UsageError(
            f"a KV rank of {share:g} can't be reached: the least rank is {FLOOR} of {narrowest} channels; "
            f"give --kv-rank {FLOOR / narrowest:.2g} or more"
        )


def quantized_packing(bits: Bits, statistics: KvStatistics, biases: Sequence[Biases]) -> QuantizedPacking:
    """Static scales of every layer.

    Args:
        bits: of a code.
        statistics: of the model's keys and values.
        biases: of each layer.
    """
    # By the largest magnitude, also with four bits: clicks hang on the few large numbers, and scales with a
    # smaller squared error, which cut them off, change the logits more.
    layers = tuple(
        row_quantization(layer, bits, key_bias.astype(np.float64), value_bias.astype(np.float64))
        for layer, (key_bias, value_bias) in zip(statistics.layers, biases, strict=True)
    )
    return QuantizedPacking(bits, layers)
