# SPDX-License-Identifier: Apache-2.0
"""The codec of an engine that was built with packing."""

from pathlib import Path

import numpy as np

from starkv.errors import UsageError
from starkv.kv_packing.file import PACKING_NAME, load_packing
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.rotary import Rotary
from starkv.manifest import KvPacking, Manifest, TextShape
from starkv.runtime.kv.low_rank import LowRankCodec
from starkv.runtime.kv.packed import PACKABLE_METHODS, KvCodec
from starkv.runtime.kv.quantized import QuantizedCodec
from starkv.runtime.preprocess.rope import inverse_frequencies


def rotary_of(text: TextShape) -> Rotary:
    """How the decoder's positions turn into angles."""
    frequencies = inverse_frequencies(text.head_dim, text.rope_theta)
    return Rotary(frequencies.astype(np.float64), tuple(text.mrope_section or (text.head_dim // 2,)))


def open_codec(directory: Path, manifest: Manifest) -> KvCodec | None:
    """Read an engine's packing; None if it was built without.

    Raises:
        EngineError: its file is missing or damaged.
    """
    if manifest.kv_packing is None:
        return None
    packing, rotary = load_packing(directory / PACKING_NAME), rotary_of(manifest.text)
    if isinstance(packing, QuantizedPacking):
        return QuantizedCodec(packing, rotary, manifest.text)
    return LowRankCodec(packing, rotary, manifest.text, packing_name(manifest.kv_packing))


def packing_name(packing: KvPacking) -> str:
    """Such as ``int8`` or ``rank 0.5 int4``."""
    rank = [] if packing.rank is None else [f"rank {packing.rank:g}"]
    return " ".join([*rank, *([] if packing.quant == "none" else [packing.quant])])


def require_codec(codec: KvCodec | None, manifest: Manifest) -> KvCodec:
    """The codec.

    Raises:
        UsageError: the engine has none.
    """
    if codec is None:
        raise UsageError(
            f"this engine of {manifest.name} was built without packing; build one with "
            "`starkv build … --kv-quant int8` or `--kv-rank 0.5`"
        )
    return codec


def check_packable(method: str) -> None:
    """Refuse a method whose rows can't be packed.

    Raises:
        UsageError: it keeps other rows for every head.
    """
    if method not in PACKABLE_METHODS:
        raise UsageError(
            f"the KV method {method} keeps other rows for every head, which can't be packed; "
            f"choose one of {', '.join(PACKABLE_METHODS)}, or an unpacked cache"
        )
