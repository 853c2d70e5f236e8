# SPDX-License-Identifier: Apache-2.0
"""Packed caches: rows that are stored quantized, or as low-rank latents, once they are kept.

A prefill is exact and a method chooses rows by their exact keys; only what is kept is packed. A packed
sequence goes on by being unpacked into an arena, and packing it again changes little.
"""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError, UsageError
from starkv.lowrank.rotary import Rotary
from starkv.manifest import TextShape
from starkv.methods.names import FULL, RANDOM, STAR_KV, STREAMING_LLM
from starkv.runtime.kv.buffers import OTHER_ROWS, KvStore
from starkv.runtime.kv.parked import ParkedRows

PACKABLE_METHODS = (FULL, STAR_KV, STREAMING_LLM, RANDOM)
"""Those that keep the same rows for all heads of a layer: a latent of values has no heads, and a row one
position."""


NO_PACKING = (
    "this engine was built without a packed cache; make one with `starkv pack ENGINE --kv-quant int8`, "
    "`--kv-rank 0.5` or both, for ONNX Runtime on processors; for TensorRT build it with `--kv-quant int8`"
)
NO_POSITIONS = (
    "rows without a position can't be packed; make their tables with Rope.at, and choose a method that keeps "
    f"the same rows for all heads: {', '.join(PACKABLE_METHODS)}"
)


class PackedKv(KvStore):
    """A cache of packed rows."""

    @abstractmethod
    def pack(self, slot: int, source: KvStore) -> None:
        """Pack the rows of ``source``'s slot 0 into a slot, in place of what it holds.

        Args:
            slot: of this cache.
            source: floats, in the same memory as this cache.

        Raises:
            UsageError: there is no room, or a row's position is unknown.
            EngineError: a row is not made of numbers.
        """

    def _check_packable(self, source: KvStore) -> None:
        most = int(source.lengths.max())
        if most > self.capacity:
            raise UsageError(f"{most} kept rows do not fit a slot of {self.capacity}")
        for layer, rows in enumerate(source.lengths[:, 0]):
            if (source.positions[layer, 0, :rows] < 0).any():
                raise UsageError(NO_POSITIONS)

    def _note_packed(self, slot: int, source: KvStore) -> None:
        """Take over what is known of the rows."""
        rows = int(source.lengths.max())
        self.lengths[:, slot] = source.lengths[:, 0]
        self.row_meta[:, slot, :rows] = source.row_meta[:, 0, :rows]
        self.positions[:, slot, :rows] = source.positions[:, 0, :rows]


class KvCodec(ABC):
    """An engine's way of packing rows."""

    name: str
    """Such as ``int8`` or ``rank 0.5 int4``."""
    bytes_per_row: int
    """Of one token over all layers, with scales, padding and positions."""
    rotary: Rotary
    text: TextShape

    @abstractmethod
    def new_store(self, slots: int, rows: int) -> PackedKv:
        """An empty cache of ``slots`` sequences of up to ``rows`` rows."""

    @abstractmethod
    def is_of_this_packing(self, parked: ParkedRows) -> bool:
        """Whether parked rows have this packing's layers, widths and dtype."""

    def unpack(self, parked: ParkedRows) -> ParkedRows:
        """Parked rows of this codec as float32 ones, keys rotated and with their bias.

        Raises:
            UsageError: they are another codec's.
        """
        if not self.is_of_this_packing(parked):
            raise UsageError(OTHER_ROWS)
        return self._unpack(parked)

    @abstractmethod
    def _unpack(self, parked: ParkedRows) -> ParkedRows: ...


def check_numbers(layer: int, keys: NDArray[np.floating], values: NDArray[np.floating]) -> None:
    """Refuse rows that a packing would turn into others.

    Raises:
        EngineError: a number is not finite.
    """
    if not (np.isfinite(keys).all() and np.isfinite(values).all()):
        raise EngineError(
            f"keys or values of layer {layer} are not numbers: the model's activations overflowed; try "
            "another quantization"
        )


def head_major(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """``[rows, Hkv, D]`` → ``[Hkv, rows, D]`` f32, as caches store them."""
    return np.ascontiguousarray(rows.transpose(1, 0, 2), np.float32)
