# SPDX-License-Identifier: Apache-2.0
"""The codec of an engine that was built with packing."""

from pathlib import Path

import numpy as np

from starkv.errors import UsageError
from starkv.kv_packing.file import PACKING_NAME, load_packing
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.rotary import Rotary
from starkv.manifest import Manifest, TextShape
from starkv.runtime.engines.base import PackingInfo
from starkv.runtime.kv.low_rank import LowRankCodec
from starkv.runtime.kv.packed import NO_PACKING, KvCodec
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
    return LowRankCodec(packing, rotary, manifest.text, manifest.kv_packing.describe())


def packing_info(codec: KvCodec | None) -> PackingInfo | None:
    """What an engine with this codec says of itself."""
    if codec is None:
        return None
    raw = codec.packing.recent_rows if isinstance(codec, LowRankCodec) else None
    return PackingInfo(codec.name, codec.bytes_per_row, raw)


def require_codec(codec: KvCodec | None) -> KvCodec:
    """The codec.

    Raises:
        UsageError: the engine has none.
    """
    if codec is None:
        raise UsageError(NO_PACKING)
    return codec
