# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors of a key or value projection: from its weight alone, or from what it puts out.

With y = W x the output of a projection (no bias, before rotation), a factor maps y to a latent and back. Keys
are factorised per KV head or per group of 2 or 4 of them, since a group's keys are rebuilt together in every
decode step; values jointly over all heads, since theirs never are (STAR-KV, arXiv 2606.08382). Acting on y
and not on x lets an exact cache be compressed without the hidden states that it came from.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import CalibrationError, CheckpointError, UsageError

THRESHOLD_SHARPNESS = 50.0
"""Slope of the soft threshold, as published."""
LEAST_METRIC = 1e-8
"""Smallest eigenvalue of an error metric, as a share of its largest: directions that the metric ignores still
have to be rebuilt from something finite."""


@dataclass(frozen=True)
class Factor:
    """``latent = down · y`` and ``y ≈ up · latent``.

    Raises:
        ValueError: the two shapes don't belong together.
    """

    up: NDArray[np.float64]
    """``[width, rank]``."""
    down: NDArray[np.float64]
    """``[rank, width]``."""

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.up.shape != self.down.shape[::-1]:
            raise ValueError(f"up {self.up.shape} and down {self.down.shape} are no pair of factors")

    @property
    def width(self) -> int:
        """Channels of y."""
        return int(self.up.shape[0])

    @property
    def rank(self) -> int:
        """Channels of a latent."""
        return int(self.up.shape[1])

    def compress(self, outputs: NDArray[Any]) -> NDArray[np.float64]:
        """Latents ``[..., rank]`` of projection outputs ``[..., width]``."""
        latents: NDArray[np.float64] = outputs @ self.down.T
        return latents

    def lift(self, latents: NDArray[Any]) -> NDArray[np.float64]:
        """Projection outputs ``[..., width]`` rebuilt from latents ``[..., rank]``."""
        outputs: NDArray[np.float64] = latents @ self.up.T
        return outputs


@dataclass(frozen=True)
class Decomposition:
    """A factor of full rank. Its latent channels are sorted by strength, so that any rank is a prefix."""

    full: Factor
    strengths: NDArray[np.float64]
    """``[full rank]``, descending: singular values of the weight, or for output statistics the root mean
    square of each latent channel (in the metric, where there is one)."""

    @property
    def energies(self) -> NDArray[np.float64]:
        """``[full rank]``: squared strengths, what dropping each channel costs."""
        return self.strengths**2

    def truncated(self, rank: int) -> Factor:
        """The best factor of this rank.

        Raises:
            UsageError: there are no such ranks.
        """
        if not 1 <= rank <= self.full.rank:
            raise UsageError(
                f"rank {rank} is not possible: this projection of {self.full.width} channels has ranks 1 to "
                f"{self.full.rank}"
            )
        return Factor(self.full.up[:, :rank], self.full.down[:rank])

    def rank_above(self, threshold: float) -> int:
        """How many strengths lie above the threshold."""
        return int(np.count_nonzero(self.strengths > threshold))

    def above(self, threshold: float) -> Factor:
        """Hard truncation: what lies above the threshold, unchanged.

        Raises:
            UsageError: nothing does.
        """
        rank = self.rank_above(threshold)
        if rank == 0:
            raise UsageError(
                f"threshold {threshold:g} leaves no rank: the largest strength is {self.strengths.max():g}"
            )
        return self.truncated(rank)

    def softly_above(self, threshold: float, sharpness: float = THRESHOLD_SHARPNESS) -> Factor:
        """As training sees it: a kept strength s becomes ``s · tanh(sharpness · (s − threshold))``.

        Raises:
            UsageError: nothing lies above the threshold.
        """
        kept = self.above(threshold)
        gains = np.tanh(sharpness * (self.strengths[: kept.rank] - threshold))
        return Factor(kept.up, gains[:, None] * kept.down)


def split_groups(weight: NDArray[Any], kv_heads: int, heads_per_group: int) -> list[NDArray[Any]]:
    """Parts of a projection's weight ``[kv_heads · D, in]`` that are factorised on their own.

    Raises:
        UsageError: the heads can't be divided into such groups.
    """
    if heads_per_group < 1 or kv_heads % heads_per_group:
        raise UsageError(f"{kv_heads} KV heads can't be divided into groups of {heads_per_group}")
    return np.split(weight, kv_heads // heads_per_group)


def weight_svd(weight: NDArray[Any]) -> Decomposition:
    """Plain singular value decomposition of ``weight [width, in]``, the official factorisation.

    With W = U diag(s) V, up is U and down Uᵀ, because diag(s) V = Uᵀ W.

    Raises:
        CheckpointError: the weight holds values that are not finite.
    """
    weight = np.asarray(weight, np.float64)
    if not np.isfinite(weight).all():
        raise CheckpointError(
            "a projection's weight holds values that are not finite numbers: it can't be factorised"
        )
    left, strengths, _ = np.linalg.svd(weight, full_matrices=False)
    return Decomposition(Factor(left, left.T), strengths)


def output_pca(second_moment: NDArray[Any], metric: NDArray[Any] | None = None) -> Decomposition:
    """Principal components of a projection's outputs: no rank rebuilds them with a smaller expected error.

    The error of y is counted as ``(y − ŷ)ᵀ M (y − ŷ)``. With E the eigenvectors of ``M^½ C M^½``, up is
    ``M^-½ E`` and down ``Eᵀ M^½``. Without a metric this equals the whitened SVD of SVD-LLM and Palu, but
    needs the moments of the outputs alone.

    Args:
        second_moment: C = E[y yᵀ], ``[width, width]``.
        metric: M, symmetric and positive semidefinite, ``[width, width]``; the identity where it is left out.

    Raises:
        CalibrationError: one of the two holds values that are not finite, or every output was zero.
    """
    moment = _symmetric(second_moment, "second moment of a projection's outputs")
    if not moment.any():
        raise CalibrationError(
            "every output of a projection was zero in calibration: check its weights and the prompts"
        )
    root = inverse_root = np.eye(len(moment))
    if metric is not None:
        values, vectors = np.linalg.eigh(_symmetric(metric, "error metric"))
        if values[-1] <= 0:
            raise CalibrationError("an error metric is zero everywhere: nothing says which outputs matter")
        roots = np.sqrt(np.maximum(values, values[-1] * LEAST_METRIC))
        root, inverse_root = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    energies, basis = np.linalg.eigh(root @ moment @ root)
    energies, basis = energies[::-1], basis[:, ::-1]
    return Decomposition(Factor(inverse_root @ basis, basis.T @ root), np.sqrt(np.maximum(energies, 0.0)))


def key_metric(pair_energies: NDArray[Any]) -> NDArray[np.float64]:
    """Metric for keys: an error in a rotary pair counts as much as the queries are long there.

    Args:
        pair_energies: ``[heads, D/2]`` of a group's KV heads: E[q_i² + q_{i+D/2}²] / 2 over their query
            heads. Rotation doesn't change it.

    Returns:
        Diagonal ``[heads · D, heads · D]``.
    """
    return np.diag(np.concatenate([pair_energies, pair_energies], axis=-1).reshape(-1).astype(np.float64))


def value_metric(output_weight: NDArray[Any], kv_heads: int, head_dim: int) -> NDArray[np.float64]:
    """Metric for values: an error counts as far as the output projection carries it.

    Args:
        output_weight: W_o, ``[hidden, query heads · D]``.

    Returns:
        ``[kv_heads · D, kv_heads · D]``: one block W_oᵀ W_o per KV head, summed over its query heads. Blocks
        between heads are left out, because different heads weigh a token's values by different probabilities.
    """
    columns = np.asarray(output_weight, np.float64).reshape(len(output_weight), kv_heads, -1, head_dim)
    blocks = np.einsum("ohqd,ohqe->hde", columns, columns)
    metric = np.zeros((kv_heads, head_dim, kv_heads, head_dim))
    heads = np.arange(kv_heads)
    metric[heads, :, heads, :] = blocks
    return metric.reshape(kv_heads * head_dim, kv_heads * head_dim)


def _symmetric(matrix: NDArray[Any], name: str) -> NDArray[np.float64]:
    matrix = np.asarray(matrix, np.float64)
    if not np.isfinite(matrix).all():
        raise CalibrationError(
            f"the {name} holds values that are not finite numbers: calibrate in float32 and check the weights"
        )
    symmetric: NDArray[np.float64] = (matrix + matrix.T) / 2
    return symmetric
