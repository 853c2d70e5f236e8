# SPDX-License-Identifier: Apache-2.0
"""Copies of an ONNX Runtime engine whose graphs do something else as well: show their layers, or round."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GRAPHS = ("vision", "decoder")
Change = Callable[[Any], None]
"""Edits an onnx.GraphProto in place."""


@contextmanager
def changed_copy(directory: Path, *changes: Change) -> Iterator[Path]:
    """A copy with other graphs beside hard links of all other files; it is gone after the block.

    Its files are not those of its manifest, so it is opened without verification.

    Args:
        directory: an engine of ONNX Runtime.
        changes: made to vision tower and decoder, one after the other.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix=".starkv-validate-", dir=_place_beside(directory)) as scratch:
        copy = Path(scratch)
        for path in directory.iterdir():
            if path.suffix == ".onnx" and path.stem in GRAPHS:
                model = onnx.load(path, load_external_data=False)
                for change in changes:
                    change(model.graph)
                onnx.save(model, copy / path.name)
            elif path.is_file() and "prepacked" not in path.name:
                try:
                    os.link(path, copy / path.name)
                except OSError:
                    shutil.copyfile(path, copy / path.name)
        yield copy


def _place_beside(directory: Path) -> Path | None:
    """Where files can be shared with ``directory``; None, for temporary files, if that can't be written."""
    parent = directory.resolve().parent
    return parent if os.access(parent, os.W_OK) else None
