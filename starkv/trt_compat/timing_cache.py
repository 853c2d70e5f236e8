# SPDX-License-Identifier: Apache-2.0
"""How long each kernel took, measured once: the next build of the same layers is far quicker."""

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv.gpu import Gpu

if TYPE_CHECKING:
    import tensorrt as trt

DIRECTORY_VARIABLE = "STARKV_TIMING_CACHE"


def default_directory() -> Path:
    """``$STARKV_TIMING_CACHE``, or a folder among the user's caches."""
    if named := os.environ.get(DIRECTORY_VARIABLE):
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "starkv" / "tensorrt"


def timing_cache_path(directory: Path, version: str, gpu: Gpu) -> Path:
    """File of the measurements of one TensorRT on one kind of card: no other can use them.

    Args:
        directory: where such files are kept.
        version: TensorRT's full version.
        gpu: the card, and the CUDA that its driver runs.
    """
    card = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    major, minor = gpu.capability
    cuda = ".".join(map(str, gpu.driver_cuda))
    return directory / f"{version}-sm{major}{minor}-cuda{cuda}-{card}.timing"


class TimingCache:
    """The measurements in a file, for the builds of one run.

    A file that can't be read, or is of another TensorRT or card, is as good as none; one that can't be
    written costs nothing but time. The build is what matters.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def attach(self, config: "trt.IBuilderConfig") -> "trt.ITimingCache":
        """Let a build use the measurements; it adds its own to what is returned."""
        cache = config.create_timing_cache(self._read())
        if cache is None or not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache

    def save(self, config: "trt.IBuilderConfig", cache: "trt.ITimingCache") -> None:
        """Write the measurements after a build, together with what another process has written since."""
        others = config.create_timing_cache(self._read())
        if others is not None:
            cache.combine(others, False)
        content: Any = cache.serialize()
        if content is not None:
            with suppress(OSError):
                _replace(self._path, content)

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError:
            return b""


def _replace(path: Path, content: Any) -> None:
    """Write beside and rename, so that nobody ever reads half a file.

    Args:
        path: the file.
        content: a buffer, such as TensorRT's IHostMemory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
