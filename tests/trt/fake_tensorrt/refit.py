# SPDX-License-Identifier: Apache-2.0
"""Weights that are put into an engine after it was built."""

from pathlib import Path
from typing import Any

import onnx
from fake_tensorrt.binding import Bound, expect
from fake_tensorrt.callbacks import ILogger
from fake_tensorrt.engine import ICudaEngine
from fake_tensorrt.plan import digest
from fake_tensorrt.program import constants_of
from fake_tensorrt.state import MisuseError, log


class Refitter(Bound):
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._initialised = True
        self._engine = expect(engine, ICudaEngine, "engine")
        self._logger = expect(logger, ILogger, "logger")
        self._weights: dict[str, Any] = {}
        if not engine.refittable:
            # NVIDIA/TensorRT issue 2783; the bindings make a TypeError of the null pointer.
            log(logger, "ERROR", "createInferRefitter: Parameter check failed, condition: e.isRefittable()")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def get_all_weights(self) -> list[str]:
        return sorted(self._engine._plan.digests)

    def get_missing_weights(self) -> list[str]:
        """NvInferRuntime.h getMissingWeights: what the engine has not, and nobody has set."""
        held = self._weights.keys() | self._engine._program.constants.keys()
        return [name for name in self.get_all_weights() if name not in held]

    def refit_cuda_engine(self) -> bool:
        engine = self._engine
        # NvInferRuntime.h refitCudaEngine: "undefined if the engine has pending enqueued work".
        if engine._pending:
            raise MisuseError("an engine is refitted while its work is queued")
        if missing := self.get_missing_weights():
            log(self._logger, "ERROR", f"refitCudaEngine: {len(missing)} weights are missing: {missing[0]}")
            return False
        for name, content in self._weights.items():
            # NvInfer.h BuilderFlag::kREFIT_IDENTICAL: with other weights "behavior is undefined".
            identical = digest(content) == engine._plan.digests[name]
            if "REFIT_IDENTICAL" in engine._plan.flags and not identical:
                raise MisuseError(f"{name} is not what the engine was built with")
        engine._program.replace(self._weights)
        engine._ready = True
        return True

    def offer(self, name: str, content: Any, size: int) -> bool:
        """Set a weight; false where it doesn't fit (NvInferRuntime.h setNamedWeights)."""
        if content.nbytes != size:
            log(self._logger, "ERROR", f"setNamedWeights: {name} has {content.nbytes} bytes, not {size}")
            return False
        self._weights[name] = content
        return True


class OnnxParserRefitter(Bound):
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._initialised = True
        self._refitter = expect(refitter, Refitter, "refitter")
        self._logger = expect(logger, ILogger, "logger")

    def refit_from_file(self, model: str) -> bool:
        """NvOnnxParser.h refitFromFile: a model's weights by their names; the engine takes them later."""
        path = Path(expect(model, str, "model"))
        try:
            graph = onnx.load(path, load_external_data=False).graph
            constants = constants_of(graph, str(path.parent))
        except Exception as error:
            log(self._logger, "ERROR", f"Failed to read {model}: {error}")
            return False
        engine = self._refitter._engine
        sizes = {t.name: _elements(t) for t in engine._program.graph.initializer}
        wanted = self._refitter.get_all_weights()
        if absent := [name for name in wanted if name not in constants]:
            log(self._logger, "ERROR", f"{model} has no weights {absent[0]}")
            return False
        return all(self._refitter.offer(name, constants[name], sizes[name]) for name in wanted)


def _elements(tensor: onnx.TensorProto) -> int:
    """Bytes of a constant as the fake holds it."""
    count = 1
    for size in tensor.dims:
        count *= size
    four_bits = tensor.data_type == onnx.TensorProto.INT4
    return count if four_bits else count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
