# SPDX-License-Identifier: Apache-2.0
"""How far two right engines may differ, by what rounding was seen to do.

An engine in 16 bits rounds every product and sum by up to 2^-9 (bfloat16) or 2^-12 (float16) of itself;
errors of many layers add up like a random walk, and attention amplifies them. The bounds are multiples of
what a rounded run of the reference was off by. The multiples were measured with gui-tiny, where right engines
are off by about as much as that run, and wrong ones by far more; docs/validation.md has the figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from starkv.manifest import Quantization
from starkv.validation.outputs import NONE, Deviation

_TIMES = Deviation(largest=8.0, total=3.0, typical=2.5)
"""Of a rounded run's deviations. One row whose attention turns to another makes the largest."""
_TIMES_FLIPPED = 3.0
"""Of the rows that a rounded run keeps otherwise, and of its other tokens."""
_FLOAT32 = Deviation(largest=1e-3, total=3e-4, typical=1e-4)
"""Of two engines that both compute in float32, in another order."""
_OTHER_WEIGHTS = {"int8": 0.5, "int4": 1.0}
"""Largest deviation of logits from those of weights that were not rounded, where no rounded run has the same
weights."""
_ONE_ROW = ("logits", "decode", "decode_kept")
"""Outputs whose tensors have one row each: a row that is far off is the typical one."""
_REPLY = "decode"
"""How the logits of replies begin. A model that wavers between two tokens makes their largest deviation."""
_SAME_IN_ALL = ("image_embeds", "logits")
"""Outputs that mean the same whatever the weights were rounded to."""


@dataclass(frozen=True)
class Tolerances:
    """What an engine is held to."""

    allowed: Deviation
    """Of every tensor, whatever rounding does."""
    rounded: Mapping[str, Deviation]
    """Tensor → what a rounded run of the reference was off by."""
    kept_rows: float
    """Least share of the reference's kept rows that must be kept."""
    tokens: float
    """Least share of the reference's tokens that must be said while both read the same reply."""
    inner: bool = True
    """Whether keys, values, queries and the logits of a whole reply can be compared."""

    def of(self, tensor: str) -> Deviation | None:
        """Bounds of a tensor; None if it says nothing."""
        if not self.inner and tensor not in _SAME_IN_ALL:
            return None
        seen = self.rounded.get(tensor, NONE)
        largest = self.allowed.largest + _TIMES.largest * seen.largest
        total = self.allowed.total + _TIMES.total * seen.total
        typical = self.allowed.typical + _TIMES.typical * seen.typical
        if self.rounded and tensor.startswith(_REPLY):
            largest = 1.0
        if tensor in _ONE_ROW:
            typical = total
        # What is off by its own size is wrong, however much rounding does.
        return Deviation(min(1.0, largest), min(1.0, total), min(1.0, typical))


def float32_tolerances() -> Tolerances:
    """Both compute in float32, with the same weights."""
    return Tolerances(_FLOAT32, {}, kept_rows=0.999, tokens=1.0)


def rounded_tolerances(
    rounded: Mapping[str, Deviation], kept_rows: float = 1.0, tokens: float = 1.0, token_count: int = 0
) -> Tolerances:
    """The reference was run with the engine's rounding, too.

    Args:
        rounded: tensor → what that run was off by.
        kept_rows: share of the reference's kept rows that it kept.
        tokens: share of the reference's tokens that it said.
        token_count: tokens of all replies; two of them and a twentieth may differ by chance.
    """
    rows = 1.0 - _TIMES_FLIPPED * (1.0 - kept_rows) - 0.01
    same = 1.0 - _TIMES_FLIPPED * (1.0 - tokens) - 0.05 - 2.0 / max(1, token_count)
    return Tolerances(_FLOAT32, rounded, rows, same)


def other_weights_tolerances(engine: Quantization) -> Tolerances:
    """The reference's weights were rounded to something else, and nothing else has the engine's."""
    largest = _OTHER_WEIGHTS.get(engine.decoder, _OTHER_WEIGHTS["int8"])
    return Tolerances(Deviation(largest, 1.0, 1.0), {}, kept_rows=0.6, tokens=0.6, inner=False)
