# SPDX-License-Identifier: Apache-2.0
"""Packed engines of a small model, calibrated on few prompts."""

from collections.abc import Sequence
from pathlib import Path

from starkv.cli.packing import pack_variants
from starkv.export.progress import NoProgress
from starkv.kv_packing.options import PackingOptions


def pack_quickly(engine: Path, home: Path, wanted: Sequence[PackingOptions]) -> dict[PackingOptions, Path]:
    """Pack an engine in several ways."""
    return pack_variants(engine, wanted, home, NoProgress())
