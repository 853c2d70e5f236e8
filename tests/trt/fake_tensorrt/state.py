# SPDX-License-Identifier: Apache-2.0
"""What the fake TensorRT of one test is: its version, its card, what is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fake_cuda import CudaMisuseError, FakeCuda
from fake_tensorrt.binding import called
from fake_tensorrt.enums import enumerations

from starkv.gpu import Gpu


class MisuseError(CudaMisuseError):
    """What TensorRT documents as undefined behaviour, or crashes on."""


@dataclass
class State:
    """Shared by all objects of one fake package."""

    version: str
    cuda: FakeCuda
    gpu: Gpu | None
    plugins: dict[tuple[str, str, str], object] = field(default_factory=dict)
    libraries: set[str] = field(default_factory=set)
    execute: Callable[..., dict[str, Any]] | None = None
    """Runs a plugin node, see ``plugin_nodes.py``."""
    workspace_needed: int = 0
    """Bytes that a build needs, to let one fail."""
    builds: list[Any] = field(default_factory=list)
    """Every build: (network, config)."""
    measured: int = 0
    """Kernels whose time no cache knew."""

    @property
    def numbers(self) -> tuple[int, int]:
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)

    def since(self, major: int, minor: int) -> bool:
        return self.numbers >= (major, minor)

    def enum(self, name: str) -> Any:
        """An enumeration of this version."""
        return enumerations(self.numbers)[name]


class Current:
    """The state that is installed; one at a time."""

    state: State | None = None
    violations: ClassVar[list[str]] = []
    """What went wrong where nothing could be raised; the fixture ``no_violations`` looks at it."""

    @classmethod
    def get(cls) -> State:
        if cls.state is None:
            raise MisuseError("the fake TensorRT is used after its test")
        return cls.state


def log(logger: Any, severity: str, message: str) -> None:
    """Tell a logger; what it raises is printed (pyCore.cpp PyLogger)."""
    called(logger.log, getattr(type(logger).Severity, severity), message, otherwise=None)
