# SPDX-License-Identifier: Apache-2.0
"""What tests of decode attention compare, and how closely."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starkv.kernels.low_rank_call import DecodeResult

if TYPE_CHECKING:
    from starkv.lowrank.attend import Attended

OUTPUT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of the largest output: kernels round latents, keys and probabilities to the queries' type."""
LOG_SUM = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2}
"""Absolute: logits are of the order of 10."""


def assert_agree(result: DecodeResult, expected: DecodeResult, dtype: torch.dtype) -> None:
    """Outputs, and the logarithm of the softmax's sums; −inf where a sequence has no rows in both."""
    assert_close(result.out, expected.out, OUTPUT[dtype] * float(expected.out.abs().max()))
    assert_close(log_sum(result), log_sum(expected), LOG_SUM[dtype])


def assert_is_numpys(result: DecodeResult, attended: "list[Attended]") -> None:
    """One sequence after the other."""
    for sequence, expected in enumerate(attended):
        assert_close(result.out[sequence], torch.from_numpy(expected.heads), 1e-5)
        assert_close(log_sum(result)[sequence], torch.from_numpy(expected.logits).logsumexp(-1), 1e-5)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.cpu().double(), expected.cpu().double(), rtol=0, atol=tolerance)


def log_sum(result: DecodeResult) -> Tensor:
    return result.largest + result.total.log()
