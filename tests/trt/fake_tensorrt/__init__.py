# SPDX-License-Identifier: Apache-2.0
"""A strict stand-in for the package ``tensorrt``, which really computes.

Names, arguments and ways to fail are those of the real bindings: what TensorRT refuses, it refuses with the
same value, and a line in its log. What TensorRT leaves undefined, or crashes on, fails the test
(``MisuseError``). Graphs run node by node through ONNX Runtime, plugins through a reference.

The bindings keep alive what an object was made with (``keep_alive`` in pyCore.cpp): loggers, runtimes of
engines, engines of contexts. So nothing can be dropped too early here, either.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import (
    builder,
    callbacks,
    config,
    context,
    engine,
    memory,
    network,
    parser,
    refit,
    runtime,
    timing,
)
from fake_tensorrt import registry as registries
from fake_tensorrt.binding import Dims
from fake_tensorrt.enums import enumerations
from fake_tensorrt.state import Current, State

from starkv.gpu import Gpu

ORIN = Gpu("Orin", (8, 7), 16 << 30, (12, 6))
H100 = Gpu("NVIDIA H100", (9, 0), 80 << 30, (13, 0))

_CLASSES: tuple[Any, ...] = (
    *(callbacks.ILogger, callbacks.Logger, callbacks.IProgressMonitor, callbacks.IProfiler),
    *(callbacks.IDebugListener, builder.Builder, config.IBuilderConfig, config.IOptimizationProfile),
    *(timing.ITimingCache, memory.IHostMemory, network.INetworkDefinition, network.ITensor, network.ILayer),
    *(parser.OnnxParser, parser.ParserError, runtime.Runtime, engine.ICudaEngine, engine.EngineInspector),
    *(context.IExecutionContext, refit.Refitter, refit.OnnxParserRefitter, registries.IPluginRegistry, Dims),
)
_BEFORE_11 = (callbacks.IStreamReader,)
_LATER = ((callbacks.IStreamReaderV2, (10, 7)), (callbacks.IStreamWriter, (10, 13)))
"""Classes, and the first versions that have them (names of the bindings)."""
_LATER_METHODS = (
    (builder.Builder, "build_serialized_network_to_stream", (10, 13)),
    (engine.ICudaEngine, "get_aliased_input_tensor", (10, 15)),
)
_METHODS = {name: getattr(owner, name) for owner, name, _ in _LATER_METHODS}


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
    registry = registries.IPluginRegistry.make()
    module = ModuleType("tensorrt")
    names = {kind.__name__: kind for kind in _CLASSES}
    if not state.since(11, 0):
        names |= {kind.__name__: kind for kind in _BEFORE_11}
    names |= {kind.__name__: kind for kind, first in _LATER if state.since(*first)}
    module.__dict__.update(
        names, **enumerations(state.numbers), __version__=version, get_plugin_registry=lambda: registry
    )
    for owner, name, first in _LATER_METHODS:
        # Another version may have been installed before.
        monkeypatch.setattr(owner, name, _METHODS[name], raising=False)
        if not state.since(*first):
            monkeypatch.delattr(owner, name)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("starkv.gpu.find_gpu", lambda index=0: gpu)
    return state
