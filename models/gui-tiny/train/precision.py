# SPDX-License-Identifier: Apache-2.0
"""Whether a device multiplies bfloat16 matrices faster than fp32 ones."""

from functools import lru_cache

import torch


@lru_cache
def has_fast_bfloat16(device: str) -> bool:
    """GPUs do; of processors those with AMX or AVX512-BF16: others emulate it, fifty times slower than fp32.

    Args:
        device: type such as ``cpu``.
    """
    return device != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
