# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention mass that the window's queries give to each row before the window (``methods/window.py``).

Keys are read twice, in chunks that run in parallel: first for the largest score and the sum of each query's
softmax, then for the mass itself. So no score ever reaches memory: W · C of them per head would be more bytes
than the keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.compress_call import CompressCall
from starkv.kernels.triton_shared import blocks, padded, past_rows, valid_length

_CHUNK_BYTES = 32 * 1024
"""Keys that a program holds: what fits into the shared memory of every GPU beside the queries."""
_QUERIES_PER_MERGE = 32
_CHUNKS_PER_MERGE = 32


@triton.jit
def load_keys(k_ptr, group, row, length, capacity, DIM: tl.constexpr, DIMS: tl.constexpr):
    """Keys of some rows, ``[DIMS, rows]``; 0 behind the last valid row, where memory may hold anything."""
    dim = tl.arange(0, DIMS)
    offset = (group.to(tl.int64) * capacity + row[None, :]) * DIM + dim[:, None]
    return tl.load(k_ptr + offset, mask=(row[None, :] < length) & (dim[:, None] < DIM), other=0.0)


@triton.jit
def window_scores(
    q_ptr,
    keys,
    head,
    query,
    row,
    length,
    scale,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Scaled products of a head's queries with keys, ``[queries, rows]``; −inf where a query doesn't see."""
    dim = tl.arange(0, DIMS)
    offset = (head.to(tl.int64) * WINDOW + query[:, None]) * DIM + dim[None, :]
    queries = tl.load(q_ptr + offset, mask=(query[:, None] < WINDOW) & (dim[None, :] < DIM), other=0.0)
    if WIDEN:
        queries, keys = queries.to(tl.float32), keys.to(tl.float32)
    # Products of half precision are exact in float32 anyway; TF32 would round those of float32.
    scores = tl.dot(queries, keys, input_precision="ieee") * scale
    last_seen = length - WINDOW + query
    visible = (row[None, :] <= last_seen[:, None]) & (query[:, None] < WINDOW)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def softmax_parts_kernel(
    k_ptr,
    q_ptr,
    kv_len_ptr,
    part_max_ptr,
    part_sum_ptr,
    scale,
    groups,
    capacity,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    SHARING: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Largest score and sum of exponentials of every query in one chunk of a KV head's rows."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    length = valid_length(kv_len_ptr, group // groups, capacity, WINDOW)
    if chunk * ROWS < length:
        row = chunk * ROWS + tl.arange(0, ROWS)
        keys = load_keys(k_ptr, group, row, length, capacity, DIM, DIMS)
        heads = tl.num_programs(1).to(tl.int64) * SHARING
        for sharer in range(SHARING):
            head = group * SHARING + sharer
            for first_query in range(0, WINDOW, QUERIES):
                query = first_query + tl.arange(0, QUERIES)
                scores = window_scores(q_ptr, keys, head, query, row, length, scale, WINDOW, DIM, DIMS, WIDEN)
                largest = tl.max(scores, 1)
                # A query may see nothing of the last chunk: −inf − (−inf) is not a number.
                shift = tl.where(largest == float("-inf"), 0.0, largest)
                total = tl.sum(tl.exp(scores - shift[:, None]), 1)
                part = (chunk * heads + head) * WINDOW + query
                tl.store(part_max_ptr + part, largest, mask=query < WINDOW)
                tl.store(part_sum_ptr + part, total, mask=query < WINDOW)


@triton.jit
def merge_parts_kernel(
    part_max_ptr,
    part_sum_ptr,
    kv_len_ptr,
    max_ptr,
    inverse_sum_ptr,
    pair_queries,
    capacity,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Largest score and 1 / sum of every query over all chunks. ``pair_queries`` is H · W."""
    pair = tl.program_id(1)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    chunks = tl.cdiv(valid_length(kv_len_ptr, pair, capacity, WINDOW), ROWS)
    pairs = tl.num_programs(1).to(tl.int64)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        part = (chunk[:, None] * pairs + pair) * pair_queries + query[None, :]
        inside = (chunk[:, None] < chunks) & (query[None, :] < pair_queries)
        part_max = tl.load(part_max_ptr + part, mask=inside, other=float("-inf"))
        part_sum = tl.load(part_sum_ptr + part, mask=inside, other=0.0)
        larger = tl.maximum(largest, tl.max(part_max, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.sum(part_sum * tl.exp(part_max - shift[None, :]), 0)
        largest = larger
    at = pair.to(tl.int64) * pair_queries + query
    tl.store(max_ptr + at, largest, mask=query < pair_queries)
    tl.store(inverse_sum_ptr + at, 1.0 / tl.where(total == 0.0, 1.0, total), mask=query < pair_queries)


@triton.jit
def window_mass_kernel(
    k_ptr,
    q_ptr,
    kv_len_ptr,
    max_ptr,
    inverse_sum_ptr,
    mass_ptr,
    scale,
    groups,
    capacity,
    PER_HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    SHARING: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Sum of the window's attention to one chunk of a KV head's rows, per query head or their mean."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    length = valid_length(kv_len_ptr, group // groups, capacity, WINDOW)
    past = past_rows(kv_len_ptr, group // groups, capacity, WINDOW)
    if chunk * ROWS < past:
        row = chunk * ROWS + tl.arange(0, ROWS)
        keys = load_keys(k_ptr, group, row, length, capacity, DIM, DIMS)
        total = tl.zeros([ROWS], tl.float32)
        for sharer in range(SHARING):
            head = group * SHARING + sharer
            if PER_HEAD:
                total = tl.zeros([ROWS], tl.float32)
            for first_query in range(0, WINDOW, QUERIES):
                query = first_query + tl.arange(0, QUERIES)
                scores = window_scores(q_ptr, keys, head, query, row, length, scale, WINDOW, DIM, DIMS, WIDEN)
                at = head.to(tl.int64) * WINDOW + query
                largest = tl.load(max_ptr + at, mask=query < WINDOW, other=0.0)
                inverse_sum = tl.load(inverse_sum_ptr + at, mask=query < WINDOW, other=0.0)
                total += tl.sum(tl.exp(scores - largest[:, None]) * inverse_sum[:, None], 0)
            if PER_HEAD:
                tl.store(mass_ptr + head.to(tl.int64) * capacity + row, total, mask=row < past)
        if not PER_HEAD:
            tl.store(mass_ptr + group.to(tl.int64) * capacity + row, total / SHARING, mask=row < past)


def window_mass(call: CompressCall) -> Tensor:
    """Attention mass of the window on every row before it.

    Averaging over a group's heads commutes with pooling by averages, but not with pooling by maxima.

    Returns:
        f32, undefined outside the past: ``[L, B, G, C]``, the mean over a group's heads, for ``avgpool``;
        ``[L, B, H, C]`` for ``maxpool``.
    """
    layers, batch, groups, capacity, dim = call.k.shape
    heads, window = call.q_window.shape[2:4]
    assert 1 <= window <= 64
    assert heads % groups == 0
    dims = padded(dim, 16)
    rows = min(128, _CHUNK_BYTES // (dims * call.k.element_size()))
    assert rows >= 16, f"keys of {dim} numbers are too long"
    chunks, pairs = blocks(capacity, rows), layers * batch
    per_head = call.pooling == "maxpool"

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=call.k.device)

    part_max, part_sum = empty(chunks, pairs, heads, window), empty(chunks, pairs, heads, window)
    largest, inverse_sum = empty(pairs, heads, window), empty(pairs, heads, window)
    mass = empty(layers, batch, heads if per_head else groups, capacity)
    sizes = {
        "WINDOW": window,
        # Without tensor cores, products of wide blocks need more registers than there are.
        "QUERIES": 16 if call.k.dtype == torch.float32 else padded(window, 16),
        "SHARING": heads // groups,
        "DIM": dim,
        "DIMS": dims,
        "ROWS": rows,
        # Triton's interpreter would multiply the bits of bfloat16 as whole numbers.
        "WIDEN": triton.knobs.runtime.interpret and call.k.dtype == torch.bfloat16,
    }
    # The loops are short: deep pipelines would only take shared memory from other programs.
    sizes["num_stages"] = 2
    grid, scale = (chunks, pairs * groups), 1.0 / math.sqrt(dim)
    softmax_parts_kernel[grid](
        call.k, call.q_window, call.kv_len, part_max, part_sum, scale, groups, capacity, **sizes
    )
    merge_parts_kernel[(blocks(heads * window, _QUERIES_PER_MERGE), pairs)](
        part_max,
        part_sum,
        call.kv_len,
        largest,
        inverse_sum,
        heads * window,
        capacity,
        WINDOW=window,
        ROWS=rows,
        QUERIES=_QUERIES_PER_MERGE,
        CHUNKS=_CHUNKS_PER_MERGE,
    )
    window_mass_kernel[grid](
        call.k,
        call.q_window,
        call.kv_len,
        largest,
        inverse_sum,
        mass,
        scale,
        groups,
        capacity,
        PER_HEAD=per_head,
        **sizes,
    )
    return mass
