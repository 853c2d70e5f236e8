# SPDX-License-Identifier: Apache-2.0
"""How far two right engines may differ, by what they compute in and what their weights were rounded to.

An engine in 16 bits rounds every product and sum to 2^-8 (bfloat16) or 2^-11 (float16) of itself. Errors of
many layers add up like a random walk, attention amplifies them, and where a model wavers between two tokens
they decide. Errors are Euclidean norms of differences, as shares of the reference's norm; the bounds are
what gui-tiny was measured to make of rounding (docs/validation.md), times about two.
"""

from dataclasses import dataclass, replace
from math import sqrt

from starkv.manifest import ComputeDtype, Quantization

_MEASURED_LAYERS = 4
"""Of gui-tiny, whose errors were measured."""
_INNER = ("keys", "values", "q_window", "hidden_norm")
_REPLY = "decode"


@dataclass(frozen=True)
class Tolerances:
    """What two engines are held to."""

    layers: float
    """Largest error of a layer's output, where both get the same input."""
    tensors: float
    """Largest error of image tokens, the prompt's logits, keys, values, queries and norms."""
    reply: float
    """Largest error of the reply's logits."""
    kept_rows: float
    """Share of kept rows that must be the same."""
    tokens: float
    """Share of tokens that must be the same while both read the same reply."""
    same_weights: bool = True
    """Whether keys, values, queries, norms and the reply's logits mean the same in both."""

    def of(self, name: str) -> float:
        """Largest error of an output."""
        return self.reply if name.startswith(_REPLY) else self.tensors

    def applies_to(self, name: str) -> bool:
        """Whether an output is judged at all."""
        return self.same_weights or not name.startswith((*_INNER, _REPLY))


_BY_DTYPE: dict[ComputeDtype, Tolerances] = {
    "float32": Tolerances(1e-4, 1e-3, 1e-3, 0.999, 1.0),
    "float16": Tolerances(0.012, 0.012, 0.04, 0.85, 0.8),
    "bfloat16": Tolerances(0.03, 0.2, 0.35, 0.85, 0.8),
}
_ACTIVATIONS = Tolerances(0.03, 0.1, 0.2, 0.85, 0.8)
"""Added for quantized layers: ONNX Runtime rounds what goes into them to 8 bits on a processor."""
_OTHER_WEIGHTS = {"int8": 0.15, "int4": 0.4}
"""Added where an engine's weights were rounded and its reference's were not."""


def tolerances(
    dtype: ComputeDtype, engine: Quantization, reference: Quantization | None, layers: int
) -> Tolerances:
    """Bounds for an engine against a reference in float32.

    Args:
        dtype: that the engine computes in.
        engine: its weights.
        reference: the reference's weights; None for those of the checkpoint.
        layers: of the decoder; bounds grow with the square root of the depth.
    """
    bounds = _BY_DTYPE[dtype]
    if engine.decoder in _OTHER_WEIGHTS:
        bounds = _sum(bounds, _ACTIVATIONS)
    if (reference.decoder if reference else "fp32") != engine.decoder:
        more = _OTHER_WEIGHTS.get(engine.decoder, _OTHER_WEIGHTS["int8"])
        bounds = _sum(bounds, Tolerances(more, more, more, 0.6, 0.6, same_weights=False))
    depth = max(1.0, sqrt(layers / _MEASURED_LAYERS))
    return replace(
        bounds, layers=bounds.layers * depth, tensors=bounds.tensors * depth, reply=bounds.reply * depth
    )


def _sum(one: Tolerances, other: Tolerances) -> Tolerances:
    return Tolerances(
        one.layers + other.layers,
        one.tensors + other.tensors,
        one.reply + other.reply,
        min(one.kept_rows, other.kept_rows),
        min(one.tokens, other.tokens),
        other.same_weights,
    )
