# SPDX-License-Identifier: Apache-2.0
"""Writes the graphs that compress a prompt's KV cache. They hold no weights."""

from pathlib import Path

import onnx

from starkv.manifest import TextShape
from starkv.onnx_compress import COMPACT, COMPRESS, SCORE_WINDOW, compress_model

COMPRESS_GRAPHS = {"compress": COMPRESS, "compact": COMPACT, "score_window": SCORE_WINDOW}
"""Name of each graph → operator that it calls."""


def write_compress_graphs(directory: Path, text: TextShape) -> None:
    """Write ``compress.onnx``, ``compact.onnx`` and ``score_window.onnx`` for a decoder of this shape.

    Heads and head size are fixed; layers, rows and slots stay open, so that a runtime may call a graph once
    for all layers or for one at a time.
    """
    sizes = {"G": text.kv_heads, "H": text.heads, "D": text.head_dim}
    for name, operator in COMPRESS_GRAPHS.items():
        onnx.save(compress_model(operator, sizes), directory / f"{name}.onnx")
