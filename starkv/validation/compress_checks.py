# SPDX-License-Identifier: Apache-2.0
"""``Compress`` of every implementation against the PyTorch reference."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.methods.star_kv import keep_best, score
from starkv.methods.star_kv_config import StarKVConfig
from starkv.validation.compress_agreement import Expected, compare
from starkv.validation.compress_cases import UI_TARS_7B, CompressCase, CompressSize, Heads, make_case
from starkv.validation.implementations import Compress, Implementation
from starkv.validation.report import Check
from starkv.validation.trial import Trial

_SMALL = CompressSize("2 layers, 7 heads a group", Heads(2, 14, 2, 128), (10, 18), 2)
SIZES = {
    "cpu": (_SMALL,),
    "cuda": (
        _SMALL,
        CompressSize("UI-TARS-7B, one 1080p screenshot", UI_TARS_7B, (39, 69)),
        CompressSize("UI-TARS-7B, five 1080p screenshots", UI_TARS_7B, (39, 69), 5),
    ),
}
"""Where kernels are emulated, cases are small."""


def check_compress(
    size: CompressSize, mode: str, dtype: torch.dtype, device: torch.device, others: list[Implementation]
) -> Iterator[Check]:
    """One check for each implementation.

    Args:
        size: of model and prompt.
        mode: ``native`` or ``official``.
        dtype: of the cache.
        device: where tensors lie.
        others: what is compared with the reference.
    """
    case = make_case(size, StarKVConfig.of_mode(mode), dtype, device)
    expected = reference_compress(case)

    def repeatable(run: Compress) -> Callable[[], object]:
        call = case.call()
        return lambda: run(call)

    trial = Trial(
        subject="Compress",
        case=f"{size.name}, {size.prompt.length:,} rows, {mode}",
        dtype=dtype,
        device=device,
        rows=size.prompt.length,
        reference=lambda: reference_compress(case),
        compare=lambda run, blank: _compress(case, expected, run, blank),
        repeatable=repeatable,
    )
    yield from trial.run([(other, other.compress) for other in others])


def reference_compress(case: CompressCase) -> Expected:
    """The PyTorch reference on a case, in float32 whatever the cache's type."""
    prefill = case.prefill
    wide = replace(prefill, keys=prefill.keys.float(), queries=prefill.queries.float())
    config = replace(case.config, score_dtype="float32")
    scores, after = score(wide, case.state, config)
    return Expected(keep_best(prefill, scores, case.request.limits), scores, after)


def _compress(case: CompressCase, expected: Expected, run: Compress, blank: Check) -> Check:
    call, inside = case.call(), case.call(in_place=True)
    result = run(call)
    agreement = compare(call, case.prefill, result, expected)
    failures = list(agreement.failures)
    if not _same(call, result, inside, run(inside)):
        failures.append("in place and out of place differ")
    return blank.finished(failures, agreement.measures)


def _same(
    apart: CompressCall, result: CompressResult, inside: CompressCall, result_inside: CompressResult
) -> bool:
    """A cache compacted into itself holds what the slot of a pool holds."""
    rows = result.rows.shape[-1]
    if not torch.equal(result.new_len, result_inside.new_len):
        return False
    if not torch.equal(result.rows, result_inside.rows[..., :rows]):
        return False
    for layer, counts in enumerate(result.new_len.tolist()):
        for sequence, count in enumerate(counts):
            slot, own = int(apart.slot[sequence]), int(inside.slot[sequence])
            moved = [
                (apart.dst_k[layer, slot, :, :count], inside.dst_k[layer, own, :, :count]),
                (apart.dst_v[layer, slot, :, :count], inside.dst_v[layer, own, :, :count]),
                (apart.dst_meta[layer, slot, :count], inside.dst_meta[layer, own, :count]),
            ]
            if not all(torch.equal(one, other) for one, other in moved):
                return False
    return True
