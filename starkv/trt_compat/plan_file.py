# SPDX-License-Identifier: Apache-2.0
"""Writes what TensorRT built to a file, piece by piece where TensorRT can."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from starkv.trt_compat.module import TensorRT
from starkv.trt_compat.version import PLAN_TO_STREAM

if TYPE_CHECKING:
    import tensorrt as trt


def write_plan(
    tensorrt: TensorRT,
    builder: "trt.Builder",
    network: "trt.INetworkDefinition",
    config: "trt.IBuilderConfig",
    path: Path,
) -> bool:
    """Build and write the plan; whether TensorRT could. It takes minutes to hours.

    Raises:
        OSError: the file can't be written.
    """
    with path.open("wb") as stream:
        if tensorrt.version < PLAN_TO_STREAM:
            # IHostMemory, which is a buffer.
            plan: Any = builder.build_serialized_network(network, config)
            if plan is None:
                return False
            stream.write(plan)
            return True
        failures: list[OSError] = []
        writer = _make_writer(tensorrt, stream, failures)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if failures:
            raise failures[0]
        return bool(built)


def _make_writer(tensorrt: TensorRT, stream: BinaryIO, failures: list[OSError]) -> "trt.IStreamWriter":
    """A writer that never raises into TensorRT: a failure is kept, and ends the writing."""
    module = tensorrt.module

    class Writer(module.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return stream.write(data)
            except OSError as error:
                failures.append(error)
                return -1

    return Writer()
