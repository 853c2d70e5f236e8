# SPDX-License-Identifier: Apache-2.0
"""Implementations of the operators that this machine can run, and why not the others."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from starkv.kernels.attention_call import AttentionCall
from starkv.kernels.c_abi import KernelError
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.cuda_library import KernelLibrary, find_library
from starkv.kernels.full_attention_call import FullAttentionCall
from starkv.kernels.library_paths import KERNELS, PLUGINS, plugin_libraries
from starkv.kernels.packable_attention_call import PackableAttentionCall
from starkv.kernels.plugin_driver import PluginDriver
from starkv.kernels.quantized_attention_call import QuantizedAttentionCall

Compress = Callable[[CompressCall], CompressResult]
Attention = Callable[[AttentionCall], tuple[Tensor, Tensor, Tensor]]
FullAttention = Callable[[FullAttentionCall], Tensor]
QuantizedAttention = Callable[[QuantizedAttentionCall], tuple[Tensor, Tensor, Tensor]]
PackableAttention = Callable[[PackableAttentionCall], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
_BUILD = "`make plugin` builds it"


@dataclass(frozen=True)
class Implementation:
    """One way to run the operators, or some of them."""

    name: str
    compress: Compress | None = None
    attention: Attention | None = None
    full_attention: FullAttention | None = None
    quantized_attention: QuantizedAttention | None = None
    packable_attention: PackableAttention | None = None
    timed: bool = True
    """Its time means something: it runs on the hardware that it was made for."""
    missing: str = ""
    """Why it can't run here at all."""
    widest: int = 1 << 30
    """Most rows of a case that it can take in reasonable time."""

    def why_not(self, rows: int) -> str:
        """Why it can't be run on so many rows; empty if it can."""
        if self.missing:
            return self.missing
        if rows > self.widest:
            return f"would take too long at {rows:,} rows here"
        return ""


def implementations(device: torch.device) -> list[Implementation]:
    """All but the reference, in the order of the table.

    Args:
        device: where tensors lie. On ``cpu`` the GPU implementations run as well where they can: Triton in
            its interpreter, CUDA and the plugin in the library that runs the kernels on the processor.
    """
    return [onnx_runtime(), triton(device), cuda(device), plugin(device)]


def onnx_runtime() -> Implementation:
    """The ONNX definition in ONNX Runtime, on the processor."""
    for package in ("onnx", "onnxruntime"):
        if not find_spec(package):
            return Implementation("ONNX", missing=f"the package {package} is not installed")
    from starkv.validation.onnx_adapter import OnnxImplementation

    runtime = OnnxImplementation()
    return Implementation(
        "ONNX",
        runtime.compress,
        runtime.attention,
        runtime.full_attention,
        runtime.quantized_attention,
        widest=20_000,
    )


def triton(device: torch.device) -> Implementation:
    """Triton on the GPU, or in its interpreter."""
    if not find_spec("triton"):
        return Implementation("Triton", missing="the package triton is not installed")
    if device.type == "cpu":
        # Read when kernels are defined, which is now.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from starkv.kernels.triton_compress import compress

    made = Implementation("Triton", compress)
    return _emulated(made, "interpreted") if device.type == "cpu" else made


def cuda(device: torch.device) -> Implementation:
    """The kernel library of that device."""
    try:
        library = find_library(device.type)
    except KernelError as error:
        return Implementation("CUDA", missing=str(error))
    if library is None:
        return Implementation("CUDA", missing=f"no {KERNELS[device.type]}; {_BUILD}")
    return _on(device, "CUDA", "emulated", library)


def plugin(device: torch.device) -> Implementation:
    """The TensorRT plugins' ``enqueue``, called without TensorRT."""
    libraries = plugin_libraries(device.type)
    if libraries is None:
        reason = f"no {PLUGINS[device.type]}; {_BUILD} where TensorRT's headers are"
        return Implementation("TensorRT plugin", missing=reason)
    driver = PluginDriver(*libraries)
    made = _on(device, "TensorRT plugin", "emulated", driver)
    return replace(made, packable_attention=driver.packable_attention)


def _on(
    device: torch.device, name: str, emulation: str, kernels: KernelLibrary | PluginDriver
) -> Implementation:
    """The CUDA kernels, on the GPU or as they are emulated on the processor."""
    made = Implementation(
        name, kernels.compress, kernels.attention, kernels.full_attention, kernels.quantized_attention
    )
    return _emulated(made, emulation) if device.type == "cpu" else made


def _emulated(made: Implementation, emulation: str) -> Implementation:
    return replace(made, name=f"{made.name} ({emulation})", timed=False, widest=1_000)
