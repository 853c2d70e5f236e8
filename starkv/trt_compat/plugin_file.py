# SPDX-License-Identifier: Apache-2.0
"""The file of the plugins: where it lies, and whether this machine's driver can run what is in it."""

import mmap
import re
from pathlib import Path

from starkv.errors import EngineError
from starkv.gpu import Gpu
from starkv.kernels.library_paths import KERNELS, PLUGINS, library_folders

_COMPILER = re.compile(rb"Cuda compilation tools, release (\d+)\.(\d+)")
"""What nvcc notes beside the code of each kernel, unless it was told to compress it."""


def find_plugins(named: Path | None) -> Path:
    """The plugin library: the one that is named, or the one that ``make plugin`` built.

    Raises:
        EngineError: there is none.
    """
    if named is not None:
        if not named.is_file():
            raise EngineError(f"{named} is missing; `make plugin` builds {PLUGINS['cuda']}")
        return named
    for folder in library_folders():
        path = folder / PLUGINS["cuda"]
        if path.is_file():
            return path
    raise EngineError(
        f"{PLUGINS['cuda']} is not built: run `make plugin` where nvcc is, or name the file with --plugin"
    )


def kernels_beside(plugins: Path) -> Path | None:
    """The kernel library of the same build, where there is one."""
    path = plugins.with_name(KERNELS["cuda"])
    return path if path.is_file() else None


def cuda_release(library: Path) -> tuple[int, int] | None:
    """CUDA that a library's kernels were compiled with, or None where it doesn't say."""
    with library.open("rb") as stream:
        if not library.stat().st_size:
            return None
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _COMPILER.search(content)
            return (int(found[1]), int(found[2])) if found else None


def check_plugins(plugins: Path, gpu: Gpu) -> None:
    """Check that the driver runs the library's code: that of its own major version of CUDA, or of older ones.

    Raises:
        EngineError: it doesn't.
    """
    release = cuda_release(plugins)
    if release is not None and release[0] > gpu.driver_cuda[0] > 0:
        compiled, driver = (".".join(map(str, version)) for version in (release, gpu.driver_cuda))
        raise EngineError(
            f"{plugins} was built with CUDA {compiled}, but the driver here runs up to {driver}: update "
            f"the driver, or build the plugins with CUDA {gpu.driver_cuda[0]} (`make plugin`)"
        )
