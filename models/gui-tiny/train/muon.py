# SPDX-License-Identifier: Apache-2.0
"""The Muon optimizer (Jordan et al. 2024): momentum whose update is orthogonalised by Newton-Schulz steps."""

from collections.abc import Iterable

import torch
from precision import has_fast_bfloat16
from torch import Tensor


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of a matrix towards one."""
    # Processors without bfloat16 units take fifty times as long in it.
    matrix = update.bfloat16() if has_fast_bfloat16(update.device.type) else update.float()
    tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if tall else matrix
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ matrix
    return matrix.T if tall else matrix


class Muon(torch.optim.Optimizer):
    """For weight matrices; embeddings, norms and biases belong to AdamW."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                nesterov = parameter.grad + group["momentum"] * momentum
                scale = max(1.0, nesterov.shape[0] / nesterov.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalise(nesterov).to(parameter.dtype), alpha=-group["lr"] * scale)
