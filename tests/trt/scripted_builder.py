# SPDX-License-Identifier: Apache-2.0
"""TensorRT's builder as a script: it writes down what it is told, and fails in the ways that a test asks for.

``fake_tensorrt`` knows TensorRT's rules; this knows nothing, and so can do what a right build never meets.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from starkv.gpu import Gpu

H100 = Gpu("NVIDIA H100", (9, 0), 80 << 30, (13, 0))
OPERATORS = ("KVAttention", "FullAttention", "KVCompress", "PackableKVAttention")


@dataclass
class Script:
    """What happens, and what was told."""

    version: str = "10.3.0.26"
    builder: bool = True
    """Whether there is one; a null pointer otherwise."""
    plugins: bool = True
    """Whether the library can be loaded."""
    parser_errors: list[tuple[str, str, str]] = field(default_factory=list)
    """(node, operator, what is wrong)."""
    profile_index: int | None = None
    """What adding a profile puts out; its number if None."""
    build_error: str | None = None
    during_build: Callable[[], None] = lambda: None
    loads: bool = True
    """Whether the plan that was built can be loaded."""
    pieces: int = 3
    """Writes that a plan comes in, where it is streamed."""
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def words(self, kind: str) -> list[tuple[Any, ...]]:
        return [entry[1:] for entry in self.told if entry[0] == kind]


def install(monkeypatch: pytest.MonkeyPatch, script: Script) -> ModuleType:
    """Be the package ``tensorrt`` as long as the test runs."""
    module = ModuleType("tensorrt")
    module.__dict__.update(_content(script), __version__=script.version)
    new = tuple(map(int, script.version.split(".")[:2])) >= (10, 13)
    if not new:
        del module.Builder.build_serialized_network_to_stream
        del module.IStreamWriter
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def builder_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Script:
    """A machine with an H100, TensorRT 10.3 and the plugins; tests change what goes wrong."""
    script = Script()
    install(monkeypatch, script)
    monkeypatch.setattr("starkv.gpu.find_gpu", lambda index=0: H100)
    built = folder / "plugins"
    built.mkdir()
    (built / "libstarkv_trt.so").write_bytes(b"\0Cuda compilation tools, release 13.0, V13.0.88\0")
    (built / "libstarkv_kernels.so").write_bytes(b"kernels")
    monkeypatch.setenv("STARKV_KERNELS", str(built / "libstarkv_kernels.so"))
    monkeypatch.setenv("STARKV_TIMING_CACHE", str(folder / "timing"))
    return script


def _enum(name: str, *members: str) -> Any:
    return IntEnum(name, {member: index for index, member in enumerate(members)})  # type: ignore[misc]


def _content(script: Script) -> dict[str, Any]:
    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    class Logger:
        def log(self, level: Any, message: str) -> None:
            raise NotImplementedError

    Logger.Severity = Severity  # type: ignore[attr-defined]

    class Registry:
        def __init__(self) -> None:
            self.loaded: list[str] = []

        def get_creator(self, name: str, version: str, namespace: str) -> object | None:
            known = name in OPERATORS and (version, namespace) == ("1", "ai.starkv")
            return object() if known and self.loaded else None

        def load_library(self, path: str) -> object | None:
            if not script.plugins:
                return None
            self.loaded = [path]
            script.told.append(("library", path))
            return object()

    registry = Registry()

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
            self.shapes[name] = (least, usual, most)

    class Cache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def combine(self, other: "Cache", ignore_mismatch: bool) -> bool:
            self.content += b"+" + other.content
            return True

        def serialize(self) -> bytes:
            return self.content

    class Config:
        def __init__(self) -> None:
            object.__setattr__(self, "profiles", 0)

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)
            script.told.append(("set", name, value))

        def set_flag(self, flag: Any) -> None:
            script.told.append(("flag", flag.name))

        def set_preview_feature(self, feature: Any, on: bool) -> None:
            script.told.append(("preview", feature.name, on))

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            script.told.append(("pool", pool.name, size))

        def add_optimization_profile(self, profile: Profile) -> int:
            script.told.append(("profile", profile.shapes))
            return len(script.words("profile")) - 1 if script.profile_index is None else script.profile_index

        def create_timing_cache(self, content: bytes) -> Cache | None:
            return None if content.startswith(b"damaged") else Cache(content)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache.content.startswith(b"other card"):
                return False
            script.told.append(("cache", cache.content))
            object.__setattr__(self, "cache", cache)
            return True

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    class Layer:
        def __init__(self, node: onnx.NodeProto) -> None:
            self.outputs = [Named(name) for name in node.output]
            self.num_outputs = len(self.outputs)

        def get_output(self, index: int) -> Named:
            return self.outputs[index]

    class Network:
        def __init__(self, flags: int) -> None:
            script.told.append(("network", flags))
            self.graph: Any = None

        def read(self, graph: onnx.GraphProto) -> None:
            self.num_inputs, self.num_layers = len(graph.input), len(graph.node)
            self.graph = graph

        def get_input(self, index: int) -> Named:
            return Named(self.graph.input[index].name)

        def get_layer(self, index: int) -> Layer:
            return Layer(self.graph.node[index])

        def mark_debug(self, tensor: Named) -> bool:
            script.told.append(("debug", tensor.name))
            return True

    class ParserError:
        def __init__(self, node: str, operator: str, words: str) -> None:
            self.node_name, self.node_operator, self.desc = lambda: node, lambda: operator, lambda: words

    class OnnxParser:
        num_errors = len(script.parser_errors)

        def __init__(self, network: Network, logger: Any) -> None:
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            script.told.append(("parse", Path(path).name))
            self.network.read(onnx.load(path, load_external_data=False).graph)
            return not script.parser_errors

        def get_error(self, index: int) -> ParserError:
            return ParserError(*script.parser_errors[index])

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger
            if not script.builder:
                logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int = 0) -> Network:
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def _build(self, config: Any) -> bytes | None:
            monitor = config.progress_monitor
            monitor.phase_start("Building engine", None, 2)
            script.during_build()
            going = monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
            if not going:
                script.told.append(("stopped",))
                return None
            if script.build_error is not None:
                self.logger.log(Severity.ERROR, script.build_error)
                return None
            config.cache.content += b"|measured"
            return b"plan of " + str(len(script.words("parse"))).encode()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            script.told.append(("built", "whole"))
            return self._build(config)

        def build_serialized_network_to_stream(self, network: Network, config: Config, writer: Any) -> bool:
            script.told.append(("built", "streamed"))
            plan = self._build(config)
            return plan is not None and all(writer.write(plan) == len(plan) for _ in range(script.pieces))

    class Engine:
        def __init__(self, plan: bytes) -> None:
            self.num_optimization_profiles = 2 if b"plan of 2" in plan else 1
            self.num_io_tensors = 0

        def get_device_memory_size_for_profile_v2(self, index: int) -> int:
            return 1000 * (index + 1)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, reader: Any) -> Engine | None:
            if not script.loads:
                self.logger.log(Severity.ERROR, "Cuda Runtime (out of memory)")
                return None
            old = isinstance(reader, StreamReader)
            return Engine(bytes(reader.read(1000) if old else reader.read(1000, 0)))

    class StreamReader:
        pass

    class StreamReaderV2:
        pass

    class IProgressMonitor:
        pass

    class IStreamWriter:
        pass

    return {
        "ILogger": Logger,
        "get_plugin_registry": lambda: registry,
        "Builder": Builder,
        "OnnxParser": OnnxParser,
        "Runtime": Runtime,
        "IProgressMonitor": IProgressMonitor,
        "IStreamReader": StreamReader,
        "IStreamReaderV2": StreamReaderV2,
        "SeekPosition": _enum("Seek", "SET", "CUR", "END"),
        "IStreamWriter": IStreamWriter,
        "NetworkDefinitionCreationFlag": _enum("Creation", "EXPLICIT_BATCH", "STRONGLY_TYPED"),
        "ProfilingVerbosity": _enum("Verbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED"),
        "MemoryPoolType": _enum("Pool", "WORKSPACE"),
        "PreviewFeature": _enum("Preview", "ALIASED_PLUGIN_IO_10_03"),
        "BuilderFlag": _enum("Flag", "STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING"),
        "HardwareCompatibilityLevel": _enum("Level", "NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
    }
