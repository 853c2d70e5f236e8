# SPDX-License-Identifier: Apache-2.0
"""What an export has finished, on disk: a run that was killed is continued by the next one."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

JOURNAL_NAME = "journal.jsonl"

Extent = tuple[int, int]
"""Where a tensor lies in its data file: offset and length in bytes."""


class Journal:
    """Finished tensors of all data files of one directory, one line each.

    A line says where a tensor lies and the checksum of its bytes. After a crash a line may have reached the
    disk before the bytes; the checksum tells.
    """

    def __init__(self, directory: Path) -> None:
        """Read the lines of an earlier run; one that was cut off is ignored."""
        self._path = directory / JOURNAL_NAME
        self._finished: dict[tuple[str, str], tuple[Extent, int]] = {}
        if self._path.is_file():
            for line in self._path.read_text(errors="replace").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            file, name, offset, length, checksum = json.loads(line)
        except ValueError:
            return
        self._finished[file, name] = ((offset, length), checksum)

    def holds(self, file: str, name: str, extent: Extent, stored: npt.NDArray[np.generic]) -> bool:
        """Whether the tensor was finished at that place and its bytes are still those."""
        known = self._finished.get((file, name))
        return known is not None and known[0] == extent and known[1] == _checksum(stored)

    def add(self, entries: Sequence[tuple[str, str, Extent, npt.NDArray[np.generic]]]) -> None:
        """Note finished tensors as (file, name, extent, bytes)."""
        lines = [
            json.dumps([file, name, *extent, _checksum(stored)]) + "\n"
            for file, name, extent, stored in entries
        ]
        # A line that was cut off by a crash must not swallow the first new one.
        with self._path.open("a+") as stream:
            stream.write("\n" if self._is_cut_off() else "")
            stream.writelines(lines)

    def _is_cut_off(self) -> bool:
        with self._path.open("rb") as stream:
            if not stream.seek(0, 2):
                return False
            stream.seek(-1, 2)
            return stream.read(1) != b"\n"


def _checksum(stored: npt.NDArray[np.generic]) -> int:
    return zlib.crc32(stored.reshape(-1).view(np.uint8).data)
