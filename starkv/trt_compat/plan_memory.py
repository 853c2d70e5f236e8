# SPDX-License-Identifier: Apache-2.0
"""What a plan takes of the GPU beside its weights; asking for it proves that the plan loads."""

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.errors import EngineError
from starkv.trt_compat.module import TensorRT, TensorRTLog, make_logger

if TYPE_CHECKING:
    import tensorrt as trt


def scratch_bytes(tensorrt: TensorRT, plan: Path) -> tuple[int, ...]:
    """Device memory for the activations of each profile. The plugins are loaded, and there is a GPU.

    Raises:
        EngineError: the plan can't be loaded.
    """
    log = TensorRTLog()
    runtime: trt.Runtime = tensorrt.module.Runtime(make_logger(tensorrt, log))
    # Mapped, not read: a plan is as large as its weights.
    with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(
                f"TensorRT {tensorrt.full_version} built {plan.name}, but can't load it: {log.take()}; the "
                "GPU's memory may be too small for it"
            )
        return tuple(
            int(engine.get_device_memory_size_for_profile_v2(profile))
            for profile in range(engine.num_optimization_profiles)
        )
