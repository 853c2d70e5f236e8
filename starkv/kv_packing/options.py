# SPDX-License-Identifier: Apache-2.0
"""What a user can ask of a packed cache."""

from dataclasses import dataclass
from typing import Literal

from starkv.errors import UsageError
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import packing_words

KvQuant = Literal["none", "int8", "int4"]


def parse_kv_quant(name: str) -> KvQuant:
    """Check the name of a cache's quantization.

    Raises:
        UsageError: there is none of that name.
    """
    if name == "int8":
        return "int8"
    if name == "int4":
        return "int4"
    if name == "none":
        return "none"
    raise UsageError(f"unknown KV quantization {name!r}; known: none, int8, int4")


_BITS: dict[KvQuant, Bits] = {"int8": 8, "int4": 4}


def code_bits(name: str) -> Bits | None:
    """Bits of a code of that quantization; None where rows stay floats.

    Raises:
        UsageError: there is none of that name.
    """
    return _BITS.get(parse_kv_quant(name))


@dataclass(frozen=True)
class PackingOptions:
    """How kept rows are to be packed.

    Raises:
        UsageError: nothing is asked for, or the rank is outside (0, 1].
    """

    quant: KvQuant = "none"
    rank: float | None = None
    """Share of the cache's elements that latents have. 1 keeps all channels, and quantizes them per token."""

    def __post_init__(self) -> None:
        if self.rank is not None and not 0 < self.rank <= 1:
            raise UsageError(
                f"a KV rank is a share of full rank in (0, 1], such as 0.5, not {self.rank:g}; for all "
                "channels leave --kv-rank out"
            )
        if self.quant == "none" and self.rank is None:
            raise UsageError("nothing to pack: give --kv-quant int8 or int4, --kv-rank, or both")

    @classmethod
    def of_codes(cls, bits: Bits) -> "PackingOptions":
        """Codes of so many bits with static scales."""
        return cls(next(name for name, known in _BITS.items() if known == bits))

    @property
    def directory_suffix(self) -> str:
        """End of an engine directory's name, such as ``kv-int8`` or ``kv-r50-int4``."""
        rank = [] if self.rank is None else [f"r{self.rank * 100:g}"]
        return "-".join(["kv", *rank, *([] if self.quant == "none" else [self.quant])])

    def __str__(self) -> str:
        return packing_words(self.quant, self.rank)
