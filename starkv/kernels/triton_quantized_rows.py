# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a quantized cache of full rank in Triton: one new token per sequence.

Nothing is read back to the host, so that a call can be captured in a CUDA graph.
"""

import torch

from starkv.kernels.low_rank_call import DecodeResult
from starkv.kernels.quantized_rows_call import QuantizedRowsCall
from starkv.kernels.triton_bias_logits import bias_logits
from starkv.kernels.triton_cached_rows import CachedRows, attend_cached_rows
from starkv.kernels.triton_decode import merge
from starkv.kernels.triton_low_rank import check_sizes


def quantized_rows_attention(call: QuantizedRowsCall) -> DecodeResult:
    """Attend to all rows that sequences hold.

    Args:
        call: read.

    Returns:
        out ``[B, H, D]`` in the type of the queries, largest logits and sums ``[B, H]`` f32; 0, −inf and 0
        where a sequence holds no row, or more than its cache has.

    Raises:
        UsageError: tensors don't fit each other, or a size is not supported.
    """
    call.check()
    check_sizes(call.q, call.sharing)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(call.q):
        positions = tables = None
        if call.key_bias is not None:
            positions = call.key_bias.where.positions
            tables = bias_logits(call.q, call.key_bias.bias, call.key_bias.where)
        rows = CachedRows(call.k, call.v, call.n_valid, call.k_scales, call.v_scales, positions, tables)
        merged = merge(attend_cached_rows(call.q, rows), call.q.dtype, call.value_bias)
        return DecodeResult(merged.out, merged.largest, merged.total)
