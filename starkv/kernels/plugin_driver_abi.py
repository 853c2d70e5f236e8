# SPDX-License-Identifier: Apache-2.0
"""The plugin driver's structures, with the names of ``plugins_trt/tests/plugin_driver.h``."""

from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

FieldValue = int | str | tuple[int, ...]
"""Of an attribute."""

# nvinfer1::DataType.
_TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.bfloat16: 7,
    torch.int64: 8,
}
_MOST_DIMS = 8


class DriverTensor(Structure):
    """``starkv_driver_tensor`` of plugins_trt/tests/plugin_driver.h."""

    _fields_ = [("type", c_int32), ("rank", c_int32), ("dims", c_int64 * _MOST_DIMS), ("data", c_void_p)]

    @classmethod
    def of(cls, tensor: Tensor) -> "DriverTensor":
        return cls(_TYPES[tensor.dtype], tensor.dim(), (*tensor.shape,), tensor.data_ptr())


class DriverField(Structure):
    """``starkv_driver_field``."""

    _fields_ = [("name", c_char_p), ("text", c_char_p), ("count", c_int32), ("integers", POINTER(c_int32))]

    @classmethod
    def of(cls, name: str, value: FieldValue) -> "DriverField":
        if isinstance(value, str):
            return cls(name.encode(), value.encode(), 0, None)
        integers = (value,) if isinstance(value, int) else value
        return cls(name.encode(), None, len(integers), (c_int32 * len(integers))(*integers))


class DriverCall(Structure):
    """``starkv_driver_call``."""

    _fields_ = [
        ("plugin_library", c_char_p),
        ("operator_name", c_char_p),
        ("field_count", c_int32),
        ("fields", POINTER(DriverField)),
        ("input_count", c_int32),
        ("inputs", POINTER(DriverTensor)),
        ("output_count", c_int32),
        ("outputs", POINTER(DriverTensor)),
    ]
