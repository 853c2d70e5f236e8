# SPDX-License-Identifier: Apache-2.0
"""Multimodal rotary positions (M-RoPE) and the cosines and sines made from them.

Each token has a temporal, a vertical and a horizontal position. Text counts all three up together; the
tokens of an image share one temporal position and spread over the other two, and the text behind it goes on
after the longer side. So a 1080p screenshot of 39 x 69 tokens costs 2,691 cache rows, but advances the
position by only 69.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starkv.manifest import TextShape
from starkv.runtime.preprocess.rope import inverse_frequencies


@dataclass(frozen=True)
class Positions:
    """Positions of a run of tokens."""

    values: NDArray[np.int32]
    """``[3, S]``: temporal, vertical and horizontal position."""
    next_position: int
    """All three positions of the text token that follows."""


def text_positions(length: int, start: int = 0) -> Positions:
    """Positions of ``length`` tokens of text, and of every token of a model without M-RoPE."""
    counting = np.arange(start, start + length, dtype=np.int32)
    return Positions(np.tile(counting, (3, 1)), start + length)


def multimodal_positions(
    token_ids: Sequence[int] | NDArray[np.integer],
    image_pad: int,
    merged_grids: Sequence[tuple[int, int]],
    start: int = 0,
) -> Positions:
    """Positions of text with images in it.

    Args:
        token_ids: ``[S]``; every image is a run of ``rows * columns`` copies of ``image_pad``.
        image_pad: id of the placeholder.
        merged_grids: rows and columns of image tokens of each image, in order of appearance.
        start: position of the first token; the previous ``next_position`` when a sequence is continued.

    Raises:
        ValueError: the runs of placeholders are not those of the grids.
    """
    ids = np.asarray(token_ids)
    placeholders = np.flatnonzero(ids == image_pad)
    expected = sum(rows * columns for rows, columns in merged_grids)
    if len(placeholders) != expected:
        raise ValueError(f"{len(placeholders)} image tokens, but the image grids hold {expected}")

    pieces: list[NDArray[np.int32]] = []
    position, row, taken = start, 0, 0
    for rows, columns in merged_grids:
        count = rows * columns
        first = int(placeholders[taken])
        if int(placeholders[taken + count - 1]) != first + count - 1:
            raise ValueError(f"the {rows}x{columns} tokens of an image are not one run from token {first}")
        text = text_positions(first - row, position)
        position = text.next_position
        pieces += [text.values, _image_positions(rows, columns, position)]
        position += max(rows, columns)
        row, taken = first + count, taken + count
    tail = text_positions(len(ids) - row, position)
    return Positions(np.concatenate([*pieces, tail.values], axis=1), tail.next_position)


def prompt_positions(
    token_ids: Sequence[int] | NDArray[np.integer],
    image_pad: int,
    merged_grids: Sequence[tuple[int, int]],
    text: TextShape,
    start: int = 0,
) -> Positions:
    """Positions of a prompt as the model counts: multimodal, or without M-RoPE one after the other.

    Args:
        token_ids: ``[S]``; see :func:`multimodal_positions`.
        image_pad: id of the placeholder.
        merged_grids: rows and columns of image tokens of each image.
        text: sizes of the decoder.
        start: position of the first token; see :func:`multimodal_positions`.

    Raises:
        ValueError: the runs of placeholders are not those of the grids.
    """
    if text.mrope_section is None:
        return text_positions(len(token_ids), start)
    return multimodal_positions(token_ids, image_pad, merged_grids, start)


def rope_tables(
    positions: NDArray[np.integer], text: TextShape
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the decoder's rotary embedding.

    With M-RoPE the rotary pairs are divided into sections (``text.mrope_section``) that read the temporal,
    vertical and horizontal position in turn. Without, all pairs read the first.

    Args:
        positions: ``[3, S]`` or ``[3, B, S]``.
        text: sizes of the decoder.

    Returns:
        ``rope_cos`` and ``rope_sin``, each ``[B, S, head_dim / 2]`` float32 (B = 1 for ``[3, S]``): the table
        of a non-interleaved RotaryEmbedding, one entry per pair.

    Raises:
        ValueError: the sections don't cover the pairs.
    """
    batched = positions if positions.ndim == 3 else positions[:, None]
    pairs = text.head_dim // 2
    if text.mrope_section is None:
        axis_of_pair = np.zeros(pairs, dtype=np.intp)
    else:
        axis_of_pair = np.repeat(np.arange(len(text.mrope_section)) % 3, text.mrope_section)
        if len(axis_of_pair) != pairs:
            raise ValueError(f"mrope_section {text.mrope_section} does not add up to {pairs} rotary pairs")
    frequencies = inverse_frequencies(text.head_dim, text.rope_theta)
    of_pair = np.moveaxis(batched.astype(np.float32)[axis_of_pair], 0, -1)
    angles = of_pair * frequencies
    return np.cos(angles), np.sin(angles)


def _image_positions(rows: int, columns: int, start: int) -> NDArray[np.int32]:
    """Positions of one image's tokens in reading order, ``[3, rows * columns]``."""
    values = np.empty((3, rows, columns), dtype=np.int32)
    values[0] = start
    values[1] = start + np.arange(rows, dtype=np.int32)[:, None]
    values[2] = start + np.arange(columns, dtype=np.int32)[None, :]
    return values.reshape(3, -1)
