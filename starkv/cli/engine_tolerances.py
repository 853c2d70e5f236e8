# SPDX-License-Identifier: Apache-2.0
"""How far two right engines may differ, by what they compute in and what their weights were rounded to.

An engine in 16 bits rounds every product and sum to 2^-8 (bfloat16) or 2^-11 (float16) of itself; errors of
many layers add up like a random walk, and attention amplifies them. The bounds are shares of a tensor's
largest number: what gui-tiny was measured to make of that (docs/validation.md), times about three.
"""

from dataclasses import dataclass

from starkv.manifest import ComputeDtype, Quantization

_ROUNDING: dict[ComputeDtype, float] = {"float32": 1e-3, "float16": 2.5e-2, "bfloat16": 0.17}
_ACTIVATIONS = 0.12
"""ONNX Runtime rounds activations to 8 bits on their way into quantized layers on a processor."""
_OTHER_WEIGHTS = {"int8": 0.3, "int4": 0.9}
"""Logits of an engine against those of weights that were not rounded."""
_INNER = ("keys", "values", "q_window", "hidden_norm")


@dataclass(frozen=True)
class Tolerances:
    """What two engines are held to."""

    values: float
    """Largest error of a tensor, as a share of its largest number."""
    kept_rows: float
    """Share of kept rows that must be the same."""
    tokens: float
    """Share of tokens that must be the same while both read the same reply."""
    inner: bool
    """Whether keys, values, queries and norms mean the same in both."""

    def applies_to(self, name: str) -> bool:
        """Whether an output is held to ``values``."""
        return self.inner or not name.startswith(_INNER)


def tolerances(dtype: ComputeDtype, engine: Quantization, reference: Quantization | None) -> Tolerances:
    """Bounds for an engine against a reference in float32.

    Args:
        dtype: that the engine computes in.
        engine: its weights.
        reference: the reference's weights; None for those of the checkpoint.
    """
    same = (reference.decoder if reference else "fp32") == engine.decoder
    quantized = engine.decoder in _OTHER_WEIGHTS
    if not same:
        return Tolerances(_ROUNDING[dtype] + _OTHER_WEIGHTS.get(engine.decoder, 0.3), 0.6, 0.6, False)
    values = _ROUNDING[dtype] + (_ACTIVATIONS if quantized else 0.0)
    exact = dtype == "float32" and not quantized
    return Tolerances(values, 0.999 if exact else 0.85, 1.0 if exact else 0.9, True)
