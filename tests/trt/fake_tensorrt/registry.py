# SPDX-License-Identifier: Apache-2.0
"""The plugin registry."""

from pathlib import Path

from fake_tensorrt.binding import Bound, expect
from fake_tensorrt.plugin_nodes import DOMAIN
from fake_tensorrt.state import Current

from starkv.trt_compat.plugins import OPERATORS, VERSION

_ELF = b"\x7fELF"


class IPluginRegistry(Bound):
    def load_library(self, plugin_path: str) -> object | None:
        """NvInferRuntimeCommon.h loadLibrary: None if it can't be, or its plugins are registered already."""
        state, path = Current.get(), Path(expect(plugin_path, str, "plugin_path"))
        if not _is_library(path):
            return None
        keys = [(name, VERSION, DOMAIN) for name in OPERATORS]
        if any(key in state.plugins for key in keys):
            return None
        state.libraries.add(plugin_path)
        state.plugins.update(dict.fromkeys(keys, object()))
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object | None:
        for value, what in ((type, "type"), (version, "version"), (plugin_namespace, "plugin_namespace")):
            expect(value, str, what)
        return Current.get().plugins.get((type, version, plugin_namespace))


def _is_library(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_ELF)) == _ELF
    except OSError:
        return False
