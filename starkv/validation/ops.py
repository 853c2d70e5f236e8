# SPDX-License-Identifier: Apache-2.0
"""``starkv validate ops``: every implementation of the operators against the PyTorch reference."""

from collections.abc import Callable, Iterator

import torch

from starkv.validation import (
    attention_checks,
    compress_checks,
    full_attention_checks,
    packable_checks,
    quantized_checks,
)
from starkv.validation.implementations import implementations
from starkv.validation.report import Check

MODES = ("native", "official")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def validate_ops(
    device: torch.device,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    started: Callable[[str], None] = lambda _: None,
) -> Iterator[Check]:
    """All checks that this machine can run; the others say why not.

    Args:
        device: ``cuda``, or ``cpu`` where the GPU implementations are emulated on small cases.
        dtypes: names of element types; attention to a cache of floats has no float32.
        started: told what is worked at.
    """
    others = implementations(device)
    for size in compress_checks.SIZES[device.type]:
        for mode in MODES:
            for name in dtypes:
                started(f"Compress, {size.name}, {mode}, {name}")
                yield from compress_checks.check_compress(size, mode, DTYPES[name], device, others)
    for attention_size in attention_checks.SIZES[device.type]:
        for name in dtypes:
            if DTYPES[name] in attention_checks.TOLERANCE:
                started(f"KVAttention, {attention_size.name}, {name}")
                yield from attention_checks.check_attention(attention_size, DTYPES[name], device, others)
    for full_size in full_attention_checks.SIZES[device.type]:
        for name in dtypes:
            if DTYPES[name] in attention_checks.TOLERANCE:
                started(f"FullAttention, {full_size.name}, {name}")
                yield from full_attention_checks.check_full_attention(full_size, DTYPES[name], device, others)
    for quantized_size in quantized_checks.SIZES[device.type]:
        for name in dtypes:
            started(f"QuantizedKVAttention, {quantized_checks.case_name(quantized_size)}, {name}")
            yield from quantized_checks.check_quantized_attention(
                quantized_size, DTYPES[name], device, others
            )
    for packable_size in packable_checks.SIZES[device.type]:
        for name in dtypes:
            if DTYPES[name] in attention_checks.TOLERANCE:
                started(f"PackableKVAttention, {packable_size.name}, {name}")
                yield from packable_checks.check_packable_attention(
                    packable_size, DTYPES[name], device, others
                )
