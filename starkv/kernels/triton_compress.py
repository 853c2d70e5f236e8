# SPDX-License-Identifier: Apache-2.0
"""The operator ``Compress`` in Triton: STaR-KV's scoring, budgets of layers, selection and compaction.

All layers and sequences go through each kernel in one launch. Nothing waits for the device and no launch
depends on what tensors hold, so a call can be captured in a CUDA graph. Without a GPU the kernels run under
Triton's interpreter (``TRITON_INTERPRET=1`` before the first import).

A sequence that cannot be compressed in some layer keeps nothing in any: its ``new_len`` is 0, its slot and
its state stay. That is where ``kv_len`` is at most W or above C, its slot does not exist (or, in place, is
not its own), more rows are to stay than it or its slot has, or the newest screenshot doesn't lie before its
window.
"""

import torch

from starkv.errors import UsageError
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.triton_final_scores import final_scores
from starkv.kernels.triton_group_scores import group_scores
from starkv.kernels.triton_information import update_information
from starkv.kernels.triton_layer_rows import layer_rows
from starkv.kernels.triton_move import is_in_place, move_rows
from starkv.kernels.triton_pattern import update_pattern
from starkv.kernels.triton_select import select_rows
from starkv.kernels.triton_window import window_mass

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_WINDOW = 64
MAX_HEADS = 65535
"""KV heads of all layers and sequences: one axis of a launch."""


def compress(call: CompressCall) -> CompressResult:
    """Compress all sequences of a call.

    Args:
        call: ``dst_k``, ``dst_v`` and ``dst_meta`` are written, all else is read. They may be ``k``, ``v``
            and ``row_meta`` themselves; then S is B, E is C, and ``slot`` must be 0, 1, 2 …

    Returns:
        the other outputs, on the call's device.

    Raises:
        UsageError: tensors don't fit each other, or a size is not supported.
    """
    call.check()
    dim = call.k.shape[-1]
    if dim not in HEAD_DIMS:
        raise UsageError(f"head dim {dim} is none of {', '.join(map(str, HEAD_DIMS))}")
    if not 1 <= call.window <= MAX_WINDOW:
        raise UsageError(f"the window must have 1 to {MAX_WINDOW} rows, not {call.window}")
    if call.pooling_kernel < 1 or call.pooling_kernel % 2 == 0:
        raise UsageError(f"the pooling kernel must be odd, not {call.pooling_kernel}")
    if call.k.shape[:3].numel() > MAX_HEADS:
        raise UsageError(f"L · B · G must be at most {MAX_HEADS}, not {call.k.shape[:3].numel()}")
    in_place = is_in_place(call)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(call.k):
        return _launch(call, in_place)


def _launch(call: CompressCall, in_place: bool) -> CompressResult:
    result = CompressResult.empty_for(call)
    groups = group_scores(call, window_mass(call), result.stages)
    layer_rows(call, result, in_place)
    update_information(call, groups.scores, result)
    stability = update_pattern(call, groups.scores, result)
    final_scores(call, groups.leading, stability, result)
    select_rows(call, result)
    move_rows(call, result, in_place)
    return result
