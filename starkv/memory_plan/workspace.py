# SPDX-License-Identifier: Apache-2.0
"""Bytes of workspace that starkv's plugins ask TensorRT for.

The same arithmetic as ``lay_out`` in ``plugins_trt/kernels/{attention,quantized_attention,compress}.cu``, for
machines on which the library is not built; tests compare it with the library. Symbols: B sequences, C rows of
capacity.
"""

from starkv.kv_packing.positions import COMPONENTS
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import TextShape

_ALIGNMENT = 16
_WANTED_BLOCKS = 132 * 3
"""Blocks that decoding is split into at most, over all sequences and KV heads."""
_HEADS_OF_BLOCK, _ROWS_OF_SPLIT = 16, 64
_HEADS_OF_TILE, _LANES = 8, 32
"""Of a product of codes with queries."""
_QUERIES, _SCORE_ROWS, _ROWS_OF_BLOCK = 64, 256, 1024
"""Of a block of window scores, and of the row-wise kernels."""
_NUMBER, _PAIR, _STATISTICS = 4, 8, 16
"""Bytes of a float or an int, of ``float2``, of ``NormStatistics``."""


def attention_workspace(text: TextShape, sequences: int, capacity: int) -> int:
    """Most bytes that a layer's ``KVAttention`` needs for up to so many sequences.

    Only a single new token needs any: its rows are split among blocks, and each leaves D sums, a maximum and
    a total for each query head. Fewer sequences are split more.
    """
    return max(_decode_workspace(text, count, capacity) for count in range(1, sequences + 1))


def _decode_workspace(text: TextShape, sequences: int, capacity: int) -> int:
    sharing = text.heads // text.kv_heads
    blocks = sequences * text.kv_heads * _ceil(sharing, _HEADS_OF_BLOCK)
    return _parts_workspace(text, blocks, sequences, capacity)


def _parts_workspace(text: TextShape, blocks: int, sequences: int, capacity: int) -> int:
    """What blocks leave of their part of the rows, where ``blocks`` groups of heads have theirs split."""
    splits = min(max(1, _WANTED_BLOCKS // blocks), _ceil(capacity, _ROWS_OF_SPLIT))
    parts = sequences * text.heads * splits
    return _aligned(parts * text.head_dim * _NUMBER) + _aligned(parts * _PAIR)


def code_attention_workspace(
    text: TextShape, bits: Bits, sequences: int, capacity: int, positions: int
) -> int:
    """Most bytes that a layer's attention to codes needs for up to so many sequences, in a 16-bit dtype.

    Nearly all of them are tables of what the keys' bias adds to a score: for each query head a number per
    position and component.

    Args:
        text: sizes of the decoder.
        bits: of a code.
        sequences: B.
        capacity: C of a slot.
        positions: that can be told apart.
    """
    return max(_code_workspace(text, bits, count, capacity, positions) for count in range(1, sequences + 1))


def _code_workspace(text: TextShape, bits: Bits, sequences: int, capacity: int, positions: int) -> int:
    sharing = text.heads // text.kv_heads
    tiles_of_block = 2 if sharing > _HEADS_OF_TILE else 1
    blocks = sequences * text.kv_heads * _ceil(sharing, _HEADS_OF_TILE * tiles_of_block)
    tiles = blocks * tiles_of_block
    # A quarter of a key's codes fills whole words of 4 bytes, each taken in 8 / bits steps.
    steps = _ceil(text.head_dim * bits // 8, 4 * _NUMBER) * (8 // bits)
    parts = (
        tiles * steps * _LANES * _PAIR,  # queries
        tiles * _HEADS_OF_TILE * _NUMBER,  # what makes products scores
        tiles * text.head_dim // 2 * _HEADS_OF_TILE * _PAIR,  # coefficients of the bias's share
        tiles * COMPONENTS * positions * _HEADS_OF_TILE * _NUMBER,  # and tables of it
    )
    return _parts_workspace(text, blocks, sequences, capacity) + sum(_aligned(part) for part in parts)


def compress_workspace(text: TextShape, window: int, capacity: int, slot_capacity: int) -> int:
    """Bytes that ``KVCompress`` needs for one sequence in all layers, pooling averages.

    Nearly all of them are attention masses: C numbers for each block of query heads.

    Args:
        text: sizes of the decoder.
        window: observation window, at most 64 rows.
        capacity: C of the source.
        slot_capacity: C of the destination.
    """
    sharing = text.heads // text.kv_heads
    of_block = min(sharing, _QUERIES // window)
    layers, heads = text.layers, text.layers * text.kv_heads
    blocks = heads * _ceil(sharing, of_block)
    parts = (
        _NUMBER,  # whether the sequence is accepted
        (1 + 2 * blocks) * _NUMBER,  # counters of finished work
        blocks * _ceil(capacity, _SCORE_ROWS) * _QUERIES * _PAIR,  # statistics of each part of the rows
        blocks * _QUERIES * _PAIR,  # and of all
        blocks * capacity * _NUMBER,  # attention masses
        heads * capacity * _NUMBER,  # scores of KV heads
        layers * capacity * _NUMBER,  # scores of layers
        layers * _ceil(capacity, _ROWS_OF_BLOCK) * _NUMBER,  # their sums
        layers * _STATISTICS,  # of hidden norms
        heads * _NUMBER,  # stability
        layers * _NUMBER,  # entropy
        layers * _NUMBER,  # rows that layers ask for
        layers * capacity * _NUMBER,  # keys that rows are sorted by
        layers * _NUMBER,  # rows that compete
        layers * slot_capacity * _NUMBER,  # rows that are kept
    )
    return sum(_aligned(part) for part in parts)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _aligned(size: int) -> int:
    return _ceil(size, _ALIGNMENT) * _ALIGNMENT
