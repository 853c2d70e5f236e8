# SPDX-License-Identifier: Apache-2.0
"""A strict stand-in for the package ``tensorrt``, which really computes.

Names, arguments and ways to fail are those of the real bindings. What TensorRT leaves undefined, or
crashes on, fails the test (``MisuseError``). Graphs run node by node through ONNX Runtime, plugins through a
reference.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import building, enums, network, running
from fake_tensorrt.state import Current, State

from starkv.gpu import Gpu
from starkv.trt_compat.plugins import NAMESPACE, OPERATORS, VERSION

ORIN = Gpu("Orin", (8, 7), 16 << 30, (12, 6))
H100 = Gpu("NVIDIA H100", (9, 0), 80 << 30, (13, 0))


class ILogger:
    Severity = enums.Severity


class Logger(ILogger):
    def __init__(self, min_severity: enums.Severity = enums.Severity.WARNING) -> None:
        self.lines: list[str] = []

    def log(self, severity: enums.Severity, msg: str) -> None:
        self.lines.append(msg)


class Callback:
    """Base of what callers subclass; the bindings insist on ``__init__`` being called."""

    def __init__(self) -> None:
        self._initialised = True


class IPluginRegistry:
    def load_library(self, plugin_path: str) -> object | None:
        """None for a missing file, for one that is no plugin library, and for a second load."""
        state = Current.get()
        if plugin_path in state.libraries:
            return None
        try:
            with open(plugin_path, "rb") as file:
                head = file.read(4)
        except OSError:
            return None
        if head != b"\x7fELF":
            return None
        state.libraries.add(plugin_path)
        for name in OPERATORS:
            state.plugins[name, VERSION, NAMESPACE] = object()
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object | None:
        return Current.get().plugins.get((type, version, plugin_namespace))


def install(
    monkeypatch: pytest.MonkeyPatch,
    version: str = "10.3.0.26",
    cuda: FakeCuda | None = None,
    gpu: Gpu | None = H100,
    execute: Any = None,
) -> State:
    """Be the package ``tensorrt``, and the card, as long as the test runs.

    Args:
        monkeypatch: of the test.
        version: of TensorRT; names that it lacks are missing.
        cuda: memory and streams.
        gpu: what ``starkv.gpu.find_gpu`` finds; None is a machine without one.
        execute: runs plugin nodes, see ``plugin_nodes.py``; the references if None.
    """
    state = State(version, cuda or FakeCuda(), gpu, execute=execute)
    monkeypatch.setattr(Current, "state", state)
    module = ModuleType("tensorrt")
    registry = IPluginRegistry()
    names: dict[str, Any] = {
        name: getattr(source, name)
        for source, list_of_names in (
            (building, ("Builder", "IBuilderConfig", "IOptimizationProfile", "ITimingCache", "IHostMemory")),
            (network, ("INetworkDefinition", "OnnxParser", "ITensor", "ILayer", "ParserError")),
            (running, ("Runtime", "ICudaEngine", "Refitter", "OnnxParserRefitter", "EngineInspector")),
            (enums, [name for name in vars(enums) if name[0].isupper() and name not in ("Enum", "IntEnum")]),
        )
        for name in list_of_names
    }
    callbacks = ["IProgressMonitor", "IDebugListener", "IProfiler"]
    if not state.since(11, 0):
        callbacks.append("IStreamReader")
    if state.since(10, 7):
        callbacks.append("IStreamReaderV2")
    if state.since(10, 13):
        callbacks.append("IStreamWriter")
    names |= {name: type(name, (Callback,), {}) for name in callbacks}
    module.__dict__.update(
        names,
        __version__=version,
        ILogger=ILogger,
        Logger=Logger,
        get_plugin_registry=lambda: registry,
    )
    _take_away(monkeypatch, state)
    module.__dict__.update(_enums_of(state))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("starkv.gpu.find_gpu", lambda index=0: gpu)
    return state


_LATER_METHODS = (
    (building.Builder, "build_serialized_network_to_stream", (10, 13)),
    (running.ICudaEngine, "get_aliased_input_tensor", (10, 15)),
)
_METHODS = {name: getattr(owner, name) for owner, name, _ in _LATER_METHODS}


def _take_away(monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    """Remove the methods that a version lacks (the bindings' names of each version)."""
    for owner, name, first in _LATER_METHODS:
        # Another version may have been installed before.
        monkeypatch.setattr(owner, name, _METHODS[name], raising=False)
        if not state.since(*first):
            monkeypatch.delattr(owner, name)


def _enums_of(state: State) -> dict[str, Any]:
    """Enumerations without the members that a version lacks."""
    gone: dict[str, tuple[str, ...]] = {}
    if not state.since(10, 9):
        gone["HardwareCompatibilityLevel"] = ("SAME_COMPUTE_CAPABILITY",)
    if state.since(11, 0):
        gone |= {"BuilderFlag": ("FP16", "INT8"), "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",)}
    return {name: _without(getattr(enums, name), removed) for name, removed in gone.items()}


def _without(enumeration: Any, removed: tuple[str, ...]) -> Any:
    members = enumeration.__members__.items()
    return SimpleNamespace(**{name: member for name, member in members if name not in removed})
