# SPDX-License-Identifier: Apache-2.0
"""From statistics to a packing: scales, or factors and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from starkv.calibration.kv_statistics import Biases, KvStatistics
from starkv.errors import UsageError
from starkv.kv_packing.file import Packing
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.quantized_rows import Bits, RowQuantization, key_scales, value_scales

KvQuant = Literal["none", "int8", "int4"]
_BITS: dict[KvQuant, Bits] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class PackingOptions:
    """What the user asks for.

    Raises:
        UsageError: nothing is asked for, there is no such quantization, or the rank is outside (0, 1].
    """

    quant: KvQuant = "none"
    rank: float | None = None
    """Share of the cache's elements that latents have."""

    def __post_init__(self) -> None:
        if self.quant not in ("none", *_BITS):
            raise UsageError(f"unknown KV quantization {self.quant!r}; known: none, {', '.join(_BITS)}")
        if self.rank is not None and not 0 < self.rank <= 1:
            raise UsageError(
                f"a KV rank is a share of full rank in (0, 1], such as 0.5, not {self.rank:g}; for all channels "
                "leave --kv-rank out"
            )
        if self.quant == "none" and self.rank is None:
            raise UsageError("nothing to pack: give --kv-quant int8 or int4, --kv-rank, or both")

    @property
    def name(self) -> str:
        """Part of an engine directory's name, such as ``kv-int8`` or ``kv-r50-int4``."""
        rank = [] if self.rank is None else [f"r{self.rank * 100:g}"]
        return "-".join(["kv", *rank, *([] if self.quant == "none" else [self.quant])])


def make_packing(options: PackingOptions, statistics: KvStatistics, biases: Sequence[Biases]) -> Packing:
    """Work out what the options ask for."""
    return _quantized(_BITS[options.quant], statistics, biases)


def _quantized(bits: Bits, statistics: KvStatistics, biases: Sequence[Biases]) -> QuantizedPacking:
    layers = tuple(
        RowQuantization(
            bits,
            # By the largest magnitude, also with four bits: clicks hang on the few large numbers, and scales
            # with a smaller squared error, which cut them off, change the logits more.
            key_scales(layer.key_peaks, bits),
            value_scales(layer.value_peaks, bits),
            *(bias.astype(np.float64) for bias in of_layer),
        )
        for layer, of_layer in zip(statistics.layers, biases, strict=True)
    )
    return QuantizedPacking(bits, layers)
