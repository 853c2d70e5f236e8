# SPDX-License-Identifier: Apache-2.0
"""TensorRT versions: which are supported, and what the oldest of them lack."""

import re
from dataclasses import dataclass

from starkv.errors import UsageError


@dataclass(frozen=True, order=True)
class TensorRTVersion:
    """Major and minor version; patches differ in nothing that starkv can see."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> "TensorRTVersion":
        """Read ``10.3`` or ``10.3.0.26``.

        Raises:
            UsageError: that is no version.
        """
        found = re.match(r"(\d+)\.(\d+)(\.|$)", text)
        if not found:
            raise UsageError(f"{text!r} is no TensorRT version; write it as {OLDEST} or {NEWEST}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


OLDEST = TensorRTVersion(10, 3)
"""JetPack 6."""
NEWEST = TensorRTVersion(11, 4)
"""The newest whose names were compared. Later ones of the same major version are taken, too."""
CHECKED = (OLDEST, TensorRTVersion(10, 13), TensorRTVersion(10, 16), TensorRTVersion(11, 1), NEWEST)
"""Versions whose names and rules are checked."""

STREAM_READER_V2 = TensorRTVersion(10, 7)
"""Plans are read by ``IStreamReaderV2``, before by ``IStreamReader`` (pyCore.cpp of each tag)."""
SAME_COMPUTE_CAPABILITY = TensorRTVersion(10, 9)
"""Plans can be made for all GPUs of one compute capability."""
PLAN_TO_STREAM = TensorRTVersion(10, 13)
"""A plan can be written while it is built, instead of lying in memory as a whole."""
ALIASED_TENSORS = TensorRTVersion(10, 15)
"""An engine says which output must share which input's memory."""
NATIVE_ATTENTION = TensorRTVersion(10, 14)
"""The parser knows ``Attention``."""
NATIVE_NORMS = TensorRTVersion(10, 15)
"""The parser knows ``RMSNormalization`` and ``RotaryEmbedding``."""


def supported(version: TensorRTVersion) -> bool:
    """Whether starkv builds for, and runs on, that version."""
    return version >= OLDEST and version.major <= NEWEST.major


def parse_target(text: str) -> TensorRTVersion:
    """Read the version that an engine is built for.

    Raises:
        UsageError: no version, or one that is too old or too new.
    """
    version = TensorRTVersion.parse(text)
    if not supported(version):
        raise UsageError(
            f"TensorRT {version} is not supported: starkv builds for {OLDEST} (JetPack 6) to {NEWEST.major}.x"
        )
    return version
