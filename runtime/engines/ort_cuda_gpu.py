# SPDX-License-Identifier: Apache-2.0
"""Whether ONNX Runtime can run an engine on this machine's GPU."""

from pathlib import Path
from typing import Any

from starkv.errors import EngineError
from starkv.gpu import Gpu, find_gpu, require_gpu
from starkv.manifest import Manifest

CUDA_PROVIDER = "CUDAExecutionProvider"


def ready_gpu() -> Gpu | None:
    """The GPU, if ONNX Runtime is the one for GPUs and the driver finds any."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return find_gpu() if CUDA_PROVIDER in onnxruntime.get_available_providers() else None


def usable_gpu(manifest: Manifest, directory: Path, ort: Any) -> Gpu:
    """The GPU that an engine is to run on.

    Raises:
        EngineError: it can't.
    """
    dtype = manifest.compute_dtype
    if dtype == "float32":
        raise EngineError(
            f"{directory} computes in float32, for processors; build one for a GPU with "
            "`starkv build --device cuda`"
        )
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise EngineError(
            f"ONNX Runtime {ort.__version__} is the one for processors; pip uninstall onnxruntime, then pip "
            "install 'starkv[cuda]'"
        )
    gpu = require_gpu()
    if dtype == "bfloat16" and gpu.capability < (8, 0):
        raise EngineError(
            f"{gpu.name} has no bfloat16; build an engine with `starkv build --device cuda --compute-dtype "
            "float16`"
        )
    return gpu
