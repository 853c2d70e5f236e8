# SPDX-License-Identifier: Apache-2.0
"""Device tensors that ONNX Runtime allocates, and how they are bound to a session."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from starkv.runtime.engines.device_tensor import Device, DeviceTensor

_ONNX_BFLOAT16 = 16
"""numpy has no bfloat16 that ONNX Runtime knows, so it is named by ONNX's number."""


@dataclass(frozen=True)
class OrtMemory:
    """Memory of a device in the form of OrtValues."""

    ort: Any
    """The module ``onnxruntime``."""
    device: Device

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceTensor:
        dtype = np.dtype(dtype)
        value = self.ort.OrtValue.ortvalue_from_shape_and_type(
            [int(size) for size in shape], element_type(dtype), self.device.name, 0
        )
        return DeviceTensor(value, self.device, int(value.data_ptr()), tuple(shape), dtype)


def bind_part(tensor: DeviceTensor, bind: Any, name: str, shape: tuple[int, ...], address: int) -> None:
    """Bind a part of a tensor, which the caller keeps alive, as an input or output."""
    bind(name, tensor.device.name, 0, element_type(tensor.dtype), list(shape), address)


def element_type(dtype: np.dtype[Any]) -> Any:
    """A dtype as ONNX Runtime's Python takes it."""
    return _ONNX_BFLOAT16 if dtype == ml_dtypes.bfloat16 else dtype.type
