# SPDX-License-Identifier: Apache-2.0
"""Kernels run on the GPU where there is one, else under Triton's interpreter on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, so it must stand before the first import of one.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of the tests lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
