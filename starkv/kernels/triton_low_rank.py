# SPDX-License-Identifier: Apache-2.0
"""Low-rank decode attention in Triton (STAR-KV, arXiv 2606.08382).

One new token per sequence, one softmax over cached latents and the raw tail.

Nothing is read back to the host, so that a call can be captured in a CUDA graph. Numbers of rows lie on the
device; a sequence whose numbers make no sense (more rows than its cache has) comes out as 0.
"""

import torch

from starkv.errors import UsageError
from starkv.kernels.low_rank_call import DecodeResult, LowRankCall
from starkv.kernels.triton_cached_rows import CachedRows, attend_cached_rows
from starkv.kernels.triton_decode import HEAD_DIMS, MAX_BATCH, MAX_HEADS, MAX_SHARING, merge
from starkv.kernels.triton_low_rank_lift import lift_values
from starkv.kernels.triton_low_rank_scores import ScoreTiles, tile_scores
from starkv.kernels.triton_low_rank_values import latent_sums


def low_rank_attention(call: LowRankCall, cut: ScoreTiles | None = None) -> DecodeResult:
    """Attend to all rows that sequences hold, cached and raw.

    Args:
        call: read.
        cut: how the first kernel's work is cut; the results differ by rounding alone.

    Returns:
        out ``[B, H, D]`` in the type of the queries, largest logits and sums ``[B, H]`` f32.

    Raises:
        UsageError: tensors don't fit each other, or a size is not supported.
    """
    call.check()
    check_sizes(call.q, call.sharing)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(call.q):
        return _launch(call, cut or ScoreTiles())


def check_sizes(q: torch.Tensor, sharing: int) -> None:
    """Refuse sizes that the kernels of decode attention don't take.

    Raises:
        UsageError: names the size and what it may be.
    """
    batch, heads, dim = q.shape
    if dim not in HEAD_DIMS:
        raise UsageError(f"head dim {dim} is none of {', '.join(map(str, HEAD_DIMS))}")
    if heads > MAX_HEADS:
        raise UsageError(f"there may be {MAX_HEADS} query heads, not {heads}")
    if not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"there may be 1 to {MAX_BATCH} sequences, not {batch}")
    if sharing > MAX_SHARING:
        raise UsageError(f"at most {MAX_SHARING} query heads may share a KV head, not {sharing}")


def _launch(call: LowRankCall, cut: ScoreTiles) -> DecodeResult:
    tail = None
    if call.tail is not None:
        rows = CachedRows(call.tail.k, call.tail.v, call.tail.n_valid)
        tail = merge(attend_cached_rows(call.q, rows), torch.float32)
    parts = latent_sums(call, tile_scores(call, cut), cut.rows)
    return lift_values(call, merge(parts, call.q.dtype), tail)
