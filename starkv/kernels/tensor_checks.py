# SPDX-License-Identifier: Apache-2.0
"""Do the tensors of an operator's call fit each other?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from starkv.errors import UsageError

Wanted = tuple[torch.dtype, tuple[int, ...]]
"""Element type and shape."""


def check_tensors(call: object, wanted: Mapping[str, Wanted]) -> None:
    """Refuse a call whose tensors have another type or shape, gaps, or lie on several devices.

    Args:
        call: has the tensors as attributes.
        wanted: what each must be, by its name; all must lie where the first one lies.

    Raises:
        UsageError: names the tensor and what it should be.
    """
    first = next(iter(wanted))
    device = getattr(call, first).device
    for name, (dtype, shape) in wanted.items():
        tensor: Tensor = getattr(call, name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise UsageError(
                f"{name} must be {dtype} of {list(shape)}, not {tensor.dtype} of {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise UsageError(f"{name} must be contiguous")
        if tensor.device != device:
            raise UsageError(f"{name} is on {tensor.device}, but {first} on {device}")
