# SPDX-License-Identifier: Apache-2.0
"""starkv's plugin library in TensorRT's registry."""

from pathlib import Path

from starkv.errors import EngineError
from starkv.trt_compat.module import TensorRT

NAMESPACE, VERSION = "ai.starkv", "1"
OPERATORS = ("KVAttention", "FullAttention", "KVCompress", "PackableKVAttention")
"""Plugins of the library that engines need."""
LIBRARY_NAME = "libstarkv_trt.so"


def load_plugins(tensorrt: TensorRT, library: Path) -> None:
    """Register the plugins of a library, once per process.

    TensorRT says nothing where it can't: it puts out None for a missing file, for a file that is no plugin
    library, and for plugins that are registered already.

    Raises:
        EngineError: the file is missing, can't be loaded, or holds other plugins.
    """
    registry = tensorrt.module.get_plugin_registry()

    def missing() -> list[str]:
        return [name for name in OPERATORS if registry.get_creator(name, VERSION, NAMESPACE) is None]

    if not missing():
        return
    if not library.is_file():
        raise EngineError(f"{library} is missing; `make plugin` builds it")
    if registry.load_library(str(library.resolve())) is None:
        raise EngineError(
            f"TensorRT {tensorrt.full_version} can't load {library}: it is no plugin library, was built for "
            "another machine, or for a CUDA version that the driver does not run; build it here with "
            "`make plugin`"
        )
    if absent := missing():
        raise EngineError(
            f"{library} has no plugin {absent[0]} of version {VERSION}; build it again with `make plugin`"
        )
