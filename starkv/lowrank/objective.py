# SPDX-License-Identifier: Apache-2.0
"""What training of ranks minimises: distillation and a budget (STAR-KV, arXiv 2606.08382). Needs PyTorch.

The published budget counts weights and pushes every threshold equally. The other one counts cache bytes as
they are stored, and pushes where a step of the threshold frees memory, until the budget is met and no
further.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from starkv.errors import UsageError
from starkv.lowrank.latent_format import LatentFormat, key_bytes, value_bytes


def distillation_loss(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """KL divergence of the student from the teacher, mean over the counted positions, in float32.

    Args:
        student: logits ``[..., vocabulary]``.
        teacher: logits of the uncompressed model, same shape; no gradient flows into them.
        counted: bool ``[...]``, False for padding.

    Raises:
        UsageError: no position counts.
    """
    if not bool(counted.any()):
        raise UsageError("a batch for distillation has no position that counts: it is padding only")
    log_student = F.log_softmax(student[counted].float(), dim=-1)
    log_teacher = F.log_softmax(teacher[counted].detach().float(), dim=-1)
    loss: Tensor = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return loss


def threshold_pressure(thresholds: Tensor) -> Tensor:
    """The published budget loss: ``Σ exp(−threshold)``."""
    pressure: Tensor = torch.exp(-thresholds).sum()
    return pressure


def kept_ranks(strengths: Tensor, thresholds: Tensor) -> Tensor:
    """``[...]``: how many of ``strengths [..., full rank]`` lie above ``thresholds [..., 1]``."""
    ranks: Tensor = (strengths > thresholds).sum(dim=-1)
    return ranks


def weight_parameters(rank: int, in_features: int, out_features: int) -> int:
    """The published measure of size: parameters of a factorised weight, at most those of the weight itself.

    It says little about the cache: at "60 % removed" Qwen2.5-VL-7B's keys keep 27 % and its values 44.5 % of
    their elements.
    """
    return min((in_features + out_features) * rank, in_features * out_features)


@dataclass(frozen=True)
class LayerThresholds:
    """Strengths and thresholds of one layer in training."""

    key_strengths: Tensor
    """``[groups, full rank]``."""
    key_thresholds: Tensor
    """``[groups]``."""
    value_strengths: Tensor
    """``[full rank]``."""
    value_threshold: Tensor
    """Scalar."""

    def row_bytes(self, latent: LatentFormat) -> int:
        """Bytes that a token takes in this layer if ranks are what the thresholds leave, at least 1."""
        keys = kept_ranks(self.key_strengths, self.key_thresholds[:, None]).clamp(min=1)
        values = kept_ranks(self.value_strengths, self.value_threshold).clamp(min=1)
        return key_bytes(keys.tolist(), latent) + value_bytes(int(values), latent)

    def smooth_bytes(self, latent: LatentFormat, softness: float) -> Tensor:
        """The same without tiles and scales, differentiable in the thresholds alone."""
        keys = _smooth_ranks(self.key_strengths, self.key_thresholds[:, None], softness)
        values = _smooth_ranks(self.value_strengths, self.value_threshold, softness)
        total: Tensor = (keys.sum() + values) * (latent.lane_bits / 8)
        return total


def cache_excess(
    layers: Sequence[LayerThresholds], latent: LatentFormat, budget_bytes: int, softness: float = 0.1
) -> Tensor:
    """By what share the cache is larger than its budget; 0, without a gradient, once it is met.

    The value counts bytes exactly. The gradient is that of a smooth count, in which a latent channel counts
    by a sigmoid of how far its strength lies above the threshold. It reaches the thresholds only: strengths
    must not shrink for the budget's sake.

    Args:
        layers: the compressed layers.
        budget_bytes: bytes per token that these layers may take together.
        softness: width of the sigmoid, as a share of the mean strength.
    """
    exact = sum(layer.row_bytes(latent) for layer in layers)
    smooth = torch.stack([layer.smooth_bytes(latent, softness) for layer in layers]).sum()
    excess: Tensor = F.relu((smooth - smooth.detach() + exact) / budget_bytes - 1.0)
    return excess


def _smooth_ranks(strengths: Tensor, thresholds: Tensor, softness: float) -> Tensor:
    fixed = strengths.detach().to(thresholds.dtype)
    width = softness * fixed.mean(dim=-1, keepdim=True)
    ranks: Tensor = torch.sigmoid((fixed - thresholds) / width).sum(dim=-1)
    return ranks
