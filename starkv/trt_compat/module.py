# SPDX-License-Identifier: Apache-2.0
"""The package ``tensorrt`` itself."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starkv.errors import EngineError
from starkv.trt_compat.version import NEWEST, OLDEST, TensorRTVersion, supported

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class TensorRT:
    """The installed TensorRT."""

    module: Any
    """The package ``tensorrt``."""
    version: TensorRTVersion
    full_version: str
    """Such as ``10.3.0.26``; plans run only where they were built, up to this."""


def load_tensorrt() -> TensorRT:
    """Import TensorRT.

    Raises:
        EngineError: it is missing, broken, too old or too new.
    """
    try:
        import tensorrt
    except ImportError as error:
        if getattr(error, "name", None) == "tensorrt":
            raise EngineError(
                "TensorRT is not installed; on a server: pip install 'starkv[trt]', on a Jetson it comes "
                "with JetPack (docs/deployment.md)"
            ) from None
        raise EngineError(f"TensorRT can't be loaded ({error}); install it again") from None
    full = str(getattr(tensorrt, "__version__", ""))
    version = TensorRTVersion.parse(full or "0.0")
    if not supported(version):
        age = "too old" if version < OLDEST else "too new"
        raise EngineError(
            f"TensorRT {full or 'of an unknown version'} is {age}: starkv needs {OLDEST} to {NEWEST.major}.x"
        )
    return TensorRT(tensorrt, version, full)


class TensorRTLog:
    """What TensorRT had to say: errors for our own messages, and all of it on request."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        """Errors since the last :meth:`take`, oldest first."""
        self.warnings: list[str] = []

    def take(self) -> str:
        """The errors as one line, which are then forgotten; ``no reason given`` where there are none."""
        said, self.errors = self.errors, []
        return "; ".join(line.strip() for line in said) or "no reason given"


def make_logger(tensorrt: TensorRT, log: TensorRTLog) -> "trt.ILogger":
    """A logger for TensorRT that writes to ``log``; it must outlive everything that was made with it."""
    module = tensorrt.module
    severity = module.ILogger.Severity

    class Logger(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                log.errors.append(message)
            elif level == severity.WARNING:
                log.warnings.append(message)

    return Logger()
