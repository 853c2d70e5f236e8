# SPDX-License-Identifier: Apache-2.0
"""Which engine runs a directory: the processor's, or the GPU's."""

from pathlib import Path
from typing import Literal

from starkv.errors import EngineError, UsageError
from starkv.manifest import read_manifest
from starkv.runtime.engines.base import Engine
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.ort_cuda import OrtDeviceEngine
from starkv.runtime.engines.trt import TrtEngine

DeviceName = Literal["cpu", "cuda"]


def parse_device(name: str) -> DeviceName | None:
    """Check a device's name; ``auto`` is None.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return None
    if name == "cpu":
        return "cpu"
    if name == "cuda":
        return "cuda"
    raise UsageError(f"unknown device {name!r}; known: auto, cpu, cuda")


def open_engine(
    directory: Path, verify: bool = True, threads: int | None = None, device: str = "auto"
) -> Engine:
    """Open an engine directory.

    Args:
        directory: the engine.
        verify: compare every file with its recorded hash first.
        threads: of the processor; those this process may use by default.
        device: ``cpu``, ``cuda``, or ``auto``, which is what the engine was built for.

    Raises:
        EngineError: it is missing, damaged, built for another device, or this machine can't run it.
        UsageError: there is no such device.
    """
    chosen = parse_device(device)
    if read_manifest(directory).backend == "trt":
        if chosen == "cpu":
            raise EngineError(f"{directory} was built for TensorRT, for GPUs only; leave --device out")
        return TrtEngine(directory, verify, threads)
    if chosen is None:
        chosen = "cpu" if read_manifest(directory).compute_dtype == "float32" else "cuda"
    if chosen == "cuda":
        return OrtDeviceEngine(directory, verify, threads)
    return OrtEngine(directory, verify, threads)
