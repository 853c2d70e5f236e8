# SPDX-License-Identifier: Apache-2.0
"""Kernels run on the GPU where there is one, else under Triton's interpreter on the CPU."""

import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from starkv.kernels.cuda_library import KernelLibrary

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, so it must stand before the first import of one.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of the tests lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> "KernelLibrary":
    """The kernel library for tensors on :func:`device`."""
    from kernel_library import library_for

    return library_for(device)
